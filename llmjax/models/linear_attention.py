"""Linear attention as a layer: the projections of multi-head attention around kernels/linear_attention.py.

Legend: B batch, T length, D embed, N query heads, K key/value heads, H head dim.
"""
from __future__ import annotations

from typing import Any

import jax

from llmjax.core import Compute, Layout, constrain, dot, dots
from llmjax.core.model_config import LinearAttention, Norm
from llmjax.kernels.linear_attention import features, linear_attention
from llmjax.models.cache import State
from llmjax.models.context import Context
from llmjax.models.module import Module, compact, weight


class LinearMultiHeadAttention(Module):
    """x [B, T, D] -> ([B, T, D], the layer's state)."""
    spec: LinearAttention
    norm: Norm
    compute: Compute
    layout: Layout

    @compact
    def __call__(self, x: jax.Array, context: Context, stored: State | None) -> tuple[jax.Array, State | None]:
        a, D = self.spec, x.shape[-1]
        q, k, v = dots("btd,dnh->btnh", x, [weight(self, name, f"embed -> {axis} head_dim", (D, n, a.head_dim))
                                            for name, axis, n in (("q", "heads", a.heads), ("k", "kv_heads", a.kv_heads), ("v", "kv_heads", a.kv_heads))])
        q, k = context.rotate(q, a.rope), context.rotate(k, a.rope)
        q, k, v = (constrain(y, f"batch length {heads} .", self.layout.rules) for y, heads in ((q, "heads"), (k, "kv_heads"), (v, "kv_heads")))
        past: Any = {} if stored is None else dict(state=stored.state, segment=stored.segment)
        with jax.named_scope("attend"):
            y, state, segment = linear_attention(features(q), features(k), v, segments=context.document_of(x), **past)
        y = dot("btnh,nhd->btd", y, weight(self, "o", "heads head_dim -> embed", (a.heads, a.head_dim, D)))
        return y, None if stored is None else State(state, segment)
