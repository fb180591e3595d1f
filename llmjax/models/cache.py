"""What a model remembers between calls: keys and values of each attention layer, and which token stands in which slot; of a recurrent layer its state.

The cache is a pytree that goes in and comes out. A layer without a window has one slot per position; a layer with a window has a ring of `window` slots. Which token a
slot holds is kept once per size (`Slots`), not once per layer. Attention sees two functions: `plan` (once per call and size) and `remember` (once per layer).

Legend: B batch, T tokens of this call, S slots, K key/value heads, H head dim.
"""
from __future__ import annotations

import dataclasses as dc
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from llmjax.core.errors import ConfigError
from llmjax.core.model_config import Attention, GatedDelta, LatentAttention, LinearAttention, Mixer, ModelConfig, Recurrent
from llmjax.kernels.attention import stored as storage
from llmjax.kernels.attention.stored import Int4, Stored


@register_dataclass
@dc.dataclass(frozen=True)
class Slots:
    """positions, segments [B, S] int32; segment 0 is an empty slot."""
    positions: jax.Array
    segments: jax.Array


@register_dataclass
@dc.dataclass(frozen=True)
class KeyValue:
    """k [B, S, K, H], v [B, S, K, Hv]; with a leading [repeats] axis in a scanned cycle. Latent attention keeps its latents and the shared rotated key as k, and no v (Hv = 0)."""
    k: Stored
    v: Stored


@register_dataclass
@dc.dataclass(frozen=True)
class Pool:
    """Keys and values of all rows in pages: k [P, page, K, H], v [P, page, K, Hv]; with a leading [repeats] axis in a scanned cycle. `Cache.table` says which page holds what."""
    k: Stored
    v: Stored


@register_dataclass
@dc.dataclass(frozen=True)
class Sinks:
    """Keys, not rotated, and values of a streaming cache (models/evicting.py): k [B, S, K, H], v [B, S, K, Hv], the first slots the text's first tokens, the others a ring."""
    k: jax.Array
    v: jax.Array


@register_dataclass
@dc.dataclass(frozen=True)
class Heavy:
    """Keys and values of a heavy-hitter cache: k [B, S, K, H], v [B, S, K, Hv]; positions [B, S, K] int32 (-1: nothing) and mass [B, S, K] float32, the attention each has received so far."""
    k: jax.Array
    v: jax.Array
    positions: jax.Array
    mass: jax.Array


@register_dataclass
@dc.dataclass(frozen=True)
class State:
    """What a recurrent layer made of all tokens so far: state [B, heads, key dim, value dim] float32, segment [B] int32 (what it belongs to; 0: nothing yet); `recent`: of a layer with
    a convolution the inputs [B, W - 1, …] it still sees and their segments [B, W - 1]. With a leading [repeats] axis in a scanned cycle."""
    state: jax.Array
    segment: jax.Array
    recent: tuple[jax.Array, jax.Array] | None = None


Own = KeyValue | Pool | Sinks | Heavy | State | None      # None: of a layer that borrows what another keeps


@register_dataclass
@dc.dataclass(frozen=True)
class WithSource:
    """Of a layer with cross-attention: what it remembers of its own tokens, and keys and values of the encoder's output (None until the first call, which makes them)."""
    own: Own
    source: KeyValue | None


Entry = Own | WithSource


@register_dataclass
@dc.dataclass(frozen=True)
class Cache:
    """layers: {"prefix": (KeyValue, State or WithSource, …), "cycle": …, "suffix": …}; slots: {S: Slots}. `empty` (static) says that nothing was written yet, so a first chunk sees itself
    alone. source: segments [B, length of the encoder's tokens] of an encoder-decoder, None before its first call.

    A paged cache (models/paged.py) has no slots but a table [B, W] int32 and `page` (static), how many positions stand in a page. An evicting one (models/evicting.py) has a `policy`
    (static), slots for its rings alone, and a streaming one in `kept` those of all its other layers."""
    layers: dict[str, tuple[Entry, ...]]
    slots: dict[int, Slots]
    empty: bool = dc.field(default=False, metadata=dict(static=True))
    source: jax.Array | None = None
    table: jax.Array | None = None
    page: int | None = dc.field(default=None, metadata=dict(static=True))
    kept: Slots | None = None
    policy: Any = dc.field(default=None, metadata=dict(static=True))

    @property
    def length(self) -> int:
        """How many positions fit (of an evicting cache: are held)."""
        if self.policy is not None:
            return self.policy.size
        return max(self.slots) if self.page is None or self.table is None else self.page * self.table.shape[1]

    @property
    def turned(self) -> bool:
        """Whether keys are kept turned (kernels/attention/stored.py), which queries then have to be too."""
        own = (kept.own if isinstance(kept, WithSource) else kept for part in self.layers.values() for kept in part)
        return any(isinstance(kept, KeyValue | Pool) and isinstance(kept.k, Int4) for kept in own)


@register_dataclass
@dc.dataclass(frozen=True)
class Plan:
    """Where this call's tokens go: `index` [B, T] int32 (S: nowhere), the slots before and after."""
    index: jax.Array
    before: Slots
    after: Slots


def slots_of(mixer: Attention | LatentAttention, length: int) -> int:
    if mixer.window is None or (isinstance(mixer, Attention) and mixer.globals):
        return length
    return min(length, mixer.window)


def sizes_of(config: ModelConfig, length: int, old: int | None = None) -> dict[int, int]:
    """How many slots its layers have, each number once -> the same for `old` positions. `length` always: there stands which positions were seen, also where no layer keeps all."""
    old = length if old is None else old
    return {slots_of(x.mixer, length): slots_of(x.mixer, old) for x in config.layers if not isinstance(x.mixer, Recurrent)} | {length: old}


