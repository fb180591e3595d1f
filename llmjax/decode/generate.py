"""Text from prompts: `generate` (texts or ids), `complete` (the same with log-probabilities and reasons), `stream` (pieces of text as they come).

Everything here is host-side bookkeeping around decode/steps.py: prompts padded to a few lengths so that few programs are compiled, limits, stop strings.
"""
from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.core import ConfigError
from llmjax.decode.prepare import prepared
from llmjax.decode.prompts import Prompt, begun, bucket, padded, token_ids
from llmjax.decode.sampling import Sampling, make_sampling, per_row, row_keys, start_history
from llmjax.decode.score import pairs, score
from llmjax.decode.steps import Decoding, begin, init_cache, loop, prefill, repeat_rows
from llmjax.decode.stops import Stops, make_stops, new_text, pieces, stop_in, until_end
from llmjax.models import Decoder

CHECK_EVERY = 16                       # draws between looks for stop strings


@dc.dataclass(frozen=True)
class Completion:
    """One continuation. ids: new tokens, the end token left out; text: None without a tokenizer; logprobs: of each id under the model's softmax; finish: why it ended.

    score: the mean log-probability of what was drawn, the end token too, or what a scorer said. alternatives: at each id the most probable ones, (id, log-probability), best first;
    prompt_logprobs, prompt_alternatives: the same of the prompt's ids, None for the first. None where not asked for.
    """
    ids: list[int]
    text: str | None
    logprobs: list[float]
    finish: Literal["end", "stop", "length"]
    score: float = 0.0
    alternatives: list[list[tuple[int, float]]] | None = None
    prompt_logprobs: list[float | None] | None = None
    prompt_alternatives: list[list[tuple[int, float]] | None] | None = None


def sampling_of(rows: int, stops: Stops, tokenizer: Any, config: Any, knobs: dict[str, Any]) -> Sampling:
    """Knobs as callers give them -> Sampling. bad_words may hold texts (each as it stands and after a space), dry_sequence_breakers single characters, which stand for all tokens that
    hold one; with a tokenizer DRY's breakers are llama.cpp's (new line, colon, quote, star) unless said otherwise. Raises ConfigError as make_sampling, and for texts without a tokenizer."""
    knobs = {"temperature": 0.0, **knobs}

    def texts_in(name):
        texts = [x for x in knobs.get(name) or () if isinstance(x, str)]
        if texts and tokenizer is None:
            raise ConfigError(f"{name}={texts[0]!r} is text and there is no tokenizer: give ids, or a tokenizer")
        return texts
    if texts_in("bad_words"):
        spelled = [tokenizer.encode(form) for text in texts_in("bad_words") for form in (text, " " + text.lstrip())]
        knobs["bad_words"] = [*(x for x in knobs["bad_words"] if not isinstance(x, str)), *(list(x) for x in dict.fromkeys(map(tuple, spelled)))]
    if tokenizer is not None and knobs.get("dry_multiplier") is not None and knobs.get("dry_sequence_breakers") is None:
        knobs["dry_sequence_breakers"] = ["\n", ":", '"', "*"]
    signs = texts_in("dry_sequence_breakers")
    if any(len(sign) != 1 for sign in signs):
        raise ConfigError(f"dry_sequence_breakers={next(s for s in signs if len(s) != 1)!r}: single characters or ids are wanted")
    if signs:
        holding = [i for i in range(min(tokenizer.vocab_size, config.vocab_size)) if any(sign.encode() in tokenizer.token_bytes(i) for sign in signs)]
        knobs["dry_sequence_breakers"] = [*(x for x in knobs["dry_sequence_breakers"] if not isinstance(x, str)), *holding]
    if knobs.get("min_tokens") is not None:
        knobs["end_tokens"] = list(stops.tokens)
    return make_sampling(rows, config.vocab_size, **knobs)


def start(model: Decoder, params: Any, rows: list[list[int]], *, max_new_tokens: int, sampling: Sampling, end_tokens: Sequence[int], seed: int | Sequence[int], n: int,
          alternatives: int = 0) -> Decoding:
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
    history = start_history(sampling, config.vocab_size, [r for r in rows for _ in range(n)], length=cache.length)
    return begin(logits, cache, lengths, limits, row_keys(seed, len(lengths)), history, sampling, np.asarray(end_tokens, np.int32), room, alternatives)


