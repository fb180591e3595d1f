"""Decoding as pure functions: `prefill`, `decode_step`, and `loop`, a `lax.while_loop` over steps and draws. Each is compiled on its own; caches are donated.

They take any module with the decoder's signature. Legend: B rows, T prompt length, V vocabulary, M room for new tokens.
"""
from __future__ import annotations

import dataclasses as dc
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from llmjax.decode.history import History
from llmjax.decode.sampling import Sampling, best_logprobs, sample
from llmjax.models import Cache, Decoder, State, grow_cache, jit_by_model
from llmjax.models import init_cache as empty_cache


def init_cache(model: Decoder, batch_size: int, length: int, dtype: Any = None) -> Cache:
    """An empty cache of `length` positions for `batch_size` rows, in the computing dtype unless said otherwise."""
    return empty_cache(model.config, batch_size, length, jnp.dtype(dtype or model.compute.dtype))


@jit_by_model(donate_argnames="cache")
def prefill(model: Decoder, params: Any, tokens: jax.Array, positions: jax.Array, segments: jax.Array, cache: Cache,
            source: tuple[jax.Array, jax.Array] | None = None) -> tuple[jax.Array, Cache]:
    """A prompt, or a further piece of one: tokens, positions, segments [B, T] (segment 0 is padding, on either side) -> (logits [B, V] after each row's last token, cache).
    source: tokens and segments [B, S] of what an encoder-decoder reads, with its first piece."""
    more = () if source is None else source
    x, cache = model.apply({"params": params}, tokens, positions, segments, cache, *more, method="features")
    last = jnp.max(jnp.where(segments > 0, jnp.arange(tokens.shape[1]), 0), -1)
    x = jnp.take_along_axis(x, last[:, None, None], 1)
    return model.apply({"params": params}, x, method="unembed")[:, 0], cache


