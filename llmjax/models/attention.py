"""Attention with one head count for queries and a smaller or equal one for keys and values (MHA, GQA, MQA).

Legend: B batch, T query length, S key length, N query heads, K key/value heads, H head dim, D embed.
"""
from __future__ import annotations

import functools
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp

from llmjax.core import Compute, Layout, constrain, dot, dots, platform
from llmjax.core.mesh import mesh_axes
from llmjax.core.model_config import Attention, Disentangled, Norm, RelativeBuckets
from llmjax.kernels import attention as kernels
from llmjax.models.cache import KeyValue, Plan, remember
from llmjax.models.context import Context
from llmjax.models.module import Module, along, compact, vector, weight
from llmjax.models.norms import Normalize
from llmjax.models.relative import disentangled


class MultiHeadAttention(Module):
    """x [B, T, D] -> ([B, T, D], the layer's cache)."""
    spec: Attention
    norm: Norm
    compute: Compute
    layout: Layout

    @compact
    def __call__(self, x: jax.Array, context: Context, stored: KeyValue | None) -> tuple[jax.Array, KeyValue | None]:
        a = self.spec
        q, k, v = self.projected(x, "q", "k", "v")
        if a.qk_norm:
            q, k = self.normalized("q_norm", q), self.normalized("k_norm", k)
        q, k = context.rotate(q, a.rope), context.rotate(k, a.rope)
        q, k, v = (constrain(y, f"batch length {heads} .", self.layout.rules) for y, heads in ((q, "heads"), (k, "kv_heads"), (v, "kv_heads")))
        sinks = vector(self, "sinks", "heads", (a.heads,)) if a.sinks else None
        bias = self.position_bias(q, k, context)
        with jax.named_scope("attend"):
            y, stored = self.attend(q, k, v, sinks, bias, context, stored)
        return self.output(y, x.shape[-1]), stored

    def projected(self, x: jax.Array, *names: str, axis: str = "embed") -> list[jax.Array]:
        """x [B, T, D] through the projections of these names ("q", "k", "v") -> [B, T, heads, H] each; `axis` is what their label calls D."""
        a, D = self.spec, x.shape[-1]
        kinds = {name: ("heads", a.heads) if name == "q" else ("kv_heads", a.kv_heads) for name in names}
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
        pq, pk = (None if not wanted else self.projected(rows, name if spec.shared else f"position_{name}")[0][0]
                  for name, wanted in (("q", spec.position_to_content), ("k", spec.content_to_position)))
        return disentangled(q, k, pq, pk, distances, self.scale())

    def scale(self) -> float:
        a = self.spec
        terms = a.relative.terms if isinstance(a.relative, Disentangled) else 1
        return (terms * a.head_dim) ** -0.5 if a.scale is None else a.scale

    def normalized(self, name: str, x: jax.Array) -> jax.Array:
        spec = self.spec.qk_norm
        assert spec is not None
        norm = Normalize(spec.norm, self.compute, name=name)
        return norm(x) if spec.over == "head" else norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)

    def attend(self, q, k, v, sinks, bias, context: Context, stored: KeyValue | None):
        """What the queries may look at: this call's own keys, or those of the cache, or (a ring that this call would overwrite) both."""
        a = self.spec
        numbers = dict(causal=a.causal, window=a.window, softcap=a.softcap, scale=self.scale(), sinks=sinks, bias=bias)
        mine = dict(query_positions=context.positions, query_segments=context.segments)
        place: Plan | None = None
        seen: tuple[Any, ...]
        if stored is not None:
            place = context.plans[stored.k.shape[1]]
            old, stored = stored, remember(stored, k, v, place)
        if stored is None or place is None or (context.empty and q.shape[1] > 1):
            seen = (k, v, context.positions, context.segments)
        elif q.shape[1] == 1 or not a.window or old.k.shape[1] > a.window:
            seen = (stored.k, stored.v, place.after.positions, place.after.segments)
        else:
            segments = jnp.ones(q.shape[:2], jnp.int32) if context.segments is None else context.segments
            pairs: tuple[Any, ...] = ((old.k, k), (old.v, v), (place.before.positions, context.positions), (place.before.segments, segments))
            seen = tuple(jnp.concatenate([x, y.astype(x.dtype)], 1) for x, y in pairs)
        alone = seen[0] is k
        if not alone and mine["query_segments"] is None:
            mine["query_segments"] = jnp.ones(q.shape[:2], jnp.int32)
        y = self.kernel(q, seen[0], seen[1], **mine, key_positions=seen[2], key_segments=seen[3], in_order=alone, **numbers)
        return y, stored

    def kernel(self, q, k, v, *, sinks, bias=None, **settings) -> jax.Array:
        """The implementation that `Compute.attention` means here, on each device's own rows and heads where the mesh divides them."""
        name, reason = kernels.choose(platform(), self.compute.attention, q, v, causal=settings["causal"], in_order=settings["in_order"], window=settings["window"],
                                      softcap=settings["softcap"], sinks=sinks, segments=settings["query_segments"] is not None, bias=bias is not None)
        tell(name, reason)
        implementation = kernels.IMPLEMENTATIONS[name]
        if bias is not None:          # `reference`, which the compiler partitions by itself
            return implementation(q, k, v, sinks=sinks, bias=bias, **settings)
        table, mesh = dict(reversed(self.layout.rules)), jax.sharding.get_abstract_mesh()
        batch, heads = (tuple(a for a in mesh_axes(table[axis]) if not mesh.empty and mesh.shape[a] > 1) for axis in ("batch", "heads"))
        rows, columns = (math.prod(mesh.shape[a] for a in axes) for axes in (batch, heads))
        if rows * columns > 1 and q.shape[0] % rows == 0 and q.shape[2] % columns == 0 and (k.shape[2] % columns == 0 or columns % k.shape[2] == 0):
            implementation = kernels.sharded(implementation, batch=batch, heads=heads)
        return implementation(q, k, v, sinks=sinks, **settings)


class CrossAttention(MultiHeadAttention):
    """x [B, T, D] attends to an encoder's output: context.source [B, S, D], or its keys and values in the cache -> ([B, T, D], those keys and values)."""

    @compact
    def __call__(self, x: jax.Array, context: Context, stored: KeyValue | None) -> tuple[jax.Array, KeyValue | None]:
        q, = self.projected(x, "q")
        if context.source is not None:
            stored = KeyValue(*self.projected(context.source, "k", "v", axis="source"))
        assert stored is not None
        k, v = stored.k.astype(q.dtype), stored.v.astype(q.dtype)
        mine = jnp.ones(q.shape[:2], jnp.int32) if context.segments is None and context.source_segments is not None else context.segments
        with jax.named_scope("attend"):
            y = self.kernel(q, k, v, causal=False, in_order=False, window=None, softcap=None, scale=self.scale(), sinks=None,
                            query_positions=None, key_positions=None, query_segments=mine, key_segments=context.source_segments)
        return self.output(y, x.shape[-1]), stored


@functools.cache
def tell(name: str, reason: str) -> None:
    """Says once per process which attention runs and why."""
    logging.getLogger("llmjax").info("attention: %s (%s)", name, reason)
