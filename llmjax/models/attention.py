"""Attention with one head count for queries and a smaller or equal one for keys and values (MHA, GQA, MQA).

Legend: B batch, T query length, S key length, N query heads, K key/value heads, H head dim, D embed.
"""
from __future__ import annotations

import dataclasses as dc
import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.core import Compute, Layout, constrain, dot, dots, free_axes, partitioned, platform
from llmjax.core.model_config import MAX_CHUNKS, Attention, LatentAttention, Norm, Temperature
from llmjax.core.positions import Alibi, Disentangled, RelativeBuckets
from llmjax.kernels import attention as kernels
from llmjax.kernels.attention.stored import decode, encode, turn
from llmjax.models import rope as rotary
from llmjax.models.cache import Heavy, KeyValue, Plan, Pool, Sinks, remember
from llmjax.models.context import Context, Seen
from llmjax.models.evicting import hit, stream
from llmjax.models.module import Module, along, compact, vector, weight
from llmjax.models.norms import Normalize
from llmjax.models.paged import InPages, write
from llmjax.models.relative import disentangled

SLOTS, FEW = 128, 16          # on a CPU so many queries at most look at fewer slots than there are (over_used), at least at so many

Kept = KeyValue | Pool | Sinks | Heavy | None


class MultiHeadAttention(Module):
    """x [B, T, D] -> ([B, T, D], the layer's cache) and, where it lends them, the keys and values it saw."""
    spec: Attention
    norm: Norm
    compute: Compute
    layout: Layout

    @compact
    def __call__(self, x: jax.Array, context: Context, stored: Kept) -> tuple[jax.Array, Kept] | tuple[jax.Array, Kept, Seen | InPages]:
        a = self.spec
        names = ("q",) if a.borrows else ("q", "k") if a.shared_kv else ("q", "k", "v")
        q, *kv = (y if a.clip is None else jnp.clip(y, -a.clip, a.clip) for y in self.projected(x, *names))
        sinks = vector(self, "sinks", "heads", (a.heads,)) if a.sinks else None
        if isinstance(stored, Sinks | Heavy):
            y, stored = self.over_kept(q, kv, context, stored, sinks)
            return self.output(self.gated(y, x), x.shape[-1]), stored
        q = self.sharpened(self.turned("q_norm", q, context), context.places(q.shape[1]))
        q = constrain(q, "batch length heads .", self.layout.rules)
        if a.borrows:
            seen, bias = context.lent[a.borrows], None
        else:
            k, v = self.turned("k_norm", kv[0], context), self.values(kv[-1])
            k, v = (constrain(y, "batch length kv_heads .", self.layout.rules) for y in (k, v))
            bias = self.position_bias(q, k, context)
            k = turn(k) if context.turned else k
            seen, stored = look(k, v, context, stored, None if a.globals else a.window)
        with jax.named_scope("attend"):
            q = turn(q) if context.turned else q
            y = attend(q, seen, context, a, scale=self.scale(), sinks=sinks, bias=bias, slopes=None if a.alibi is None else slopes(a.alibi, a.heads),
                       compute=self.compute, layout=self.layout)
        y = self.output(self.gated(y, x), x.shape[-1])
        return (y, stored, seen) if a.lends else (y, stored)

    def over_kept(self, q: jax.Array, kv: list[jax.Array], context: Context, stored: Sinks | Heavy, sinks: jax.Array | None) -> tuple[jax.Array, Sinks | Heavy]:
        """Attention over a cache that gives keys up. q [B, T, N, H], kv: keys and values [B, T, K, H] as they were projected."""
        a, where, v = self.spec, context.eviction, self.values(kv[-1])
        assert where is not None
        settings: dict[str, Any] = dict(softcap=a.softcap, scale=self.scale(), sinks=sinks, slopes=None if a.alibi is None else slopes(a.alibi, a.heads))
        with jax.named_scope("attend"):
            if isinstance(stored, Heavy):
                q, k = self.turned("q_norm", q, context), self.turned("k_norm", kv[0], context)
                return hit(self.sharpened(q, context.places(q.shape[1])), k, v, stored, where, **settings)
            q, k = (self.normalized(name, x) if a.qk_norm else x for name, x in (("q_norm", q), ("k_norm", kv[0])))

            def rotate(x, places):
                return x if a.rope is None else rotary.rotate(x, rotary.tables(a.rope, a.head_dim, places), a.rope)
            return stream(self.sharpened(q, where.capped), k, v, stored, where, rotate, **settings)

    def sharpened(self, q: jax.Array, places: jax.Array) -> jax.Array:
        """Queries at places [B, T] times the layer's temperature, where it has one."""
        return q * sharpening(self.spec.temperature, places).astype(q.dtype) if self.spec.temperature else q

    def values(self, v: jax.Array) -> jax.Array:
        return v if self.spec.v_norm is None else Normalize(self.spec.v_norm, self.compute, name="v_norm")(v)

    def gated(self, y: jax.Array, x: jax.Array) -> jax.Array:
        """What heads answer, [B, T, N, H], times the gate that x [B, T, D] opens, where the layer has one."""
        return y * jax.nn.sigmoid(self.projected(x, "gate")[0].astype(jnp.float32)).astype(y.dtype) if self.spec.gate else y

    def turned(self, name: str, x: jax.Array, context: Context) -> jax.Array:
        """Queries or keys, rotated, and normed before or after that where the layer norms them."""
        a = self.spec
        if a.qk_norm and not a.qk_norm.rotated:
            x = self.normalized(name, x)
        x = context.rotate(x, a.rope)
        return self.normalized(name, x) if a.qk_norm and a.qk_norm.rotated else x

    def projected(self, x: jax.Array, *names: str, axis: str = "embed") -> list[jax.Array]:
        """x [B, T, D] through the projections of these names ("q", "k", "v") -> [B, T, heads, H] each; `axis` is what their label calls D."""
        a, D = self.spec, x.shape[-1]
        kinds = {name: ("heads", a.heads) if name in ("q", "gate") else ("kv_heads", a.kv_heads) for name in names}
        ys = dots("btd,dnh->btnh", x, [weight(self, name, f"{axis} -> {heads} head_dim", (D, n, a.head_dim)) for name, (heads, n) in kinds.items()])
        if a.qkv_bias:
            ys = [y + along(vector(self, f"{name}_bias", f"{heads} head_dim", (n, a.head_dim)), y) for y, (name, (heads, n)) in zip(ys, kinds.items())]
        return ys

    def output(self, y: jax.Array, D: int) -> jax.Array:
        """[B, T, N, H] -> [B, T, D]."""
        y = dot("btnh,nhd->btd", y, weight(self, "o", "heads head_dim -> embed", (*y.shape[2:], D)))
        return y + along(vector(self, "o_bias", "norm", (D,)), y) if self.spec.out_bias else y

    def position_bias(self, q: jax.Array, k: jax.Array, context: Context) -> jax.Array | None:
        """What relative positions add to the scores, [B or 1, N, T, S] float32: the stack's own table of it, or DeBERTa's terms out of this layer's queries and keys."""
        spec, distances = self.spec.relative, context.relative
        if spec is None:
            return None
        assert distances is not None
        if isinstance(spec, RelativeBuckets):
            return distances.bias
        assert distances.rows is not None
        rows = distances.rows[None].astype(q.dtype)                                      # [1, P, D]
        wanted = {"q": spec.position_to_content, "k": spec.content_to_position}
        if spec.shared:                                      # the layer's own projections, as they lie: they may be joined, that of values with them
            made = dict(zip("qkv", self.projected(rows, "q", "k", "v")))
        else:
            made = {name: self.projected(rows, f"position_{name}")[0] for name in wanted if wanted[name]}
        pq, pk = (made[name][0] if wanted[name] else None for name in wanted)
        return disentangled(q, k, pq, pk, distances, self.scale())

    def scale(self) -> float:
        a = self.spec
        terms = a.relative.terms if isinstance(a.relative, Disentangled) else 1
        return (terms * a.head_dim) ** -0.5 if a.scale is None else a.scale

    def normalized(self, name: str, x: jax.Array) -> jax.Array:
        spec = self.spec.qk_norm
        assert spec is not None
        norm = Normalize(spec.norm, self.compute, each=spec.over == "each", name=name)
        return norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape) if spec.over == "full" else norm(x)


