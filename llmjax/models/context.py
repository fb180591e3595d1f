"""What every layer may know about its tokens, worked out once per call: positions, segments, rotary tables, where a cache puts them.

Legend: B batch, T tokens of this call.
"""
from __future__ import annotations

import dataclasses as dc

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from llmjax.core.errors import ConfigError
from llmjax.core.model_config import ModelConfig, Recurrent, rotation
from llmjax.core.positions import Rope
from llmjax.kernels.attention.stored import Stored
from llmjax.models import rope as rotary
from llmjax.models.cache import Cache, Plan, next_positions, plan
from llmjax.models.evicting import Eviction, evict
from llmjax.models.paged import InPages, Paging, page_tokens
from llmjax.models.relative import Distances

Table = tuple[jax.Array, jax.Array]


@register_dataclass
@dc.dataclass(frozen=True)
class Seen:
    """What queries may look at: k [B, S, K, H], v [B, S, K, Hv] as they are kept, positions and segments [B, S] (None: a range, one document); in_order: they are this call's own tokens;
    by_slot: slot i holds a position that is i mod S. width: values are the first so many numbers of keys (None: they are `v`)."""
    k: Stored
    v: Stored
    positions: jax.Array | None
    segments: jax.Array | None
    in_order: bool = dc.field(metadata=dict(static=True))
    by_slot: bool = dc.field(default=False, metadata=dict(static=True))
    width: int | None = dc.field(default=None, metadata=dict(static=True))

    def inside(self, width: int) -> Seen:
        """The same with the first `width` numbers of keys as values."""
        return dc.replace(self, width=width)

    def first(self, count: int) -> Seen:
        """Of a cache by slots the first `count`."""
        k, v, positions, segments = (jax.tree.map(lambda x: x[:, :count], part) for part in (self.k, self.v, self.positions, self.segments))
        return dc.replace(self, k=k, v=v, positions=positions, segments=segments)


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
    eviction: Eviction | None = None                     # and an evicting one
    turned: bool = dc.field(default=False, metadata=dict(static=True))           # keys are kept turned: queries and keys of attention layers are, too
    paging: Paging | None = None                         # where a paged cache puts the tokens
    source: jax.Array | None = None
    source_segments: jax.Array | None = None
    prefix: jax.Array | None = None                      # [B, T]: how many tokens of its document each token sees whatever stands after it
    across: str | None = dc.field(default=None, metadata=dict(static=True))      # how attention goes over rows that lie on several devices (models/sequence.py)
    zigzag: bool = dc.field(default=False, metadata=dict(static=True))           # and whether they lie in zigzag order
    lent: dict[str, Seen | InPages] = dc.field(default_factory=dict)   # what layers so far have lent to later ones

    def places(self, length: int) -> jax.Array:
        """The tokens' positions, [B, T] or [1, T] int32."""
        return jnp.arange(length, dtype=jnp.int32)[None] if self.positions is None else self.positions

    def rotate(self, x: jax.Array, rope: Rope | None) -> jax.Array:
        """x [B, T, N, H] with its rotary positions applied."""
        return x if rope is None else rotary.rotate(x, self.tables[self.ropes.index((rope, x.shape[-1]))], rope)

    def reach(self, length: int) -> jax.Array | None:
        """The newest position each of the `length` tokens may see, [B, T], or None where it is its own and the positions are a range."""
        if self.prefix is None:
            return self.positions
        return jnp.maximum(self.places(length), self.prefix - 1)

    def document_of(self, x: jax.Array) -> jax.Array | None:
        """The segments of x [B, T, …], a row for each of its rows (one given row stands for all of them)."""
        return None if self.segments is None else jnp.broadcast_to(self.segments, x.shape[:2])


def make_context(config: ModelConfig, tokens: jax.Array, positions: jax.Array | None, segments: jax.Array | None, cache: Cache | None,
                 prefix: jax.Array | None = None) -> Context:
    """See Context. Without positions they count from 0, or go on from what the cache holds. Raises ConfigError for a prefix in a model whose layers do not all see the whole past."""
    if prefix is not None:
        check_prefix(config)
        prefix = jnp.broadcast_to(prefix[:, None] if prefix.ndim == 1 else prefix, tokens.shape).astype(jnp.int32)
    plans, paging, eviction = {}, None, None
    if cache is not None:
        shape = tokens.shape
        if positions is None and (cache.page is not None or cache.policy is not None):
            raise ConfigError(f"{'a paged' if cache.page else 'an evicting'} cache does not know where a row's text goes on: give positions")
        positions = jnp.broadcast_to(next_positions(cache, shape) if positions is None else positions, shape).astype(jnp.int32)
        known = jnp.ones(shape, jnp.int32) if segments is None else jnp.broadcast_to(segments, shape).astype(jnp.int32)
        plans = {size: plan(slots, positions, known) for size, slots in cache.slots.items()}
        paging = None if cache.page is None else page_tokens(cache, positions, known)
        eviction = None if cache.policy is None else evict(cache, positions, known)
    ropes = tuple(dict.fromkeys((rope, size) for rope, size in (rotation(x.mixer) for x in config.layers) if rope))
    where = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] if positions is None else positions
    tables = tuple(rotary.tables(rope, head_dim, where) for rope, head_dim in ropes)
    return Context(positions, segments, tables, plans, ropes, cache is not None and cache.empty, prefix=prefix, paging=paging, eviction=eviction, turned=cache is not None and cache.turned)


def check_prefix(config: ModelConfig) -> None:
    """Raises ConfigError, naming the first layer whose past is not all of its document: there is no seeing a prefix from both sides through a window or a state."""
    for i, mixer in enumerate(layer.mixer for layer in config.layers):
        if isinstance(mixer, Recurrent):
            raise ConfigError(f"prefix: layer {i} is recurrent ({type(mixer).__name__}) and reads from left to right; leave prefix out, or use a model of attention layers alone")
        if getattr(mixer, "window", None) is not None:
            raise ConfigError(f"prefix: layer {i} has window={mixer.window}; leave prefix out, or use a model without windows")
