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
from llmjax.core.model_config import Attention, Norm
from llmjax.kernels import attention as kernels
from llmjax.models.cache import KeyValue, Plan, remember
from llmjax.models.context import Context
from llmjax.models.module import Module, along, compact, vector, weight
from llmjax.models.norms import Normalize


class MultiHeadAttention(Module):
    """x [B, T, D] -> ([B, T, D], the layer's cache)."""
    spec: Attention
    norm: Norm
    compute: Compute
    layout: Layout

    @compact
    def __call__(self, x: jax.Array, context: Context, stored: KeyValue | None) -> tuple[jax.Array, KeyValue | None]:
        a, (D, N, K, H) = self.spec, (x.shape[-1], self.spec.heads, self.spec.kv_heads, self.spec.head_dim)
        q, k, v = dots("btd,dnh->btnh", x, [weight(self, name, f"embed -> {heads} head_dim", (D, n, H)) for name, heads, n in (("q", "heads", N), ("k", "kv_heads", K), ("v", "kv_heads", K))])
        if a.qkv_bias:
            q = q + along(vector(self, "q_bias", "heads head_dim", (N, H)), q)
            k = k + along(vector(self, "k_bias", "kv_heads head_dim", (K, H)), k)
            v = v + along(vector(self, "v_bias", "kv_heads head_dim", (K, H)), v)
        if a.qk_norm:
            q, k = self.normalized("q_norm", q), self.normalized("k_norm", k)
        q, k = context.rotate(q, a.rope), context.rotate(k, a.rope)
        q, k, v = (constrain(y, f"batch length {heads} .", self.layout.rules) for y, heads in ((q, "heads"), (k, "kv_heads"), (v, "kv_heads")))
        sinks = vector(self, "sinks", "heads", (N,)) if a.sinks else None
        with jax.named_scope("attend"):
            y, stored = self.attend(q, k, v, sinks, context, stored)
        y = dot("btnh,nhd->btd", y, weight(self, "o", "heads head_dim -> embed", (N, H, D)))
        if a.out_bias:
            y = y + along(vector(self, "o_bias", "norm", (D,)), y)
        return y, stored

    def normalized(self, name: str, x: jax.Array) -> jax.Array:
        spec = self.spec.qk_norm
        assert spec is not None
        norm = Normalize(spec.norm, self.compute, name=name)
        return norm(x) if spec.over == "head" else norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)

    def attend(self, q, k, v, sinks, context: Context, stored: KeyValue | None):
        """What the queries may look at: this call's own keys, or those of the cache, or (a ring that this call would overwrite) both."""
        a = self.spec
        numbers = dict(causal=a.causal, window=a.window, softcap=a.softcap, scale=a.head_dim ** -0.5 if a.scale is None else a.scale, sinks=sinks)
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

    def kernel(self, q, k, v, *, sinks, **settings) -> jax.Array:
        """The implementation that `Compute.attention` means here, on each device's own rows and heads where the mesh divides them."""
        name, reason = kernels.choose(platform(), self.compute.attention, q, v, causal=settings["causal"], in_order=settings["in_order"], window=settings["window"],
                                      softcap=settings["softcap"], sinks=sinks, segments=settings["query_segments"] is not None)
        tell(name, reason)
        implementation = kernels.IMPLEMENTATIONS[name]
        table, mesh = dict(reversed(self.layout.rules)), jax.sharding.get_abstract_mesh()
        batch, heads = (tuple(a for a in mesh_axes(table[axis]) if not mesh.empty and mesh.shape[a] > 1) for axis in ("batch", "heads"))
        rows, columns = (math.prod(mesh.shape[a] for a in axes) for axes in (batch, heads))
        if rows * columns > 1 and q.shape[0] % rows == 0 and q.shape[2] % columns == 0 and (k.shape[2] % columns == 0 or columns % k.shape[2] == 0):
            implementation = kernels.sharded(implementation, batch=batch, heads=heads)
        return implementation(q, k, v, sinks=sinks, **settings)


@functools.cache
def tell(name: str, reason: str) -> None:
    """Says once per process which attention runs and why."""
    logging.getLogger("llmjax").info("attention: %s (%s)", name, reason)