def forward_one(model: Decoder, params: Any, tokens: jax.Array, positions: jax.Array, active: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """See decode_step; this one is for use inside a compiled function."""
    logits, cache = model.apply({"params": params}, tokens[:, None], positions[:, None], active[:, None].astype(jnp.int32), cache)
    return logits[:, 0], cache


@jit_by_model(donate_argnames="cache")
def decode_step(model: Decoder, params: Any, tokens: jax.Array, positions: jax.Array, active: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """One token per row: tokens, positions [B] int32, active [B] bool (a row that is not writes nothing) -> (logits [B, V] float32, cache)."""
    return forward_one(model, params, tokens, positions, active, cache)


@register_dataclass
@dc.dataclass(frozen=True)
class Decoding:
    """What a loop carries. positions [B] of the last token drawn (which is not fed yet); done [B] bool; limits [B]: how many tokens each row may make in all;
    tokens, logprobs [B, M]: what was made; count: draws so far; keys [B]; history: what the knobs remember; alternatives: ids and log-probabilities [B, M, n] of the n most probable
    tokens at each place, or None."""
    positions: jax.Array
    done: jax.Array
    limits: jax.Array
    tokens: jax.Array
    logprobs: jax.Array
    count: jax.Array
    keys: jax.Array
    history: History
    cache: Cache
    alternatives: tuple[jax.Array, jax.Array] | None = None


def draw(state: Decoding, logits: jax.Array, sampling: Sampling, end_tokens: jax.Array) -> Decoding:
    """Draws a token for every row that is not done and writes it down; a row is done with an end token (which is written) or at its limit. logits [B, V] float32."""
    positions = state.positions + 1
    token, logprob, history = sample(logits, sampling, state.keys, positions, state.history, active=~state.done)
    token = jnp.where(state.done, 0, token)
    done = state.done | (token[:, None] == end_tokens[None]).any(-1) | (state.count + 1 >= state.limits)
    others = None
    if state.alternatives is not None:
        best = best_logprobs(logits, state.alternatives[0].shape[-1])
        others = state.alternatives[0].at[:, state.count].set(best[0]), state.alternatives[1].at[:, state.count].set(best[1])
    return dc.replace(state, tokens=state.tokens.at[:, state.count].set(token), logprobs=state.logprobs.at[:, state.count].set(jnp.where(state.done, 0.0, logprob)),
                      count=state.count + 1, done=done, history=history, positions=positions, alternatives=others)


@functools.partial(jax.jit, static_argnames=("room", "alternatives"), donate_argnames="cache")
def begin(logits: jax.Array, cache: Cache, lengths: jax.Array, limits: jax.Array, keys: jax.Array, history: History, sampling: Sampling, end_tokens: jax.Array, room: int,
          alternatives: int = 0) -> Decoding:
    """The state after a prefill of `lengths` [B] tokens whose last logits [B, V] are given, its first token drawn. `room` is M, `alternatives` is n."""
    rows = logits.shape[0]
    others = (jnp.zeros((rows, room, alternatives), jnp.int32), jnp.zeros((rows, room, alternatives), jnp.float32)) if alternatives else None
    state = Decoding(lengths - 1, limits <= 0, limits, jnp.zeros((rows, room), jnp.int32), jnp.zeros((rows, room), jnp.float32), jnp.zeros((), jnp.int32), keys, history, cache, others)
    return draw(state, logits, sampling, end_tokens)


@jit_by_model(donate_argnames="state")
def loop(model: Decoder, params: Any, state: Decoding, sampling: Sampling, end_tokens: jax.Array, until: jax.Array) -> Decoding:
    """Feeds and draws until every row is done or `until` draws were made in all: one program, no host between tokens. end_tokens [E] int32 (E may be 0)."""
    def going(s: Decoding):
        return (s.count < until) & ~jnp.all(s.done)

    def body(s: Decoding):
        token = jax.lax.dynamic_index_in_dim(s.tokens, s.count - 1, 1, keepdims=False)
        logits, cache = forward_one(model, params, token, s.positions, ~s.done, s.cache)
        return draw(dc.replace(s, cache=cache), logits, sampling, end_tokens)
    return jax.lax.while_loop(going, body, state)


@functools.partial(jax.jit, donate_argnames="cache")
def rewind(cache: Cache, lengths: jax.Array) -> Cache:
    """Forgets every token at position `lengths` [B] or later. Exact for layers without a ring; a ring has already overwritten what lay a window before the newest token,
    so rewind only where nothing was lost (`can_rewind`)."""
    slots = {size: dc.replace(s, segments=jnp.where(s.positions < lengths[:, None], s.segments, 0)) for size, s in cache.slots.items()}
    return dc.replace(cache, slots=slots)


def can_rewind(cache: Cache) -> bool:
    """Whether every layer keeps all positions: none has a ring, and none a state, which no token can be taken out of."""
    return len(cache.slots) == 1 and not any(isinstance(kept, State) for part in cache.layers.values() for kept in part)


@jit_by_model(static_argnums=1)
def grow(model: Decoder, cache: Cache, length: int) -> Cache:
    """The same cache with room for `length` positions."""
    return grow_cache(model.config, cache, length)


def take_rows(cache: Cache, index: jax.Array) -> Cache:
    """The rows at index [n] int32; one may come several times."""
    def on(axis):
        return lambda x: jnp.take(x, index, axis)
    layers = {part: jax.tree.map(on(1 if part == "cycle" else 0), kept) for part, kept in cache.layers.items()}
    return dc.replace(cache, layers=layers, slots=jax.tree.map(on(0), cache.slots), source=jax.tree.map(on(0), cache.source))


@functools.partial(jax.jit, static_argnames="times")
def repeat_rows(cache: Cache, times: int) -> Cache:
    """Each row `times` times in a row: one prompt, several continuations."""
    rows = next(iter(cache.slots.values())).positions.shape[0]
    return take_rows(cache, jnp.repeat(jnp.arange(rows), times))
