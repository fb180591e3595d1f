"""Text from prompts: `generate` (texts or ids), `complete` (the same with log-probabilities and reasons), `stream` (pieces of text as they come).

Everything here is host-side bookkeeping around decode/steps.py: prompts padded to a few lengths so that few programs are compiled, limits, stop strings.
"""
from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from llmjax.core import ConfigError
from llmjax.core.model_config import LanguageHead
from llmjax.decode.prepare import prepared
from llmjax.decode.sampling import Sampling, make_sampling, row_keys
from llmjax.decode.steps import Decoding, begin, init_cache, loop, prefill, repeat_rows
from llmjax.models import Decoder

Prompt = str | Sequence[int]
CHECK_EVERY = 16                       # draws between looks for stop strings


@dc.dataclass(frozen=True)
class Completion:
    """One continuation. ids: new tokens, the end token left out; text: None without a tokenizer; logprobs: of each id under the model's softmax; finish: why it ended."""
    ids: list[int]
    text: str | None
    logprobs: list[float]
    finish: Literal["end", "stop", "length"]


def bucket(n: int, smallest: int = 16) -> int:
    """n rounded up to a length that programs are compiled for: powers of two up to 256, then multiples of 256."""
    return max(smallest, 1 << (n - 1).bit_length()) if n <= 256 else -(-n // 256) * 256


def token_ids(prompts: Sequence[Prompt], tokenizer: Any, config: Any) -> list[list[int]]:
    """Prompts as ids; a text gets the model's begin token where it has one. Raises ConfigError for empty, foreign and over-long prompts, and for a model that does not generate."""
    if not isinstance(config.head, LanguageHead):
        raise ConfigError(f"this model's head is a {type(config.head).__name__}: it generates no text; call model.apply for its answer, or llmjax.embed for vectors")
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int | np.integer)):
        raise ConfigError("prompts: a list of prompts is wanted, each a text or a list of ids; put this one in a list")
    rows = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if tokenizer is None:
                raise ConfigError(f"prompt {i} is text and there is no tokenizer: pass ids, or a tokenizer")
            ids = list(tokenizer.encode(prompt, add_special_tokens=True))
        else:
            ids = [int(x) for x in prompt]
        if not ids:
            raise ConfigError(f"prompt {i} is empty: at least one token is needed")
        wrong = [x for x in ids if not 0 <= x < config.vocab_size]
        if wrong:
            raise ConfigError(f"prompt {i} holds the id {wrong[0]}, the model's vocabulary has {config.vocab_size}")
        context = (config.encoder or config).context
        if len(ids) > context:
            raise ConfigError(f"prompt {i} has {len(ids)} tokens, the model's context is {context}: shorten it")
        rows.append(ids)
    return rows


@dc.dataclass(frozen=True)
class Stops:
    """End tokens, stop strings; stop=None means the model's own end tokens, [] nothing. Texts stop beside the model's own end tokens."""
    tokens: tuple[int, ...]
    texts: tuple[str, ...]


def make_stops(stop: str | Sequence[str | int] | None, tokenizer: Any, config: Any) -> Stops:
    if stop is None:
        return Stops(config.end_tokens, ())
    items = [stop] if isinstance(stop, str | int) else list(stop)
    texts = tuple(x for x in items if isinstance(x, str))
    if any(not t for t in texts):
        raise ConfigError("stop: an empty text would stop at once; leave it out")
    if texts and tokenizer is None:
        raise ConfigError(f"stop={texts[0]!r} is text and there is no tokenizer: give ids, or a tokenizer")
    known = tokenizer.special_tokens if tokenizer is not None else {}
    tokens = tuple(int(x) for x in items if not isinstance(x, str)) + tuple(known[t] for t in texts if t in known)
    texts = tuple(t for t in texts if t not in known)
    return Stops(tokens + (config.end_tokens if texts else ()), texts)


