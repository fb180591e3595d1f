"""Text from prompts: `generate` (texts or ids), `complete` (the same with log-probabilities and reasons), `stream` (pieces of text as they come).

Everything here is host-side bookkeeping around decode/steps.py: prompts padded to a few lengths so that few programs are compiled, limits, stop strings.
"""
from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.core import ConfigError
from llmjax.decode.constrained import TOGETHER, constrained, draw_masked
from llmjax.decode.grammar import Constraint, Grammar
from llmjax.decode.kinds import Kind, cache_kind
from llmjax.decode.prepare import prepare, prepared
from llmjax.decode.prompts import Prompt, begun, bucket, token_ids
from llmjax.decode.reading import bounded, check_together, prefilled
from llmjax.decode.rows import Completion, Row
from llmjax.decode.sampling import Sampling, make_sampling, per_row, row_keys, start_history
from llmjax.decode.score import score
from llmjax.decode.speculative import Draft, Drafting, DraftModel, EarlyExit, checked, first_layers, speculated
from llmjax.decode.steps import Decoding, begin, loop
from llmjax.decode.stops import Stops, make_stops, stop_in
from llmjax.decode.text import pieces
from llmjax.models import Decoder

CHECK_EVERY = 16                       # draws between looks for stop strings


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
          alternatives: int = 0, cache: Kind = None) -> Decoding:
    """Prompts fed, each n times, and the first tokens drawn."""
    s = prefilled(model, params, rows, max_new_tokens=max_new_tokens, n=n, cache=cache)
    history = start_history(sampling, model.config.vocab_size, s.told, length=s.room)
    return begin(s.logits, s.cache, s.lengths, s.limits, row_keys(seed, len(s.told)), history, sampling, np.asarray(end_tokens, np.int32), bucket(int(s.limits.max())), alternatives)