class CrossAttention(MultiHeadAttention):
    """x [B, T, D] attends to an encoder's output: context.source [B, S, D], or its keys and values in the cache -> ([B, T, D], those keys and values)."""

    @compact
    def __call__(self, x: jax.Array, context: Context, stored: Kept) -> tuple[jax.Array, KeyValue]:
        q, = self.projected(x, "q")
        if context.source is not None:
            stored = KeyValue(*self.projected(context.source, "k", "v", axis="source"))
        assert isinstance(stored, KeyValue)
        k, v = (decode(x, q.dtype).astype(q.dtype) for x in (stored.k, stored.v))
        mine = jnp.ones(q.shape[:2], jnp.int32) if context.segments is None and context.source_segments is not None else context.segments
        with jax.named_scope("attend"):
            own = dc.replace(context, positions=None, prefix=None, segments=mine)
            seen = Seen(k, v, None, context.source_segments, False)
            y = attend(q, seen, own, dc.replace(self.spec, causal=False, window=None), scale=self.scale(), compute=self.compute, layout=self.layout)
        return self.output(y, x.shape[-1]), stored


def sharpening(spec: Temperature, positions: jax.Array) -> jax.Array:
    """What queries at positions [B, T] are multiplied by: float32 [B, T, 1, 1]."""
    return (1.0 + spec.beta * jnp.log1p(jnp.floor((positions + spec.offset).astype(jnp.float32) / spec.length)))[..., None, None]