def padded(rows: list[list[int]], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tokens, positions, segments [B, length] int32, padded on the right."""
    tokens = np.zeros((len(rows), length), np.int32)
    segments = np.zeros((len(rows), length), np.int32)
    for i, ids in enumerate(rows):
        tokens[i, :len(ids)], segments[i, :len(ids)] = ids, 1
    return tokens, np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape), segments


def begun(rows: list[list[int]], config: Any) -> list[list[int]]:
    """What the decoder's tokens begin with: the prompts, or an encoder-decoder's start token. Raises ConfigError where it has none."""
    if config.encoder is None:
        return rows
    if config.decoder_start is None:
        raise ConfigError("the model's config names no decoder_start_token_id: an encoder-decoder's answer starts from it")
    return [[config.decoder_start]] * len(rows)


def start(model: Decoder, params: Any, rows: list[list[int]], *, max_new_tokens: int, sampling: Sampling, end_tokens: Sequence[int], seed: int | Sequence[int], n: int) -> Decoding:
    """Prefills the prompts (those of an encoder-decoder are what its encoder reads), repeats each n times and draws the first tokens."""
    config, source = model.config, None
    if config.encoder:
        tokens, _, segments = padded(rows, min(bucket(max(map(len, rows))), max(config.encoder.context, max(map(len, rows)))))
        source, rows = (tokens, segments), begun(rows, config)
    lengths = np.asarray([len(r) for r in rows for _ in range(n)], np.int32)
    limits = np.minimum(max_new_tokens, config.context - lengths + 1)
    room = bucket(int(limits.max()))
    length = bucket(max(map(len, rows)))
    cache = init_cache(model, len(rows), -(-(max(map(len, rows)) + room) // 64) * 64)
    tokens, positions, segments = padded(rows, min(length, cache.length))
    logits, cache = prefill(model, params, tokens, positions, segments, cache, source)
    if n > 1:
        logits, cache = jnp.repeat(logits, n, 0), repeat_rows(cache, n)
    seen = None
    if sampling.repetition_penalty is not None:
        seen = np.zeros((len(lengths), config.vocab_size), bool)
        for i in range(len(lengths)):
            seen[i, rows[i // n]] = True
    return begin(logits, cache, lengths, limits, row_keys(seed, len(lengths)), seen, sampling, np.asarray(end_tokens, np.int32), room)


def complete(model: Decoder, params: Any, tokenizer: Any, prompts: Sequence[Prompt], *, max_new_tokens: int = 64, temperature: float | Sequence[float] = 0.0,
             top_k: int | Sequence[int] | None = None, top_p: float | Sequence[float] | None = None, min_p: float | Sequence[float] | None = None,
             repetition_penalty: float | Sequence[float] | None = None, stop: str | Sequence[str | int] | None = None, seed: int | Sequence[int] = 0, n: int = 1) -> list[Completion]:
    """Continuations of each prompt, n in a row per prompt: [prompt 0 sample 0, prompt 0 sample 1, …].

    prompts: texts, or lists of ids (then tokenizer may be None). Knobs are numbers or one per resulting row; see sampling.Sampling. seed: one number (row i draws from its i-th
    fold) or one per row; a draw depends on (seed, position) alone, not on the other rows. stop: texts or ids; None: the model's end tokens; []: nothing.
    Generation ends at the model's context at the latest. Raises ConfigError for what cannot be done, naming it.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("n", n)):
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}={value!r}: a whole number from 1 is wanted")
    rows = token_ids(prompts, tokenizer, model.config)
    if not rows:
        return []
    told = begun(rows, model.config)
    stops = make_stops(stop, tokenizer, model.config)
    sampling = make_sampling(len(rows) * n, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty)
    model, params = prepared(model, params)
    state = start(model, params, rows, max_new_tokens=max_new_tokens, sampling=sampling, end_tokens=stops.tokens, seed=seed, n=n)
    end = np.asarray(stops.tokens, np.int32)
    if not stops.texts:
        state = loop(model, params, state, sampling, end, np.int32(max_new_tokens))
    else:
        while not bool(np.all(state.done)):
            state = loop(model, params, state, sampling, end, np.int32(int(state.count) + CHECK_EVERY))
            hit = [find_stop(new_text(tokenizer, told[i // n], ids), stops.texts) is not None for i, ids in enumerate(made(state, stops.tokens))]
            state = dc.replace(state, done=state.done | jnp.asarray(hit))
    limits = np.asarray(state.limits)
    found = zip(made(state, stops.tokens), np.asarray(state.logprobs), np.asarray(state.tokens), limits)
    return [finished(told[i // n], ids, logprobs, tokens, int(limit), tokenizer, stops) for i, (ids, logprobs, tokens, limit) in enumerate(found)]


def new_text(tokenizer: Any, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The text of new ids as a continuation of the prompt's (SentencePiece keeps its first space then), special tokens left out."""
    pieces = tokenizer.stream(skip_special_tokens=True, after=prompt)
    return "".join([*(pieces.push(i) for i in ids if i < tokenizer.vocab_size), pieces.flush()])       # a model's table may have rows its tokenizer has no token for


def made(state: Decoding, end_tokens: Sequence[int]) -> list[list[int]]:
    """The new ids of each row so far, up to its end token or limit."""
    tokens, count, limits = np.asarray(state.tokens), int(state.count), np.asarray(state.limits)
    return [until_end(row[:min(count, limit)].tolist(), end_tokens) for row, limit in zip(tokens, limits)]


def until_end(ids: list[int], end_tokens: Sequence[int]) -> list[int]:
    for i, x in enumerate(ids):
        if x in end_tokens:
            return ids[:i]
    return ids


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the earliest stop string begins, or None."""
    places = [i for i in (text.find(s) for s in stops) if i >= 0]
    return min(places) if places else None


def finished(prompt: list[int], ids: list[int], logprobs: np.ndarray, tokens: np.ndarray, limit: int, tokenizer: Any, stops: Stops) -> Completion:
    text = None if tokenizer is None else new_text(tokenizer, prompt, ids)
    finish: Literal["end", "stop", "length"] = "end" if len(ids) < min(limit, len(tokens)) and tokens[len(ids)] in stops.tokens else "length"
    at = None if text is None else find_stop(text, stops.texts)
    if at is not None:
        keep = next(i for i in range(1, len(ids) + 1) if find_stop(new_text(tokenizer, prompt, ids[:i]), stops.texts) is not None)
        ids, text, finish = ids[:keep], text[:at], "stop"       # type: ignore[index]
    return Completion(ids, text, [float(x) for x in logprobs[:len(ids)]], finish)


def generate(model: Decoder, params: Any, tokenizer: Any, prompts: Sequence[Prompt], *, n: int = 1, **knobs: Any) -> list:
    """`complete`, reduced to what most callers want: the new text of each prompt that is a text, the new ids of each that is a list of ids; with n > 1 a list of n of them."""
    done = complete(model, params, tokenizer, prompts, n=n, **knobs)
    each = [c.text if isinstance(prompts[i // n], str) else c.ids for i, c in enumerate(done)]
    return each if n == 1 else [each[i:i + n] for i in range(0, len(each), n)]


def stream(model: Decoder, params: Any, tokenizer: Any, prompt: Prompt, *, max_new_tokens: int = 64, stop: str | Sequence[str | int] | None = None, seed: int = 0,
           **knobs: Any) -> Iterator[str]:
    """One prompt's continuation in pieces of whole characters; text that may be the beginning of a stop string is held back until it is clear. Knobs as in `complete`."""
    rows = token_ids([prompt], tokenizer, model.config)
    stops, sampling = make_stops(stop, tokenizer, model.config), make_sampling(1, **{"temperature": 0.0, **knobs})
    model, params = prepared(model, params)
    state = start(model, params, rows, max_new_tokens=max_new_tokens, sampling=sampling, end_tokens=stops.tokens, seed=seed, n=1)
    yield from pieces(token_stream(model, params, state, sampling, stops), tokenizer, stops, begun(rows, model.config)[0])


def token_stream(model: Decoder, params: Any, state: Decoding, sampling: Sampling, stops: Stops, keep: list | None = None) -> Iterator[int]:
    """Token ids of a one-row state as they are drawn, without the end token. `keep`, a list, receives the newest state (its cache holds all but the last token drawn)."""
    end = np.asarray(stops.tokens, np.int32)
    while True:
        count = int(state.count)
        token, done = int(state.tokens[0, count - 1]), bool(state.done[0])
        if keep is not None:
            keep[:] = [state]
        if token in stops.tokens:
            return
        yield token
        if done:
            return
        state = loop(model, params, state, sampling, end, np.int32(count + 1))


def pieces(ids: Iterator[int], tokenizer: Any, stops: Stops, prompt: Sequence[int]) -> Iterator[str]:
    """Ids as text that continues the prompt's and never holds half a character nor any part of a stop string."""
    detokenizer, held = tokenizer.stream(skip_special_tokens=True, after=prompt), ""
    for token in ids:
        held += detokenizer.push(token) if token < tokenizer.vocab_size else ""
        at = find_stop(held, stops.texts)
        if at is not None:
            if held[:at]:
                yield held[:at]
            return
        wait = max((k for s in stops.texts for k in range(1, min(len(s), len(held) + 1)) if held.endswith(s[:k])), default=0)
        ready, held = held[:len(held) - wait], held[len(held) - wait:]
        if ready:
            yield ready
    held += detokenizer.flush()
    if held:
        yield held