def complete(model: Decoder, params: Any, tokenizer: Any, prompts: Sequence[Prompt], *, max_new_tokens: int = 64, stop: str | Sequence[str | int] | None = None,
             seed: int | Sequence[int] = 0, n: int = 1, best_of: int | None = None, scorer: Callable[[Prompt, Completion], float] | None = None, logprobs: int = 0,
             prompt_logprobs: bool = False, grammar: Constraint | Sequence[Constraint | None] | None = None, draft: Draft | None = None, cache: Kind = None,
             **knobs: Any) -> list[Completion]:
    """Continuations of each prompt, n in a row per prompt: [prompt 0 sample 0, prompt 0 sample 1, …].

    prompts: texts, or lists of ids (then tokenizer may be None). knobs: those of sampling.Sampling, for all, or a list of one per row drawn; texts may stand in bad_words. seed: one
    number (row i draws from its i-th fold) or one per row drawn; a draw depends on (seed, position) alone, not on the other rows. stop: texts or ids; None: the model's end tokens; []:
    nothing. best_of: so many are drawn per prompt, and the n that score best are given, best first; the score is the mean log-probability, or what scorer(prompt, completion) says.
    logprobs: so many alternatives are told at each place; prompt_logprobs: also of the prompt. grammar: what answers may be (JsonSchema, Regex, Lark or Choice), for all or one per row
    drawn; an answer cut by max_new_tokens or a stop is a beginning of one. draft: guesses that save calls of the model (DraftModel, NGram or EarlyExit); in bfloat16
    greedy text may then part from the text without at a near-tie (speculative.py says why).
    cache: the kind of cache, a name or a type (make_cache): "int8", "int4", "paged=16", "sinks:4+1020" (texts of any length), "h2o:512+512", … ; None: contiguous, in the computing dtype.
    Generation ends at the model's context at the latest, but over a streaming cache.
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
    kind = cache_kind(cache)
    rows = token_ids(prompts, tokenizer, bounded(model.config, kind))
    if not rows:
        return []
    told = [ids for ids in begun(rows, model.config) for _ in range(drawn)]
    stops = make_stops(stop, tokenizer, model.config)
    sampling = sampling_of(len(told), stops, tokenizer, model.config, knobs)
    grammars = grammars_of(grammar, len(told), tokenizer, model.config)
    if any(grammars) and sampling.min_tokens is not None:
        raise ConfigError("min_tokens and grammar contradict each other: a grammar says when its answer ends")
    each = [dc.replace(stops, least=least or 0, tokens=(*stops.tokens, *(g.end_tokens if g else ()))) for g, least in zip(grammars, per_row("min_tokens", knobs.get("min_tokens"), len(told), 0))]
    if draft is not None and any(grammars):
        raise ConfigError("draft and grammar do not go together yet: leave one out")
    if draft is not None:
        check_together(kind, "draft", heavy=True)
        draft = checked(draft, model)
    if prompt_logprobs:
        check_together(kind, "prompt_logprobs", heavy=True, streaming=True)
    model, params = prepared(model, params)
    if any(grammars) or draft is not None:
        grown = [Row(prompt, mine, 0) for prompt, mine in zip(told, each)]
        knobs = dict(max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, n=drawn, alternatives=logprobs, cache=kind)
        steps: Iterator = constrain(model, params, rows, grown, grammars, **knobs) if draft is None else speculate(model, params, rows, grown, draft, **knobs)
        for count, _ in enumerate(steps, 1):
            if stops.texts and count % CHECK_EVERY == 0:
                for row in grown:
                    row.end_at_text(tokenizer)
        found = [row.completion(tokenizer) for row in grown]
    else:
        found = [row.completion(tokenizer) for row in looped(model, params, tokenizer, rows, told, each, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, n=drawn, alternatives=logprobs,
                                                               cache=kind)]
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


def looped(model: Decoder, params: Any, tokenizer: Any, rows: list[list[int]], told: list[list[int]], stops: list[Stops], *, max_new_tokens: int, sampling: Sampling, **rest: Any) -> list[Row]:
    """Rows drawn on the device alone, which comes back to the host for stop strings only."""
    ends, texts = stops[0].tokens, stops[0].texts
    state = start(model, params, rows, max_new_tokens=max_new_tokens, sampling=sampling, end_tokens=ends, **rest)
    while True:
        until = int(state.count) + CHECK_EVERY if texts else max_new_tokens
        state = loop(model, params, state, sampling, np.asarray(ends, np.int32), np.int32(until))
        tokens, logprobs, limits, done, others = jax.device_get((state.tokens, state.logprobs, state.limits, state.done, state.alternatives))
        made = [Row(prompt, mine, int(limit)) for prompt, mine, limit in zip(told, stops, limits)]
        for i, row in enumerate(made):
            row.take(tokens[i, :int(state.count)].tolist(), logprobs[i], None if others is None else (others[0][i], others[1][i]))
        if done.all():
            return made
        hit = [stop_in(tokenizer, row.prompt, row.ids, row.stops) is not None for row in made]
        state = dc.replace(state, done=state.done | jnp.asarray(hit))
        if (done | np.asarray(hit)).all():
            return made


def grammars_of(grammar: Constraint | Sequence[Constraint | None] | None, rows: int, tokenizer: Any, config: Any) -> list[Grammar | None]:
    """One constraint for all rows, or one each, compiled once each."""
    each: list[Any] = list(grammar) if isinstance(grammar, list | tuple) else [grammar] * rows
    if len(each) != rows:
        raise ConfigError(f"grammar: {len(each)} grammars for {rows} rows; give one, or one per row")
    known = {id(g): None if g is None else Grammar(g, tokenizer, config.vocab_size, config.end_tokens) for g in each}
    return [known[id(g)] for g in each]


def constrain(model: Decoder, params: Any, prompts: list[list[int]], rows: list[Row], grammars: list[Grammar | None], *, max_new_tokens: int, sampling: Sampling, seed: int | Sequence[int], n: int,
              alternatives: int = 0, cache: Kind = None) -> Iterator[None]:
    """`constrained` from the prompts on: fills `rows`."""
    s = prefilled(model, params, prompts, max_new_tokens=max_new_tokens, n=n, spare=TOGETHER, cache=cache)
    for row, limit in zip(rows, s.limits):
        row.limit = int(limit)
    history = start_history(sampling, model.config.vocab_size, s.told, length=s.room)
    matchers = [g.matcher() if g else None for g in grammars]
    return constrained(model, params, s.logits, s.cache, rows, matchers, sampling, row_keys(seed, len(rows)), history, alternatives)


def speculate(model: Decoder, params: Any, prompts: list[list[int]], rows: list[Row], draft: Draft, *, max_new_tokens: int, sampling: Sampling, seed: int | Sequence[int], n: int,
              alternatives: int = 0, cache: Kind = None) -> Iterator[list[tuple[int, int]]]:
    """`speculated` from the prompts on: fills `rows`."""
    side = Drafting(draft, None, None, None)
    if isinstance(draft, DraftModel):
        side = Drafting(draft, *prepare(draft.model, draft.params), None)
    elif isinstance(draft, EarlyExit):
        side = Drafting(draft, *first_layers(model, params, draft.layers), None)
    s = prefilled(model, params, prompts, max_new_tokens=max_new_tokens, n=n, spare=draft.tokens + 1, cache=cache)
    if side.model is not None:
        side.cache = prefilled(side.model, side.params, prompts, max_new_tokens=max_new_tokens, n=n, spare=2 * draft.tokens + 2).cache
    for row, limit in zip(rows, s.limits):
        row.limit = int(limit)
    keys, history = row_keys(seed, len(rows)), start_history(sampling, model.config.vocab_size, s.told, length=s.room)
    active = np.ones(len(rows), bool)
    tokens, logprobs, others, history = draw_masked(s.logits, sampling, keys, s.lengths, history, None, active, alternatives)
    tokens, logprobs, others = jax.device_get((tokens, logprobs, others))
    for i, row in enumerate(rows):
        row.take(tokens[i:i + 1].tolist(), logprobs[i:i + 1], None if others is None else (others[0][i:i + 1], others[1][i:i + 1]))
    sources = [(prompts[i // n] if model.config.encoder else []) + row.prompt for i, row in enumerate(rows)]
    return speculated(model, params, s.cache, rows, sources, side, sampling, keys, history, alternatives)


def generate(model: Decoder, params: Any, tokenizer: Any, prompts: Sequence[Prompt], *, n: int = 1, **knobs: Any) -> list:
    """`complete`, reduced to what most callers want: the new text of each prompt that is a text, the new ids of each that is a list of ids; with n > 1 a list of n of them."""
    done = complete(model, params, tokenizer, prompts, n=n, **knobs)
    each = [c.text if isinstance(prompts[i // n], str) else c.ids for i, c in enumerate(done)]
    return each if n == 1 else [each[i:i + n] for i in range(0, len(each), n)]


def stream(model: Decoder, params: Any, tokenizer: Any, prompt: Prompt, *, max_new_tokens: int = 64, stop: str | Sequence[str | int] | None = None, seed: int | Sequence[int] = 0,
           grammar: Constraint | None = None, cache: Kind = None, **knobs: Any) -> Iterator[str]:
    """One prompt's continuation in pieces of whole characters; text that may be the beginning of a stop string is held back until it is clear. Knobs as in `complete`."""
    rows = token_ids([prompt], tokenizer, bounded(model.config, cache_kind(cache)))
    stops = dc.replace(make_stops(stop, tokenizer, model.config), least=knobs.get("min_tokens") or 0)
    sampling = sampling_of(1, stops, tokenizer, model.config, knobs)
    told, made = begun(rows, model.config)[0], grammars_of(grammar, 1, tokenizer, model.config)
    model, params = prepared(model, params)
    if made[0] is not None:
        row = Row(told, dc.replace(stops, tokens=(*stops.tokens, *made[0].end_tokens)), 0)
        ids = new_ids(row, constrain(model, params, rows, [row], made, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, n=1, cache=cache))
    else:
        ids = token_stream(model, params, start(model, params, rows, max_new_tokens=max_new_tokens, sampling=sampling, end_tokens=stops.tokens, seed=seed, n=1, cache=cache), sampling, stops)
    yield from pieces(ids, tokenizer, stops, told)


def new_ids(row: Row, steps: Iterator[None]) -> Iterator[int]:
    """The ids of a row as its steps make them, without its end token."""
    given = 0
    for _ in steps:
        new, given = row.ids[given:], len(row.ids)
        yield from (x for x in new if x not in row.stops.tokens)
    yield from (x for x in row.ids[given:] if x not in row.stops.tokens)


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