def slopes(spec: Alibi, heads: int) -> jax.Array:
    """ALiBi's slope of each head, float32 [N]; heads beyond a power of two take every other slope of twice as many (arXiv:2108.12409, section 3, and its published code)."""
    whole = 2 ** math.floor(math.log2(heads))
    exponents = [*(np.arange(1, whole + 1) / whole), *(np.arange(1, 2 * (heads - whole) + 1, 2) / (2 * whole))]
    values = jnp.asarray(2.0 ** (-spec.max_bias * np.array(exponents)), jnp.float32)
    return (values.astype(jnp.bfloat16).astype(jnp.float32) if spec.rounded else values) * spec.scale


def look(k: jax.Array, v: jax.Array, context: Context, stored: Kept, window: int | None) -> tuple[Seen | InPages, Kept]:
    """-> (what this call's queries may look at, the layer's cache with k and v in it): the call's own keys, or the cache's, or (a ring that this call would overwrite) both."""
    mine = Seen(k, v, context.positions, context.segments, True)
    if stored is None:
        return mine, None
    if isinstance(stored, Pool):
        assert context.paging is not None
        stored = write(stored, k, v, context.paging.index)
        return InPages(stored.k, stored.v), stored
    assert isinstance(stored, KeyValue)
    place: Plan = context.plans[stored.k.shape[1]]
    old, stored = stored, remember(stored, k, v, place)
    if context.empty and k.shape[1] > 1:
        return mine, stored
    if k.shape[1] == 1 or not window or old.k.shape[1] > window:
        return Seen(stored.k, stored.v, place.after.positions, place.after.segments, False, by_slot=True), stored
    segments = jnp.ones(k.shape[:2], jnp.int32) if context.segments is None else context.segments
    past = ((decode(x, y.dtype), decode(encode(x, y), y.dtype)) for x, y in ((old.k, k), (old.v, v)))          # what is kept in 8 bits is seen so, wherever it stands
    pairs: tuple[Any, ...] = (*past, (place.before.positions, context.positions), (place.before.segments, segments))
    keys, values, positions, known = (jnp.concatenate([x, y.astype(x.dtype)], 1) for x, y in pairs)
    return Seen(keys, values, positions, known, False), stored


