"""Caches that hold a fixed number of tokens of a text without end: attention sinks with a recent window, and heavy hitters.

- `Streaming` (StreamingLLM: Xiao et al. 2023, arXiv:2309.17453, section 3.2): the first `sinks` tokens and the `window` newest. Distances are those within the cache, not within the text:
  keys are kept unrotated and turned by their place in the cache in every call, so no number grows with the text.
- `HeavyHitters` (H2O: Zhang et al. 2023, arXiv:2306.14048, algorithm 1): the `recent` newest tokens and, of those before, per layer and key/value head the `heavy` ones that have received
  the most attention so far, summed over queries (and over the query heads of a group). Keys keep the positions of the text.

Streaming is the same rule token by token however a text is cut into calls. Heavy hitters are chosen at the end of a call: tokens of one call see each other and all that was kept before
it, as in the paper's treatment of a prompt; fed one by one it is the paper's algorithm. Layers with a window keep their rings, recurrent layers their states.

Legend: B rows, T tokens of this call, S slots, N query heads, K key/value heads, H head dim.
"""
from __future__ import annotations

import dataclasses as dc
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from llmjax.core.errors import ConfigError
from llmjax.core.model_config import Attention, LatentAttention, Layer, ModelConfig
from llmjax.core.positions import DynamicNtk, LongRope
from llmjax.kernels.attention.weighed import Part, weighed
from llmjax.models.cache import Cache, Heavy, Sinks, Slots, empty_entry, slots_of


@dc.dataclass(frozen=True)
class Streaming:
    """The first `sinks` tokens of a text and the `window` newest."""
    sinks: int = 4
    window: int = 1020

    @property
    def size(self) -> int:
        return self.sinks + self.window


@dc.dataclass(frozen=True)
class HeavyHitters:
    """The `recent` newest tokens, and per layer and head the `heavy` earlier ones that received the most attention."""
    heavy: int = 512
    recent: int = 512

    @property
    def size(self) -> int:
        return self.heavy + self.recent


Policy = Streaming | HeavyHitters


def init_evicting(config: ModelConfig, batch: int, policy: Policy, dtype: Any) -> Cache:
    """An empty cache of `policy.size` tokens for `batch` rows. Raises ConfigError for numbers out of range and for models whose attention has no such rule."""
    low = {"sinks": 0, "heavy": 0, "window": 1, "recent": 1}
    for name, value in dc.asdict(policy).items():
        if not isinstance(value, int) or value < low[name]:
            raise ConfigError(f"{type(policy).__name__}: {name}={value!r}; a whole number from {low[name]} is wanted")
    if config.encoder or config.learned_positions:
        raise ConfigError(f"an evicting cache: a model with {'an encoder' if config.encoder else 'learned positions'} has no text without end; use init_cache")

    def one(layer: Layer, lead: tuple[int, ...]) -> Any:
        mixer = layer.mixer
        if not isinstance(mixer, Attention | LatentAttention) or (mixer.window is not None and not mixer.globals):
            return empty_entry(mixer, (*lead, batch), policy.size, dtype)
        check(mixer, policy)
        shape = (*lead, batch, policy.size, mixer.kv_heads)
        k, v = (jnp.zeros((*shape, mixer.head_dim), dtype) for _ in range(2))
        return Sinks(k, v) if isinstance(policy, Streaming) else Heavy(k, v, jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32))
    layers = {part: tuple(one(layer, (config.repeats,) if part == "cycle" else ()) for layer in getattr(config, part)) for part in ("prefix", "cycle", "suffix")}
    rings = {slots_of(x.mixer, policy.size) for x in config.layers if isinstance(x.mixer, Attention | LatentAttention) and x.mixer.window is not None}
    blank = lambda size: Slots(jnp.zeros((batch, size), jnp.int32), jnp.zeros((batch, size), jnp.int32))
    return Cache(layers, {size: blank(size) for size in sorted(rings)}, policy=policy, kept=blank(policy.size) if isinstance(policy, Streaming) else None)


