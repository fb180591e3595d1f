"""Gated delta net: a layer whose memory is a matrix per head, written and read by the gated delta rule (kernels/delta_rule.py).

Queries, keys and values pass a causal convolution over the last W tokens; queries and keys have length 1; what a head reads is normalised and times silu of a gate.

Legend: B batch, T length, D embed, N value heads, K key heads, R = N / K, H key dim, V value dim, W width of the convolution.
"""
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from llmjax.core import Compute, Layout, constrain, dot, dots
from llmjax.core.model_config import GatedDelta, Norm
from llmjax.kernels.delta_rule import gated_delta_rule
from llmjax.kernels.recurrence import causal_conv
from llmjax.models.cache import State
from llmjax.models.context import Context
from llmjax.models.feed_forward import ACTIVATIONS
from llmjax.models.module import LogUniform, Module, Start, along, compact, vector, weight
from llmjax.models.norms import Normalize


class GatedDeltaNet(Module):
    """x [B, T, D] -> ([B, T, D], the layer's state)."""
    spec: GatedDelta
    norm: Norm
    compute: Compute
    layout: Layout

    @compact
    def __call__(self, x: jax.Array, context: Context, stored: State | None) -> tuple[jax.Array, State | None]:
        s, (B, T, D) = self.spec, x.shape
        K, N, H, V, R = s.key_heads, s.heads, s.key_dim, s.value_dim, s.heads // s.key_heads
        segments = context.document_of(x)
        # value heads stand as (key head, one of its R value heads): a tensor axis over key heads keeps each with its own
        q, k, v = dots("btd,dkh->btkh", x, [weight(self, name, "embed -> heads head_dim", (D, K, size)) for name, size in (("q", H), ("k", H), ("v", R * V))])
        z = dot("btd,dkh->btkh", x, weight(self, "z", "embed -> heads head_dim", (D, K, R * V)))
        decay, beta = (dot("btd,dkr->btkr", x, weight(self, name, "embed -> heads head_dim", (D, K, R)), out_dtype=jnp.float32) for name in ("decay", "beta"))
        with jax.named_scope("convolution"):
            taps = jnp.concatenate([weight(self, f"{name}_conv", "width heads head_dim", (s.width, K, size), Start(s.width ** -0.5)) for name, size in (("q", H), ("k", H), ("v", R * V))], -1)
            mixed = constrain(jnp.concatenate([q, k, v], -1), "batch length heads .", self.layout.rules)
            mixed, recent = causal_conv(mixed, taps, segments, None if stored is None else stored.recent)
            q, k, v = jnp.split(ACTIVATIONS[s.activation](mixed).astype(x.dtype), (H, 2 * H), -1)
        with jax.named_scope("delta_rule"):
            rate = jnp.exp(along(weight(self, "rate_log", "heads head_dim", (K, R), LogUniform(0.01, 16.0)), decay))
            decay = -rate * jax.nn.softplus(decay + along(vector(self, "decay_bias", "heads head_dim", (K, R), 1.0), decay))
            past: Any = {} if stored is None else dict(state=stored.state, segment=stored.segment)
            y, state, segment = gated_delta_rule(unit(q) * H ** -0.5, unit(k), v.reshape(B, T, N, V), decay.reshape(B, T, N), jax.nn.sigmoid(beta).reshape(B, T, N),
                                                 segments=segments, **past)
        y = Normalize(Norm(eps=self.norm.eps), self.compute, name="norm")(y)
        y = (y.astype(jnp.float32) * jax.nn.silu(z.astype(jnp.float32).reshape(y.shape))).astype(x.dtype)
        y = dot("btkh,khd->btd", y.reshape(B, T, K, R * V), weight(self, "o", "heads head_dim -> embed", (K, R * V, D)))
        return y, None if stored is None else State(state, segment, recent)


def unit(x: jax.Array) -> jax.Array:
    """x [..., H] divided by its length, float32; the small number is the reference implementation's."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-6)
