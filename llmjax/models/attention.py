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
from llmjax.models.context import Context, Seen
from llmjax.models.module import Module, along, compact, vector, weight
from llmjax.models.norms import Normalize


class MultiHeadAttention(Module):
    """x [B, T, D] -> ([B, T, D], the layer's cache) and, where it lends them, the keys and values it saw."""
    spec: Attention
    norm: Norm
    compute: Compute
    layout: Layout

    @compact
    def __call__(self, x: jax.Array, context: Context, stored: KeyValue | None) -> tuple[jax.Array, KeyValue | None] | tuple[jax.Array, KeyValue | None, Seen]:
        a, (D, N, K, H) = self.spec, (x.shape[-1], self.spec.heads, self.spec.kv_heads, self.spec.head_dim)
        kinds = dict(q=("heads", N)) | ({} if a.borrows else dict(k=("kv_heads", K))) | ({} if a.borrows or a.shared_kv else dict(v=("kv_heads", K)))
        made = dict(zip(kinds, dots("btd,dnh->btnh", x, [weight(self, name, f"embed -> {heads} head_dim", (D, n, H)) for name, (heads, n) in kinds.items()])))
        if a.qkv_bias:
            made = {name: y + along(vector(self, f"{name}_bias", f"{kinds[name][0]} head_dim", (kinds[name][1], H)), y) for name, y in made.items()}
        if a.shared_kv and not a.borrows:
            made["v"] = made["k"]
        for name in made:
            if name == "v":
                made[name] = made[name] if a.v_norm is None else Normalize(a.v_norm, self.compute, name="v_norm")(made[name])
            else:
                made[name] = context.rotate(self.normalized(f"{name}_norm", made[name]) if a.qk_norm else made[name], a.rope)
            made[name] = constrain(made[name], f"batch length {'heads' if name == 'q' else 'kv_heads'} .", self.layout.rules)
        sinks = vector(self, "sinks", "heads", (N,)) if a.sinks else None
        with jax.named_scope("attend"):
            seen, stored = (context.lent[a.borrows], None) if a.borrows else self.look(made["k"], made["v"], context, stored)
            y = self.attend(made["q"], seen, sinks, context)
        if a.gate:
            g = dot("btd,dnh->btnh", x, weight(self, "gate", "embed -> heads head_dim", (D, N, H)), out_dtype=jnp.float32)
            if a.qkv_bias:
                g = g + along(vector(self, "gate_bias", "heads head_dim", (N, H)), g)
            y = y * jax.nn.sigmoid(g).astype(y.dtype)
        y = dot("btnh,nhd->btd", y, weight(self, "o", "heads head_dim -> embed", (N, H, D)))
        if a.out_bias:
            y = y + along(vector(self, "o_bias", "norm", (D,)), y)
        return (y, stored, seen) if a.lends else (y, stored)

    def normalized(self, name: str, x: jax.Array) -> jax.Array:
        spec = self.spec.qk_norm
        assert spec is not None
        norm = Normalize(spec.norm, self.compute, name=name)
        return norm(x) if spec.over == "head" else norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)

    def look(self, k, v, context: Context, stored: KeyValue | None) -> tuple[Seen, KeyValue | None]:
        """What the queries may look at: this call's own keys, or those of the cache, or (a ring that this call would overwrite) both; and the cache with k and v in it."""
        a, own = self.spec, Seen(k, v, context.positions, context.segments, in_order=True)
        if stored is None:
            return own, None
        place: Plan = context.plans[stored.k.shape[1]]
        old, stored = stored, remember(stored, k, v, place)
        if context.empty and k.shape[1] > 1:
            return own, stored
        if k.shape[1] == 1 or not a.window or a.globals or old.k.shape[1] > a.window:
            return Seen(stored.k, stored.v, place.after.positions, place.after.segments, in_order=False), stored
        segments = jnp.ones(k.shape[:2], jnp.int32) if context.segments is None else context.segments
        pairs: tuple[Any, ...] = ((old.k, k), (old.v, v), (place.before.positions, context.positions), (place.before.segments, segments))
        k, v, positions, segments = (jnp.concatenate([x, y.astype(x.dtype)], 1) for x, y in pairs)
        return Seen(k, v, positions, segments, in_order=False), stored

    def attend(self, q, seen: Seen, sinks, context: Context) -> jax.Array:
        a, segments = self.spec, context.segments
        if not seen.in_order and segments is None:
            segments = jnp.ones(q.shape[:2], jnp.int32)
        attend = self.kernel if a.globals is None else functools.partial(kernels.sparse, globals=a.globals)
        return attend(q, seen.k, seen.v, query_positions=context.reach(q.shape[1]), key_positions=seen.positions, query_segments=segments, key_segments=seen.segments,
                      in_order=seen.in_order and context.prefix is None, causal=a.causal, window=a.window, softcap=a.softcap,
                      scale=a.head_dim ** -0.5 if a.scale is None else a.scale, **(dict(sinks=sinks) if a.globals is None else {}))

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
