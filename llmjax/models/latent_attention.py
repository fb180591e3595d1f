"""Attention whose keys and values come out of one small latent vector a token (DeepSeek-V2, arXiv:2405.04434, section 2.1); a cache keeps that vector and nothing else.

Over its own tokens a call makes every head's keys and values. Over a cache it does not: queries go into the space of the latents and answers come out of it (the products the
paper calls absorbed), so that a step reads the cache once for all heads.

Legend: B batch, T query length, S key length, N heads, D embed, R latent, P numbers of a head without positions, H with them (P and the rotated part), V numbers of a value.
"""
from __future__ import annotations

import jax
import jax.numpy as jnp

from llmjax.core import Compute, Layout, constrain, dense, dot
from llmjax.core.model_config import LatentAttention, Norm
from llmjax.models.attention import Kept, attend, look
from llmjax.models.context import Context, Seen
from llmjax.models.module import Module, along, compact, vector, weight
from llmjax.models.norms import Normalize


class MultiHeadLatentAttention(Module):
    """x [B, T, D] -> ([B, T, D], the layer's cache)."""
    spec: LatentAttention
    norm: Norm
    compute: Compute
    layout: Layout

    @compact
    def __call__(self, x: jax.Array, context: Context, stored: Kept) -> tuple[jax.Array, Kept]:
        a, D, N, P = self.spec, x.shape[-1], self.spec.heads, self.spec.nope_dim
        q = self.queries(x)
        q = jnp.concatenate([q[..., :P], context.rotate(q[..., P:], a.rope)], -1)
        latent = Normalize(a.norm, self.compute, name="kv_norm")(self.into("kv_down", x, a.latent))                   # [B, T, R]
        shared = context.rotate(self.into("k_rope", x, a.rope_dim)[:, :, None], a.rope)                               # [B, T, 1, H - P]
        k_up, v_up = (weight(self, name, "latent -> heads head_dim", (a.latent, N, size)) for name, size in (("k_up", P), ("v_up", a.value_dim)))
        scale = a.head_dim ** -0.5 if a.scale is None else a.scale
        kept = jnp.concatenate([latent[:, :, None], shared], -1)                                                      # [B, T, 1, R + H - P]
        with jax.named_scope("attend"):
            seen, stored = look(kept, kept[..., :0], context, stored, a.window)
            if isinstance(seen, Seen) and seen.in_order:
                k = jnp.concatenate([dot("btr,rnp->btnp", latent, k_up), jnp.broadcast_to(shared, (*shared.shape[:2], N, a.rope_dim))], -1)
                v = dot("btr,rnv->btnv", latent, v_up)
                q, k, v = (constrain(y, "batch length heads .", self.layout.rules) for y in (q, k, v))
                y = attend(q, Seen(k, v, seen.positions, seen.segments, True), context, a, scale=scale, compute=self.compute, layout=self.layout)
            else:
                into = jnp.einsum("btnp,rnp->btnr", q[..., :P], dense(k_up).astype(q.dtype), preferred_element_type=jnp.float32).astype(q.dtype)
                q = constrain(jnp.concatenate([into, q[..., P:]], -1), "batch length heads .", self.layout.rules)
                y = attend(q, seen.inside(a.latent), context, a, scale=scale, compute=self.compute, layout=self.layout)
                y = jnp.einsum("btnr,rnv->btnv", y, dense(v_up).astype(y.dtype), preferred_element_type=jnp.float32).astype(y.dtype)
        y = dot("btnv,nvd->btd", y, weight(self, "o", "heads head_dim -> embed", (N, a.value_dim, D)))
        return (y + along(vector(self, "o_bias", "norm", (D,)), y) if a.bias else y), stored

    def queries(self, x: jax.Array) -> jax.Array:
        """-> [B, T, N, H], out of a latent vector of their own where the model has one."""
        a, D = self.spec, x.shape[-1]
        if a.query_rank is None:
            return dot("btd,dnh->btnh", x, weight(self, "q", "embed -> heads head_dim", (D, a.heads, a.head_dim)))
        latent = Normalize(a.norm, self.compute, name="q_norm")(self.into("q_down", x, a.query_rank))
        return dot("btr,rnh->btnh", latent, weight(self, "q_up", "latent -> heads head_dim", (a.query_rank, a.heads, a.head_dim)))

    def into(self, name: str, x: jax.Array, size: int) -> jax.Array:
        """x [B, T, D] -> [B, T, size]: a product into a latent space."""
        y = dot("btd,dr->btr", x, weight(self, name, "embed -> latent", (x.shape[-1], size)))
        return y + along(vector(self, f"{name}_bias", "norm", (size,)), y) if self.spec.bias else y
