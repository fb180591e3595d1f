"""Speculative decoding: something cheap guesses several tokens, the model judges them in one call, and what is made follows the model's own distribution exactly.

A guess x drawn from q is taken with probability min(1, p(x) / q(x)), and where it is not, a token is drawn from max(p - q, 0) (Leviathan et al. 2023, arXiv:2211.17192, algorithm 1;
Chen et al. 2023, arXiv:2302.01318). p and q are what `sample` draws from with the same knobs, so every knob works, and a greedy row makes what it makes without a draft.

That holds for the logits of the call that judges. A product over T rows adds up in another order than one over a single row, and no product we have is the same for both: in float32 the
difference is in the last bits and text parts only where two tokens are as good as equal; in bfloat16 scores are rounded to 8 bits, near-ties are common, and greedy text with a draft may leave
the text without one after some tens of tokens. Both are then greedy texts of the same model under its own rounding; who needs the same tokens computes in float32.

Legend: B rows, G guesses, T = G + 1 tokens judged at a time, V vocabulary.
"""
from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.core import ConfigError
from llmjax.decode import filters
from llmjax.decode.history import History, remember
from llmjax.decode.prompts import padded
from llmjax.decode.rows import Row
from llmjax.decode.sampling import Sampling, best_logprobs, distribution, logprobs_of, next_mu
from llmjax.decode.steps import can_rewind, rewind
from llmjax.models import Cache, Decoder, jit_by_model


@dc.dataclass(frozen=True)
class DraftModel:
    """Guesses of a smaller model with the same vocabulary, `tokens` at a time."""
    model: Any
    params: Any
    tokens: int = 4


@dc.dataclass(frozen=True)
class NGram:
    """Guesses copied from the text so far: what followed its last tokens (`longest` of them at most, one at least) where they last stood (prompt lookup)."""
    tokens: int = 6
    longest: int = 3


@dc.dataclass(frozen=True)
class EarlyExit:
    """Guesses of the model's own first `layers` and its head (Elhoushi et al. 2024, arXiv:2404.16710, section 4.3; of use with a model trained for it)."""
    layers: int
    tokens: int = 4


Draft = DraftModel | NGram | EarlyExit


def checked(draft: Draft, model: Decoder) -> Draft:
    """Raises ConfigError for a draft that cannot serve this model."""
    if not isinstance(draft, Draft):
        raise ConfigError(f"draft={draft!r}: DraftModel, NGram or EarlyExit is wanted")
    for name, value in (("tokens", draft.tokens), *((("longest", draft.longest),) if isinstance(draft, NGram) else ()), *((("layers", draft.layers),) if isinstance(draft, EarlyExit) else ())):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{type(draft).__name__}: {name}={value!r}: a whole number from 1 is wanted")
    if isinstance(draft, DraftModel) and draft.model.config.vocab_size != model.config.vocab_size:
        raise ConfigError(f"the draft model's vocabulary has {draft.model.config.vocab_size} tokens, the model's {model.config.vocab_size}: they must be the same")
    if isinstance(draft, DraftModel) and (draft.model.config.encoder is None) != (model.config.encoder is None):
        raise ConfigError("one of model and draft model is an encoder-decoder, the other is not")
    if isinstance(draft, EarlyExit) and draft.layers >= len(model.config.layers):
        raise ConfigError(f"EarlyExit: layers={draft.layers}, the model has {len(model.config.layers)}: give fewer")
    return draft


def first_layers(model: Decoder, params: dict, count: int) -> tuple[Decoder, dict]:
    """A prepared model's first layers, with its embedding, last norm and head."""
    config = model.config
    gone = {f"prefix_{i}" for i in range(count, len(config.prefix))}
    return dc.replace(model, config=dc.replace(config, prefix=config.prefix[:count])), {name: w for name, w in params.items() if name not in gone}


def lookup(text: Sequence[int], longest: int, count: int) -> list[int]:
    """What followed the last tokens of text where they last stood before: as many of them as possible, `longest` at most -> `count` tokens at most."""
    ids = np.asarray(text, np.int64)
    for size in range(min(longest, len(ids) - 1), 0, -1):
        windows = np.lib.stride_tricks.sliding_window_view(ids[:-1], size)
        found = np.flatnonzero((windows == ids[-size:]).all(-1))
        if len(found):
            return ids[found[-1] + size:found[-1] + size + count].tolist()
    return []


def folded(keys: jax.Array, positions: jax.Array, use: int, count: int) -> jax.Array:
    """`count` numbers in [0, 1) of each row's key, position and use: [B, count]. Plain draws (sampling.uniforms) take no fold."""
    return jax.vmap(lambda key, position: jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, position), use), (count,)))(keys, positions)


@jit_by_model(donate_argnames="cache", static_argnames="count")
def guess(model: Decoder, params: Any, tokens: jax.Array, segments: jax.Array, start: jax.Array, sampling: Sampling, keys: jax.Array, cache: Cache, history: History,
          count: int) -> tuple[jax.Array, jax.Array, Cache]:
    """tokens, segments [B, T] int32 (what was made since the last call, 0 is padding), start [B] position of the first -> (guesses [B, G], what they were drawn from [B, G, V], the cache with
    the tokens and without the guesses: these go to a copy, so that any kind of cache will do)."""
    positions = start[:, None] + jnp.arange(tokens.shape[1])[None]
    x, cache = model.apply({"params": params}, tokens, positions, segments, cache, method="features")
    last = segments.sum(-1)
    x = jnp.take_along_axis(x, jnp.maximum(last - 1, 0)[:, None, None], 1)
    logits = model.apply({"params": params}, x, method="unembed")[:, 0]

    def one(carry, i):
        logits, ahead, history = carry
        here = start + last + i
        q = distribution(logits, sampling, history)
        token = filters.draw(q, folded(keys, here, 2, 2))
        history = remember(history, token, last > 0, next_mu(sampling, history, q, token))
        logits, ahead = model.apply({"params": params}, token[:, None], here[:, None], (last > 0)[:, None].astype(jnp.int32), ahead)
        return (logits[:, 0], ahead, history), (token, q)
    _, (tokens, q) = jax.lax.scan(one, (logits, cache, history), jnp.arange(count))
    return jnp.swapaxes(tokens, 0, 1), jnp.swapaxes(q, 0, 1), cache


