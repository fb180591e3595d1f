"""The paged cache: keys and values of all rows in pages of one pool, found through a table (Kwon et al. 2023, arXiv:2309.06180, section 4.1).

Position p of row b lies in page table[b, p // page] at offset p mod page. Who has which page is the host's to know (decode/pages.py): it hands in a table before each call, so two rows
may share pages, and a prefix may have been written by a request that is long gone. A row's keys are its positions 0 … p, whoever wrote them; there are no slots to remember. Layers with
a window keep all positions and mask; recurrent layers keep a state per row.

Legend: B rows, T tokens of this call, W width of the table, P pages, K key/value heads, H head dim.
"""
from __future__ import annotations

import dataclasses as dc
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from llmjax.core.errors import ConfigError
from llmjax.core.model_config import Attention, LatentAttention, ModelConfig
from llmjax.core.platform import platform
from llmjax.kernels.attention.stored import Stored, encode
from llmjax.models.cache import Cache, KeyValue, Pool, State, empty_entry


@register_dataclass
@dc.dataclass(frozen=True)
class Paging:
    """What all layers share of one call over pages. table [B, W] int32; index [B, T] int32: page · size + offset of each token, -1 where nothing is written; used [B, T] bool."""
    table: jax.Array
    index: jax.Array
    used: jax.Array


@register_dataclass
@dc.dataclass(frozen=True)
class InPages:
    """What queries may look at, in pages: a layer's pool. width: values are the first so many numbers of keys (None: they are `v`)."""
    k: Stored
    v: Stored
    width: int | None = dc.field(default=None, metadata=dict(static=True))
    in_order = False           # they are not this call's own tokens; no field

    def inside(self, width: int) -> InPages:
        return dc.replace(self, width=width)


def init_paged(config: ModelConfig, rows: int, pages: int, length: int, page: int, dtype: Any, kind: Any = None) -> Cache:
    """An empty paged cache of `pages` pages of `page` positions for `rows` rows of up to `length` positions; its table names no page yet. dtype and kind: see
    cache.empty_entry. Raises ConfigError for a model whose cache is
    more than keys, values and states."""
    for name, value in (("rows", rows), ("pages", pages), ("length", length), ("page", page)):
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"init_paged: {name}={value!r}; a whole number from 1 is wanted")
    if config.encoder:
        raise ConfigError("a paged cache holds no encoder's output: decode an encoder-decoder with init_cache")
    for i, mixer in enumerate(layer.mixer for layer in config.layers):
        if isinstance(mixer, Attention | LatentAttention) and (not mixer.causal or getattr(mixer, "relative", None)):
            raise ConfigError(f"a paged cache: layer {i} is {'not causal' if not mixer.causal else 'of relative positions'}; use init_cache")

    def one(mixer, lead):
        if not isinstance(mixer, Attention | LatentAttention):
            return empty_entry(mixer, (*lead, rows), length, dtype)
        kept = empty_entry(dc.replace(mixer, window=None, **({"globals": None} if isinstance(mixer, Attention) else {})), (*lead, pages), page, dtype, kind)
        return Pool(kept.k, kept.v) if isinstance(kept, KeyValue) else kept
    layers = {part: tuple(one(layer.mixer, (config.repeats,) if part == "cycle" else ()) for layer in getattr(config, part)) for part in ("prefix", "cycle", "suffix")}
    return Cache(layers, {}, table=jnp.full((rows, -(-length // page)), -1, jnp.int32), page=page)


def page_tokens(cache: Cache, positions: jax.Array, segments: jax.Array) -> Paging:
    """Where tokens at positions [B, T] go; segment 0, a position beyond the table and an entry below 0 are nowhere."""
    assert cache.table is not None and cache.page is not None
    used, place = segments > 0, positions // cache.page
    number = jnp.take_along_axis(cache.table, jnp.clip(place, 0, cache.table.shape[1] - 1), 1)
    there = used & (place < cache.table.shape[1]) & (number >= 0)
    return Paging(cache.table, jnp.where(there, number * cache.page + positions % cache.page, -1), used)


def write(pool: Pool, k: jax.Array, v: jax.Array, index: jax.Array) -> Pool:
    """The pool with this call's k, v [B, T, K, H] at index [B, T] (Paging)."""
    flat = index.reshape(-1)

    def put(old, new):
        size = old.shape[0] * old.shape[1]
        rows = old.reshape(size, *old.shape[2:])
        at, new = jnp.where(flat < 0, size, flat), new.reshape(flat.shape[0], *new.shape[2:])
        if platform() == "cpu" and flat.shape[0] == 1:     # of a single token XLA makes an update of a slice, and works it out, with a copy of the pool, once for every reader
            at, new = jnp.pad(at, (0, 1), constant_values=size), jnp.pad(new, [(0, 1 if axis == 0 else 0) for axis in range(new.ndim)])
        return rows.at[at].set(new, mode="drop").reshape(old.shape)
    return Pool(*(jax.tree.map(put, old, encode(old, new)) for old, new in ((pool.k, k), (pool.v, v))))


def restart(cache: Cache, positions: jax.Array, segments: jax.Array) -> Cache:
    """States of the rows in which a position 0 comes are forgotten: another request begins there. (A page needs no such thing: nobody looks beyond his newest position.)"""
    starts = ((segments > 0) & (positions == 0)).any(-1)

    def clear(x, axis):
        return jnp.where(starts.reshape(*(1,) * axis, -1, *(1,) * (x.ndim - axis - 1)), jnp.zeros_like(x), x)

    def one(kept, axis):
        return jax.tree.map(lambda x: clear(x, axis), kept) if isinstance(kept, State) else kept
    return dc.replace(cache, layers={part: tuple(one(kept, int(part == "cycle")) for kept in entries) for part, entries in cache.layers.items()})


def copy_pages(cache: Cache, source: jax.Array, target: jax.Array) -> Cache:
    """The cache with what pages `source` [n] int32 hold also in pages `target` [n]; a target below 0 stands for nothing."""
    def one(kept, axis):
        if not isinstance(kept, Pool):
            return kept

        def copy(x):
            to = jnp.where(target < 0, x.shape[axis], target)
            at = (slice(None),) * axis
            return x.at[(*at, to)].set(x[(*at, jnp.clip(source, 0, x.shape[axis] - 1))], mode="drop")
        return jax.tree.map(copy, kept)
    return dc.replace(cache, layers={part: tuple(one(kept, int(part == "cycle")) for kept in entries) for part, entries in cache.layers.items()})