def check(mixer: Attention | LatentAttention, policy: Policy) -> None:
    """Raises ConfigError for attention of which the rule says nothing."""
    why = None
    if isinstance(mixer, LatentAttention):
        why = "latent attention"
    elif mixer.globals or mixer.relative or not mixer.causal:
        why = "global tokens, relative positions and bidirectional attention"
    elif mixer.lends or mixer.borrows:
        why = "layers that lend or borrow keys"
    elif isinstance(policy, Streaming) and ((mixer.qk_norm and mixer.qk_norm.rotated) or isinstance(mixer.rope and mixer.rope.scaling, DynamicNtk | LongRope)):
        why = "norms after the rotation and rotations that depend on the text's length"
    if why:
        raise ConfigError(f"{type(policy).__name__} has no rule for {why}; use init_cache")


@register_dataclass
@dc.dataclass(frozen=True)
class Eviction:
    """What all layers share of one call. positions, segments [B, T], used bool [B, T]: of its tokens; newest [B]: the newest position (-1: none); index [B, T]: a streaming cache's slot
    of each (S: nowhere); before, after: its slots; shift [B]: how far the newest token's place in the cache lies before its place in the text; policy: the rule."""
    positions: jax.Array
    segments: jax.Array
    used: jax.Array
    newest: jax.Array
    shift: jax.Array
    index: jax.Array | None
    before: Slots | None
    after: Slots | None
    policy: Policy = dc.field(metadata=dict(static=True))

    @property
    def capped(self) -> jax.Array:
        """The place of each token in a streaming cache as it is when the token comes, [B, T]."""
        return jnp.minimum(self.positions, self.policy.size - 1)

    def within(self, positions: jax.Array) -> jax.Array:
        """Where tokens at `positions` [B, …] of the text stand in the streaming cache of the newest token: sinks at their own place, others moved by `shift`."""
        moved = positions - self.shift[:, None]
        return jnp.where(positions < self.policy.sinks, positions, moved) if isinstance(self.policy, Streaming) else positions


def evict(cache: Cache, positions: jax.Array, segments: jax.Array) -> Eviction:
    """Where this call's tokens at positions [B, T] go."""
    assert cache.policy is not None
    used, policy = segments > 0, cache.policy
    newest = jnp.max(jnp.where(used, positions, -1), 1)
    shift = jnp.maximum(newest + 1 - policy.size, 0)
    if not isinstance(policy, Streaming) or cache.kept is None:
        return Eviction(positions, segments, used, newest, shift, None, None, None, policy)
    slot = jnp.where(positions < policy.sinks, positions, policy.sinks + (positions - policy.sinks) % policy.window)
    stays = used & ((positions < policy.sinks) | (positions > newest[:, None] - policy.window))
    index, rows, old = jnp.where(stays, slot, policy.size), jnp.arange(len(positions))[:, None], cache.kept
    after = Slots(old.positions.at[rows, index].set(positions, mode="drop"), old.segments.at[rows, index].set(segments, mode="drop"))
    return Eviction(positions, segments, used, newest, shift, index, old, after, policy)