@jit_by_model(donate_argnames=("cache", "history"), static_argnames=("rewindable", "alternatives"))
def verify(model: Decoder, params: Any, tokens: jax.Array, segments: jax.Array, start: jax.Array, q: jax.Array | None, sampling: Sampling, keys: jax.Array, cache: Cache, history: History,
           rewindable: bool, alternatives: int = 0) -> tuple:
    """tokens, segments [B, T] int32: the last token made (at position start [B]) and guesses after it; q [B, G, V] what those were drawn from, None where they were not drawn
    -> (tokens made [B, T], how many of them [B], 1 to T, 0 in a row that is all padding; their log-probabilities [B, T], alternatives, cache, history). The cache then holds all but the
    last token made: guesses are taken out of it where it can be rewound, else those that were right are fed once more to the cache as it was."""
    positions = start[:, None] + jnp.arange(tokens.shape[1])[None]
    x, fed = model.apply({"params": params}, tokens, positions, segments, cache, method="features")
    logits = model.apply({"params": params}, x, method="unembed")
    guesses, there = (jnp.pad(y[:, 1:], ((0, 0), (0, 1))) for y in (tokens, segments > 0))
    drawn_from = None if q is None else jnp.moveaxis(jnp.pad(q, ((0, 0), (0, 1), (0, 0))), 1, 0)

    def one(carry, now):
        alive, history, here = carry
        logits, x, has, q = now
        p = distribution(logits, sampling, history)
        q = jax.nn.one_hot(x, logits.shape[-1]) if q is None else q
        u = folded(keys, here, 1, 3)
        right = has & (u[:, 0] * jnp.take_along_axis(q, x[:, None], 1)[:, 0] < jnp.take_along_axis(p, x[:, None], 1)[:, 0])
        rest = jnp.where(has[:, None], jnp.maximum(p - q, 0.0), p)
        rest = jnp.where(rest.sum(-1, keepdims=True) > 0, rest, p)      # p = q but for rounding
        token = jnp.where(right, x, filters.draw(rest, u[:, 1:]))
        history = remember(history, token, alive, next_mu(sampling, history, p, token))
        return (alive & right, history, here + 1), (token, alive, logprobs_of(logits, token))
    begin = (segments[:, 0] > 0, history, start + 1)
    (_, history, _), (made, alive, logprobs) = jax.lax.scan(one, begin, (jnp.moveaxis(logits, 1, 0), guesses.T, there.T, drawn_from))
    count = alive.sum(0)
    if rewindable:
        cache = rewind(fed, start + count)
    else:
        kept = segments * (jnp.arange(tokens.shape[1])[None] < count[:, None])
        _, cache = model.apply({"params": params}, tokens, positions, kept, cache, method="features")
    return made.T, count, logprobs.T, best_logprobs(logits, alternatives) if alternatives else None, cache, history


@dc.dataclass
class Drafting:
    """The draft's side: a model with its cache (the whole text but the tokens in `due`), or none for NGram."""
    draft: Draft
    model: Decoder | None
    params: Any
    cache: Cache | None


def speculated(model: Decoder, params: Any, cache: Cache, rows: Sequence[Row], sources: Sequence[Sequence[int]], side: Drafting, sampling: Sampling, keys: jax.Array, history: History,
               alternatives: int = 0) -> Iterator[list[tuple[int, int]]]:
    """Fills `rows`, each of which has its first token, until all are done; after every call of the model it yields how many guesses each row had and how many were right. cache: the
    prompts'; sources: of each row what NGram may copy from beside the answer."""
    rewindable, due = can_rewind(cache), [list(row.ids) for row in rows]
    size = side.draft.tokens
    while not all(row.finish for row in rows):
        start = np.asarray([row.position - 1 for row in rows], np.int32)
        room = [0 if row.finish else min(size, row.limit - len(row.ids) - 1) for row in rows]
        q = None
        if side.model is not None:
            fed = [[] if row.finish else ids for row, ids in zip(rows, due)]
            tokens, _, segments = padded(fed, size + 1)
            found, q, side.cache = guess(side.model, side.params, tokens, segments, np.asarray([row.position - len(ids) for row, ids in zip(rows, due)], np.int32), sampling, keys, side.cache,
                                         history, count=size)
            guesses = [ids[:n] for ids, n in zip(np.asarray(found).tolist(), room)]
        else:
            assert isinstance(side.draft, NGram)
            guesses = [lookup([*source, *row.ids], side.draft.longest, n) if n else [] for row, source, n in zip(rows, sources, room)]
        tokens, _, segments = padded([[] if row.finish else [row.ids[-1], *ids] for row, ids in zip(rows, guesses)], size + 1)
        made, count, logprobs, others, cache, history = verify(model, params, tokens, segments, start, q, sampling, keys, cache, history, rewindable=rewindable, alternatives=alternatives)
        made, count, logprobs, others = jax.device_get((made, count, logprobs, others))
        for i, row in enumerate(rows):
            due[i] = made[i, :count[i]].tolist()
            row.take(due[i], logprobs[i], None if others is None else (others[0][i], others[1][i]))
        yield [(len(ids), max(int(n) - 1, 0)) for ids, n in zip(guesses, count)]