def complete(model: Decoder, params: Any, tokenizer: Any, prompts: Sequence[Prompt], *, max_new_tokens: int = 64, stop: str | Sequence[str | int] | None = None,
             seed: int | Sequence[int] = 0, n: int = 1, best_of: int | None = None, scorer: Callable[[Prompt, Completion], float] | None = None, logprobs: int = 0,
             prompt_logprobs: bool = False, **knobs: Any) -> list[Completion]:
    """Continuations of each prompt, n in a row per prompt: [prompt 0 sample 0, prompt 0 sample 1, …].

    prompts: texts, or lists of ids (then tokenizer may be None). knobs: those of sampling.Sampling, for all, or a list of one per row drawn; texts may stand in bad_words. seed: one
    number (row i draws from its i-th fold) or one per row drawn; a draw depends on (seed, position) alone, not on the other rows. stop: texts or ids; None: the model's end tokens; []:
    nothing. best_of: so many are drawn per prompt, and the n that score best are given, best first; the score is the mean log-probability, or what scorer(prompt, completion) says.
    logprobs: so many alternatives are told at each place; prompt_logprobs: also of the prompt. Generation ends at the model's context at the latest.
    Raises ConfigError for what cannot be done, naming it.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("n", n), ("best_of", n if best_of is None else best_of)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}={value!r}: a whole number from 1 is wanted")
    if isinstance(logprobs, bool) or not isinstance(logprobs, int) or not 0 <= logprobs <= model.config.vocab_size:
        raise ConfigError(f"logprobs={logprobs!r}: a whole number from 0 to the vocabulary's {model.config.vocab_size} is wanted")
    drawn = n if best_of is None else best_of
    if drawn < n:
        raise ConfigError(f"best_of={best_of}: n={n} of them are wanted; draw as many at least")
    if scorer is not None and best_of is None:
        raise ConfigError("scorer says something about best_of, which is not given")
    rows = token_ids(prompts, tokenizer, model.config)
    if not rows:
        return []
    told = [ids for ids in begun(rows, model.config) for _ in range(drawn)]
    stops = make_stops(stop, tokenizer, model.config)
    sampling = sampling_of(len(told), stops, tokenizer, model.config, knobs)
    each = [dc.replace(stops, least=least or 0) for least in per_row("min_tokens", knobs.get("min_tokens"), len(told), 0)]
    model, params = prepared(model, params)
    state = start(model, params, rows, max_new_tokens=max_new_tokens, sampling=sampling, end_tokens=stops.tokens, seed=seed, n=drawn, alternatives=logprobs)
    end = np.asarray(stops.tokens, np.int32)
    if not stops.texts:
        state = loop(model, params, state, sampling, end, np.int32(max_new_tokens))
    else:
        while not bool(np.all(state.done)):
            state = loop(model, params, state, sampling, end, np.int32(int(state.count) + CHECK_EVERY))
            hit = [stop_in(tokenizer, prompt, ids, mine) is not None for prompt, ids, mine in zip(told, made(state, stops.tokens), each)]
            state = dc.replace(state, done=state.done | jnp.asarray(hit))
    found = finished(state, told, tokenizer, each)
    if best_of is not None:
        found = [c for i in range(len(rows)) for c in ranked(prompts[i], found[i * drawn:(i + 1) * drawn], scorer)[:n]]
    if prompt_logprobs:
        scores = [s for s in score(model, params, None, rows, alternatives=logprobs) for _ in range(n)]
        found = [dc.replace(c, prompt_logprobs=s.logprobs, prompt_alternatives=s.alternatives) for c, s in zip(found, scores)]
    return found


def ranked(prompt: Prompt, found: list[Completion], scorer: Callable[[Prompt, Completion], float] | None) -> list[Completion]:
    """Completions of one prompt, those that score best first."""
    if scorer is not None:
        found = [dc.replace(c, score=float(scorer(prompt, c))) for c in found]
    return sorted(found, key=lambda c: -c.score)


def made(state: Decoding, end_tokens: Sequence[int]) -> list[list[int]]:
    """The new ids of each row so far, up to its end token or limit."""
    tokens, count, limits = np.asarray(state.tokens), int(state.count), np.asarray(state.limits)
    return [until_end(row[:min(count, limit)].tolist(), end_tokens) for row, limit in zip(tokens, limits)]


def finished(state: Decoding, prompts: list[list[int]], tokenizer: Any, stops: list[Stops]) -> list[Completion]:
    """What the rows of a loop that ended made; prompts and stops of each row."""
    tokens, logprobs, limits, others = jax.device_get((state.tokens, state.logprobs, state.limits, state.alternatives))
    found = []
    for i, (prompt, ids, stop) in enumerate(zip(prompts, made(state, stops[0].tokens), stops)):
        ended = len(ids) < min(int(limits[i]), tokens.shape[1]) and tokens[i, len(ids)] in stop.tokens
        text, finish = None if tokenizer is None else new_text(tokenizer, prompt, ids), "end" if ended else "length"
        cut = stop_in(tokenizer, prompt, ids, stop)
        if cut is not None:
            ids, text, finish = ids[:cut[0]], cut[1], "stop"
        told = logprobs[i, :len(ids) + (finish == "end")]
        found.append(Completion(ids, text, [float(x) for x in logprobs[i, :len(ids)]], finish, float(np.mean(told)) if len(told) else 0.0,      # type: ignore[arg-type]
                                None if others is None else pairs(others[0][i], others[1][i], len(ids))))
    return found


def generate(model: Decoder, params: Any, tokenizer: Any, prompts: Sequence[Prompt], *, n: int = 1, **knobs: Any) -> list:
    """`complete`, reduced to what most callers want: the new text of each prompt that is a text, the new ids of each that is a list of ids; with n > 1 a list of n of them."""
    done = complete(model, params, tokenizer, prompts, n=n, **knobs)
    each = [c.text if isinstance(prompts[i // n], str) else c.ids for i, c in enumerate(done)]
    return each if n == 1 else [each[i:i + n] for i in range(0, len(each), n)]


def stream(model: Decoder, params: Any, tokenizer: Any, prompt: Prompt, *, max_new_tokens: int = 64, stop: str | Sequence[str | int] | None = None, seed: int = 0,
           **knobs: Any) -> Iterator[str]:
    """One prompt's continuation in pieces of whole characters; text that may be the beginning of a stop string is held back until it is clear. Knobs as in `complete`."""
    rows = token_ids([prompt], tokenizer, model.config)
    stops = dc.replace(make_stops(stop, tokenizer, model.config), least=knobs.get("min_tokens") or 0)
    sampling = sampling_of(1, stops, tokenizer, model.config, knobs)
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