def attend(q: jax.Array, seen: Seen | InPages, context: Context, spec: Attention | LatentAttention, *, scale: float, compute: Compute, layout: Layout,
           sinks: jax.Array | None = None, slopes: jax.Array | None = None, bias: jax.Array | None = None) -> jax.Array:
    """q [B, T, N, H] over what it sees -> [B, T, N, Hv], by the implementation that `Compute.attention` means here, on each device's own rows and heads where the mesh divides them."""
    if isinstance(seen, InPages):
        assert context.paging is not None
        newest = context.reach(q.shape[1])
        assert newest is not None
        rule = kernels.Rule(chunk=spec.window) if spec.chunked else kernels.Rule(spec.window, globals=spec.globals)
        return kernels.paged(q, seen.k, seen.v, context.paging.table, newest, context.paging.used, rule=rule, softcap=spec.softcap, scale=scale, sinks=sinks, slopes=slopes, width=seen.width)
    segments, in_order = context.segments, seen.in_order and context.prefix is None
    if not seen.in_order and segments is None:
        segments = jnp.ones(q.shape[:2], jnp.int32)
    few = compute.attention == "auto" and seen.by_slot and bias is None and spec.globals is None and kernels.fits(q, seen.k, seen.v, width=seen.width, softcap=spec.softcap, slopes=slopes)
    if not few and seen.by_slot and bias is None and spec.causal and q.shape[1] <= FEW and platform() == "cpu" and not partitioned():
        reach = context.reach(q.shape[1])
        assert segments is not None and reach is not None
        newest = jnp.max(jnp.where(segments > 0, reach, -1))
        again = functools.partial(attend, spec=spec, scale=scale, compute=compute, layout=layout, sinks=sinks, slopes=slopes)
        return over_used(lambda part: again(q, dc.replace(part, by_slot=False), context), seen, newest)
    where: dict[str, Any] = dict(query_positions=context.reach(q.shape[1]), query_segments=segments, key_positions=seen.positions, key_segments=seen.segments)
    if spec.chunked:
        assert spec.window
        for side, length in (("query", q.shape[1]), ("key", seen.k.shape[1])):
            where[f"{side}_segments"] = chunks(where[f"{side}_segments"], where[f"{side}_positions"], length, spec.window)
    if few:
        tell("few", "the CPU's, over a cache")
        return kernels.few(q, seen.k, seen.v, **where, causal=spec.causal, window=spec.window, scale=scale, sinks=sinks, width=seen.width)
    k, v = decode(seen.k, q.dtype), decode(seen.v, q.dtype)
    seen = dc.replace(seen, k=k, v=v if seen.width is None else k[..., :seen.width])
    settings: dict[str, Any] = dict(causal=spec.causal, in_order=in_order, window=spec.window, softcap=spec.softcap)
    if spec.globals is not None:
        return kernels.sparse(q, seen.k, seen.v, **where, **settings, globals=spec.globals, scale=scale)
    settings |= dict(sinks=sinks, slopes=slopes)
    _, batch, rows = free_axes("batch", layout.rules)
    _, heads, columns = free_axes("heads", layout.rules)
    _, cuts, parts = free_axes("length", layout.rules)
    across = context.across if in_order and bias is None else None
    whole = q if across is None else jax.ShapeDtypeStruct((q.shape[0], q.shape[1], q.shape[2] // columns // parts, q.shape[3]), q.dtype)
    name, reason = kernels.choose(platform(), compute.attention, whole, seen.v, segments=where["query_segments"] is not None, bias=bias is not None, **settings)
    implementation = kernels.IMPLEMENTATIONS[name]
    tell(name if across is None else f"{across} over {parts} parts of a row" + (f", {name} in each" if across == "ulysses" else ""), reason)
    if across == "ring":
        implementation = functools.partial(kernels.ring, axis=cuts, zigzag=context.zigzag)
    elif across == "ulysses":
        implementation = functools.partial(kernels.ulysses, implementation, axis=cuts)
    if bias is not None:          # `reference`, which the compiler partitions by itself
        return implementation(q, seen.k, seen.v, **where, **settings, scale=scale, bias=bias)
    K = seen.k.shape[2]
    inside = bool(jax.sharding.get_abstract_mesh().manual_axes)          # of a pipeline's stage: no automatic axis may be left around a kernel
    if across or ((rows * columns > 1 or inside) and q.shape[0] % rows == 0 and q.shape[2] % columns == 0 and (K % columns == 0 or columns % K == 0)):
        implementation = kernels.sharded(implementation, batch=batch, heads=heads, length=cuts if across else ())
    elif not seen.in_order and kernels.pays(q, seen.k):
        implementation = functools.partial(kernels.merged, implementation)
    return implementation(q, seen.k, seen.v, **where, **settings, scale=scale)


def over_used(attention: Callable[[Seen], jax.Array], seen: Seen, newest: jax.Array) -> jax.Array:
    """`attention` over so many of the slots, SLOTS times a power of two of them or all, as hold every position up to `newest` [] (a ring that has come round: all); zeros where that is
    none. The others are empty or not yet to be seen, so the answer is the same; a CPU, which computes scores far below its memory's speed, is done in a share of the time. Slots are
    copied where not all are taken, so at most a quarter of them is. The branches also keep XLA from writing a step's token twice, into the cache and into the shape that attention reads."""
    size = seen.k.shape[1]
    counts = [SLOTS << i for i in range((size - 1).bit_length()) if SLOTS << i <= size // 4]
    some = [lambda count=count: attention(seen.first(count)) for count in counts]
    answer = jax.eval_shape(lambda: attention(seen))
    return jax.lax.switch(jnp.sum(newest >= jnp.asarray([0, *counts])), [lambda: jnp.zeros(answer.shape, answer.dtype), *some, lambda: attention(seen)])


def chunks(segments: jax.Array | None, positions: jax.Array | None, length: int, chunk: int) -> jax.Array:
    """Segment ids [B, T] that differ from chunk to chunk of a segment: chunked attention is attention in these segments (and in a window, which lets kernels skip the rest)."""
    positions = jnp.arange(length, dtype=jnp.int32)[None] if positions is None else positions
    segments = jnp.ones_like(positions) if segments is None else segments
    return jnp.where(segments > 0, segments * MAX_CHUNKS + positions // chunk, 0)


@functools.cache
def tell(name: str, reason: str) -> None:
    """Says once per process which attention runs and why."""
    logging.getLogger("llmjax").info("attention: %s (%s)", name, reason)
