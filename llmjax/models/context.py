"""What every layer may know about its tokens, worked out once per call: positions, segments, rotary tables, where a cache puts them.

Legend: B batch, T tokens of this call.
"""
from __future__ import annotations

import dataclasses as dc

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from llmjax.core.model_config import ModelConfig, Rope, rotation
from llmjax.models import rope as rotary
from llmjax.models.cache import Cache, Plan, next_positions, plan
from llmjax.models.relative import Distances

Table = tuple[jax.Array, jax.Array]


@register_dataclass
@dc.dataclass(frozen=True)
class Context:
    """positions, segments [B, T] int32, or None: a range, one document. tables: sines and cosines per (rope, head_dim) of `ropes`. plans: one per cache size.
    relative: see models/relative.py. source [B, S, D], source_segments [B, S]: an encoder's output, where a layer has to make keys and values of it, and whose it is."""
    positions: jax.Array | None
    segments: jax.Array | None
    tables: tuple[Table, ...]
    plans: dict[int, Plan]
    ropes: tuple[tuple[Rope, int], ...] = dc.field(metadata=dict(static=True))
    empty: bool = dc.field(metadata=dict(static=True))       # the cache held nothing before this call
    relative: Distances | None = None
    source: jax.Array | None = None
    source_segments: jax.Array | None = None

    def places(self, length: int) -> jax.Array:
        """The tokens' positions, [B, T] or [1, T] int32."""
        return jnp.arange(length, dtype=jnp.int32)[None] if self.positions is None else self.positions

    def rotate(self, x: jax.Array, rope: Rope | None) -> jax.Array:
        """x [B, T, N, H] with its rotary positions applied."""
        return x if rope is None else rotary.rotate(x, self.tables[self.ropes.index((rope, x.shape[-1]))], rope)


def make_context(config: ModelConfig, tokens: jax.Array, positions: jax.Array | None, segments: jax.Array | None, cache: Cache | None) -> Context:
    """See Context. Without positions they count from 0, or go on from what the cache holds."""
    plans = {}
    if cache is not None:
        shape = tokens.shape
        positions = jnp.broadcast_to(next_positions(cache, shape) if positions is None else positions, shape).astype(jnp.int32)
        known = jnp.ones(shape, jnp.int32) if segments is None else jnp.broadcast_to(segments, shape).astype(jnp.int32)
        plans = {size: plan(slots, positions, known) for size, slots in cache.slots.items()}
    ropes = tuple(dict.fromkeys((rope, size) for rope, size in (rotation(x.mixer) for x in config.layers) if rope))
    where = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] if positions is None else positions
    tables = tuple(rotary.tables(rope, head_dim, where) for rope, head_dim in ropes)
    return Context(positions, segments, tables, plans, ropes, cache is not None and cache.empty)