def empty_entry(mixer: Mixer, lead: tuple[int, ...], length: int, dtype: Any, kind: Any = None) -> Own:
    """What a layer remembers before its first token; `lead` are the axes before its own: rows, and repeats before them in a cycle. kind: what keys and values are kept in, a dtype (None:
    `dtype`) or one of stored.QUANTIZED. Raises ConfigError where a head's numbers do not go in that."""
    segment = jnp.zeros(lead, jnp.int32)
    if isinstance(mixer, GatedDelta):
        shape = (*lead, mixer.width - 1)
        recent = jnp.zeros((*shape, mixer.key_heads, 2 * mixer.key_dim + mixer.heads // mixer.key_heads * mixer.value_dim), dtype), jnp.zeros(shape, jnp.int32)
        return State(jnp.zeros((*lead, mixer.heads, mixer.key_dim, mixer.value_dim), jnp.float32), segment, recent)
    if isinstance(mixer, Attention) and mixer.borrows:
        return None
    if isinstance(mixer, LinearAttention):
        return State(jnp.zeros((*lead, mixer.kv_heads, mixer.head_dim, mixer.head_dim + 1), jnp.float32), segment)
    widths = (mixer.latent + mixer.rope_dim, 0) if isinstance(mixer, LatentAttention) else (mixer.head_dim, mixer.head_dim)
    try:
        kinds = storage.QUANTIZED.get(kind, (kind or dtype,) * 2)
        return KeyValue(*(storage.empty((*lead, slots_of(mixer, length), mixer.kv_heads, width), k) for width, k in zip(widths, kinds)))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def init_cache(config: ModelConfig, batch: int, length: int, dtype: Any, kind: Any = None) -> Cache:
    """An empty cache for `length` positions of `batch` rows; dtype and kind: see empty_entry."""
    def one(layer, *lead):
        own = empty_entry(layer.mixer, (*lead, batch), length, dtype, kind)
        return WithSource(own, None) if layer.cross else own
    layers = {"prefix": tuple(one(x) for x in config.prefix), "cycle": tuple(one(x, config.repeats) for x in config.cycle), "suffix": tuple(one(x) for x in config.suffix)}
    return Cache(layers, {s: Slots(jnp.zeros((batch, s), jnp.int32), jnp.zeros((batch, s), jnp.int32)) for s in sorted(sizes_of(config, length))}, empty=True)


def grow_cache(config: ModelConfig, cache: Cache, length: int) -> Cache:
    """The same content with room for `length` positions. A ring that is full size already stays, and so does a state; what was kept by position gets more slots."""
    old = cache.length

    def wider(x, size, axis):
        return jnp.pad(x, [(0, size - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])

    def one(layer, kept, lead=0):
        if isinstance(kept, WithSource):
            return WithSource(one(layer, kept.own, lead), kept.source)
        if isinstance(kept, State):
            return kept
        return jax.tree.map(lambda x: wider(x, slots_of(layer.mixer, length), lead + 1), kept)
    layers = {part: tuple(one(layer, kept, int(part == "cycle")) for layer, kept in zip(getattr(config, part), cache.layers[part])) for part in cache.layers}
    slots = {new: Slots(wider(cache.slots[before].positions, new, 1), wider(cache.slots[before].segments, new, 1)) for new, before in sizes_of(config, length, old).items()}
    return dc.replace(cache, layers=layers, slots=slots)


def next_positions(cache: Cache, shape: tuple[int, ...]) -> jax.Array:
    """The positions that continue what each row holds. -> [B, T]"""
    slots = cache.slots[cache.length]
    start = jnp.max(jnp.where(slots.segments > 0, slots.positions + 1, 0), -1)
    return start[:, None] + jnp.arange(shape[1], dtype=jnp.int32)[None]


def plan(slots: Slots, positions: jax.Array, segments: jax.Array) -> Plan:
    """positions, segments [B, T] of the new tokens. A position goes to slot position mod S; padding and what a ring would overwrite at once go nowhere."""
    size = slots.positions.shape[1]
    used = segments > 0
    newest = jnp.max(jnp.where(used, positions, -1), -1, keepdims=True)
    index = jnp.where(used & (positions > newest - size), positions % size, size)
    rows = jnp.arange(positions.shape[0])[:, None]
    after = Slots(slots.positions.at[rows, index].set(positions, mode="drop"), slots.segments.at[rows, index].set(segments, mode="drop"))
    return Plan(index, slots, after)


def remember(stored: KeyValue, k: jax.Array, v: jax.Array, where: Plan) -> KeyValue:
    """The layer's keys and values with this call's k, v [B, T, K, H] written."""
    rows = jnp.arange(k.shape[0])[:, None]
    put: Any
    if k.shape[:2] == (1, 1):          # one token of one row: a slice update, which every backend does in place
        slot = where.index[0, 0]
        at = (0, jnp.minimum(slot, stored.k.shape[1] - 1), 0, 0)

        def put(old, new):
            new = jnp.where(slot < old.shape[1], new, jax.lax.dynamic_slice(old, at, new.shape))
            return jax.lax.dynamic_update_slice(old, new, at)
    else:
        def put(old, new):
            return old.at[rows, where.index].set(new, mode="drop")
    return KeyValue(*(jax.tree.map(put, old, storage.encode(old, new)) for old, new in ((stored.k, k), (stored.v, v))))
