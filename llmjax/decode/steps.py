"""Decoding as pure functions: `prefill`, `decode_step`, and `loop`, a `lax.while_loop` over steps and draws. Each is compiled on its own; caches are donated.

They take any module with the decoder's signature. Legend: B rows, T prompt length, V vocabulary, M room for new tokens.
"""
from __future__ import annotations

import dataclasses as dc
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from llmjax.core import ConfigError
from llmjax.core.errors import nearest
from llmjax.decode.history import History
from llmjax.decode.sampling import Sampling, best_logprobs, sample
from llmjax.kernels.attention.stored import QUANTIZED
from llmjax.models import Cache, Decoder, HeavyHitters, State, Streaming, grow_cache, jit_by_model
from llmjax.models import copy_pages as with_copies
from llmjax.models import init_cache as empty_cache
from llmjax.models import init_evicting as with_policy
from llmjax.models import init_paged as empty_pages

FLOATS = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")


def init_cache(model: Decoder, batch_size: int, length: int, dtype: Any = None) -> Cache:
    """An empty cache of `length` positions for `batch_size` rows. dtype: what keys and values are kept in, a float dtype (the computing dtype unless given), "int8", "int4" or
    "int8/int4" (keys/values; kernels/attention/stored.py; benchmarks/cache_quality.py measures what it costs). Raises ConfigError for another."""
    return empty_cache(model.config, batch_size, length, *kept_in(model, dtype))


def kept_in(model: Decoder, dtype: Any) -> tuple[Any, Any]:
    """-> (the float dtype of states, what keys and values are kept in)."""
    name = dtype if isinstance(dtype, str) else str(jnp.dtype(model.compute.dtype if dtype is None else dtype))
    if name in QUANTIZED:
        return jnp.dtype(model.compute.dtype), name
    known = jnp.dtype(name) if name in FLOATS else None
    if known is None:
        raise ConfigError(f"a cache in {name!r}: there is none" + nearest(name, (*FLOATS, *QUANTIZED)))
    return known, known


def init_paged(model: Decoder, rows: int, pages: int, *, length: int, page: int = 16, dtype: Any = None) -> Cache:
    """An empty paged cache: `pages` pages of `page` positions in one pool for up to `rows` rows of up to `length` positions each; dtype as in init_cache.

    Before a call the host hands in where the rows' pages are, `dc.replace(cache, table=…)`, [B, W] int32 with W up to ceil(length / page); an entry below 0 is no page. Position p of row b
    lies in page table[b, p // page] at offset p mod page; a call writes its tokens there (those of segment 0 nowhere) and sees the row's positions 0 … p, whoever wrote them. Positions
    are always given. A call costs what the longest of its rows has written, whatever W is. B may be any number where no layer is recurrent; states are kept for each of the `rows` and
    forgotten where a row's position 0 comes again. The bookkeeping is `decode.Pages`.
    Raises ConfigError for encoder-decoders, and for layers that are not causal or know relative positions alone.
    """
    return empty_pages(model.config, rows, pages, length, page, *kept_in(model, dtype))


def init_evicting(model: Decoder, batch_size: int, policy: Streaming | HeavyHitters, dtype: Any = None) -> Cache:
    """An empty cache that holds `policy.size` tokens a row of a text of any length, and gives up others as the policy's paper says (models/evicting.py): `Streaming(sinks, window)` or
    `HeavyHitters(heavy, recent)`. dtype: a float dtype (the computing dtype unless given). Positions are those of the text and always given; T tokens take O(T (T + size)) memory, so long
    prompts are fed in pieces. Raises ConfigError for numbers out of range, quantised dtypes, and models whose attention has no such rule."""
    floats, kind = kept_in(model, dtype)
    if kind in QUANTIZED:
        raise ConfigError(f"an evicting cache in {kind!r}: it keeps floats; leave dtype out")
    return with_policy(model.config, batch_size, policy, floats)


@functools.partial(jax.jit, donate_argnames="cache")
def copy_pages(cache: Cache, source: jax.Array, target: jax.Array) -> Cache:
    """The paged cache with what pages `source` [n] int32 hold also in pages `target` [n] (copy on write); pairs whose target is below 0 are passed over, so that n can stay the same."""
    return with_copies(cache, source, target)


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
    so rewind only where nothing was lost (`can_rewind`). A paged cache has nothing to forget: what lies beyond a row's newest position is not seen."""
    slots = {size: dc.replace(s, segments=jnp.where(s.positions < lengths[:, None], s.segments, 0)) for size, s in cache.slots.items()}
    return dc.replace(cache, slots=slots)


def can_rewind(cache: Cache) -> bool:
    """Whether every layer keeps all positions: none has a ring, and none a state, which no token can be taken out of."""
    return len(cache.slots) <= 1 and cache.policy is None and not any(isinstance(kept, State) for part in cache.layers.values() for kept in part)


@jit_by_model(static_argnums=1)
def grow(model: Decoder, cache: Cache, length: int) -> Cache:
    """The same cache with room for `length` positions. Raises ConfigError for a paged one, whose rows get more pages instead."""
    check_contiguous(cache, "grow", "give its rows more pages")
    if cache.policy is not None:
        raise ConfigError("grow: an evicting cache has room for any text; make another with init_evicting for a larger one")
    return grow_cache(model.config, cache, length)


def on_rows(change: Callable[[jax.Array, int], jax.Array], cache: Cache) -> Cache:
    """change(array, the number of its axis of rows) on everything a contiguous cache holds."""
    layers = {part: jax.tree.map(lambda x, axis=int(part == "cycle"): change(x, axis), kept) for part, kept in cache.layers.items()}
    slots, kept, source = (jax.tree.map(lambda x: change(x, 0), tree) for tree in (cache.slots, cache.kept, cache.source))
    return dc.replace(cache, layers=layers, slots=slots, kept=kept, source=source)


def take_rows(cache: Cache, index: jax.Array) -> Cache:
    """The rows at index [n] int32; one may come several times. Raises ConfigError for a paged cache."""
    check_contiguous(cache, "take_rows", "name the same pages in several rows of its table")
    return on_rows(lambda x, axis: jnp.take(x, index, axis), cache)


@functools.partial(jax.jit, static_argnames="times")
def repeat_rows(cache: Cache, times: int) -> Cache:
    """Each row `times` times in a row: one prompt, several continuations. Raises ConfigError for a paged cache, whose rows share pages instead."""
    check_contiguous(cache, "repeat_rows", "name the same pages in several rows of its table")
    return on_rows(lambda x, axis: jnp.repeat(x, times, axis), cache)


def check_contiguous(cache: Cache, what: str, instead: str) -> None:
    """Raises ConfigError for a paged cache."""
    if cache.page is not None:
        raise ConfigError(f"{what}: this cache is paged; {instead}")