def stream(q: jax.Array, k: jax.Array, v: jax.Array, stored: Sinks, where: Eviction, rotate: Any, **settings: Any) -> tuple[jax.Array, Sinks]:
    """q [B, T, N, H], k, v [B, T, K, H] before any rotation; rotate(x, places [B, T]) turns them. -> ([B, T, N, H], the layer's cache). settings: of `weighed`."""
    policy = where.policy
    assert isinstance(policy, Streaming) and where.before is not None and where.after is not None
    rows, T = jnp.arange(q.shape[0])[:, None], q.shape[1]
    new = Sinks(*(old.at[rows, where.index].set(x.astype(old.dtype), mode="drop") for old, x in ((stored.k, k), (stored.v, v))))

    def part(places: jax.Array, kept: Sinks, slots: Slots, sinks: bool, others: bool) -> Part:
        """Those of the kept keys that are sinks or others, or both, before queries at `places` [B, T] of the cache."""
        mine, theirs, at = where.positions[:, :, None], slots.positions[:, None, :], where.within(slots.positions)
        see = (theirs <= mine) & (where.segments[:, :, None] == slots.segments[:, None, :]) & (slots.segments > 0)[:, None, :]
        first = theirs < policy.sinks
        see = see & ((first & sinks) | (~first & others & (mine - theirs < policy.window)))
        return Part(rotate(q, places), rotate(kept.k.astype(q.dtype), at), kept.v, see[:, None], (places[:, :, None] - at[:, None, :])[:, None])
    if T == 1:
        return weighed([part(where.capped, new, where.after, True, True)], **settings)[0], new
    # several queries, each with a cache of its own: others stand at one distance in all of them, sinks at another in each
    behind, own = where.positions - where.shift[:, None], (Sinks(k, v), Slots(where.positions, where.segments))
    held = [(behind, stored, where.before, False, True), (behind, *own, False, True)]
    if policy.sinks:
        ahead = jax.tree.map(lambda x: x[:, :policy.sinks], (stored, where.before))                      # the first slots are theirs
        held += [(where.capped, *ahead, True, False), (where.capped, *own, True, False)]
    return weighed([part(*each) for each in held], **settings)[0], new


def hit(q: jax.Array, k: jax.Array, v: jax.Array, stored: Heavy, where: Eviction, **settings: Any) -> tuple[jax.Array, Heavy]:
    """q [B, T, N, H], k, v [B, T, K, H], rotated by their places in the text. -> ([B, T, N, H], the layer's cache). A position 0 begins another text. settings: of `weighed`."""
    policy, (B, T), (S, K) = where.policy, q.shape[:2], stored.k.shape[1:3]
    assert isinstance(policy, HeavyHitters)
    starts = (where.used & (where.positions == 0)).any(1)[:, None, None]
    held, mass = jnp.where(starts, -1, stored.positions), jnp.where(starts, 0.0, stored.mass)
    mine = jnp.broadcast_to(jnp.where(where.used, where.positions, -1)[:, :, None], (B, T, K))

    def part(keys, values, positions):
        positions = positions.swapaxes(1, 2)[:, :, None]                                             # [B, K, 1, S]
        asked = where.positions[:, None, :, None]
        return Part(q, keys, values, (positions >= 0) & (positions <= asked) & where.used[:, None, :, None], asked - positions)
    out, probs = weighed([part(stored.k, stored.v, held), part(k, v, mine)], **settings)
    received = [p.sum((2, 3)).swapaxes(1, 2) for p in probs]                                          # [B, S, K], [B, T, K]

    def worth(positions, mass):
        """What is kept first: the newest, then the heaviest; empty slots last."""
        return jnp.where(positions < 0, -jnp.inf, jnp.where(positions > where.newest[:, None, None] - policy.recent, jnp.inf, mass))
    new = Heavy(k.astype(stored.k.dtype), v.astype(stored.v.dtype), mine, received[1])
    before = Heavy(stored.k, stored.v, held, mass + received[0])
    if T == 1:                                                                                        # one slot a head changes hands
        slot = jnp.where(where.used, jnp.argmin(worth(held, before.mass), 1), S)[:, None]                    # [B, 1, K]
        rows, heads = jnp.arange(B)[:, None, None], jnp.arange(K)[None, None]
        return out, jax.tree.map(lambda old, x: old.at[rows, slot, heads].set(x, mode="drop"), before, new)
    both = jax.tree.map(lambda old, x: jnp.concatenate([old, x], 1), before, new)
    _, best = jax.lax.top_k(worth(both.positions, both.mass).swapaxes(1, 2), S)                       # [B, K, S]
    best = best.swapaxes(1, 2)
    return out, jax.tree.map(lambda x: jnp.take_along_axis(x, best.reshape(*best.shape, *(1,) * (x.ndim - 3)), 1), both)
