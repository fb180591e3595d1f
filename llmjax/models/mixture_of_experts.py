"""Mixture of experts: a router, tokens sorted by expert, one grouped product per matrix, nothing dropped.

Legend: B batch, T length, M = B·T tokens, D embed, E experts, F expert hidden, k experts per token.
"""
from __future__ import annotations

import jax
import jax.numpy as jnp

from llmjax.core import Compute, Layout, dense, dot
from llmjax.core.model_config import MixtureOfExperts, Mlp
from llmjax.kernels import grouped_matmul
from llmjax.models.feed_forward import MultiLayerPerceptron, clamped, gate
from llmjax.models.module import Module, along, compact, vector, weight


class Experts(Module):
    """x [B, T, D] -> [B, T, D]. Sows into `aux`: balance_loss, router_z_loss (scalars) and expert_share [E] (how the choices fell; uniform is 1/E)."""
    spec: MixtureOfExperts
    compute: Compute
    layout: Layout

    @compact
    def __call__(self, x: jax.Array, segments: jax.Array | None) -> jax.Array:
        m, (B, T, D), E, F = self.spec, x.shape, self.spec.experts, self.spec.hidden
        gates, chosen = self.route(x, segments)                                     # [M, k]
        order = jnp.argsort(chosen.reshape(-1))                                     # choices sorted by expert [M·k]
        sizes = jnp.bincount(chosen.reshape(-1), length=E)
        rows = x.reshape(-1, D)[order // m.top_k]
        if m.scale_inputs:
            rows, gates = rows * gates.reshape(-1)[order, None].astype(rows.dtype), jnp.ones_like(gates)

        def product(x, w, name, axes):
            y = grouped_matmul(x, w, sizes, implementation=self.compute.experts)
            return y + vector(self, f"{name}_bias", axes, (E, w.shape[-1])).astype(y.dtype)[chosen.reshape(-1)[order]] if m.bias else y
        up, into = (dense(weight(self, name, "expert | embed -> mlp", (E, D, F))) for name in ("up", "gate"))
        down = dense(weight(self, "down", "expert | mlp -> embed", (E, F, D)))
        with jax.named_scope("experts"):
            g, u = product(rows, into, "gate", "expert mlp"), product(rows, up, "up", "expert mlp")
            h = gate(m.activation, g, u) if m.limit is None else clamped(g, u, m.limit)
            y = product(h, down, "down", "expert norm")
        back = jnp.argsort(order)
        y = jnp.einsum("mkd,mk->md", y[back].reshape(-1, m.top_k, D).astype(jnp.float32), gates).astype(x.dtype).reshape(B, T, D)
        if m.shared is not None:
            shared = MultiLayerPerceptron(Mlp(m.shared, m.activation), self.compute, self.layout, name="shared")(x)
            if m.shared_gate:
                shared = shared * jax.nn.sigmoid(dot("btd,dr->btr", x, weight(self, "shared_gate", "embed -> router", (D, 1)), out_dtype=jnp.float32)).astype(x.dtype)
            y = y + shared
        return y

    def route(self, x: jax.Array, segments: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Which experts each token goes to and what their answers count: (gates [M, k] float32, chosen [M, k] int32)."""
        m, (D, E) = self.spec, (x.shape[-1], self.spec.experts)
        logits = dot("btd,de->bte", x, weight(self, "router", "embed -> router", (D, E)), out_dtype=jnp.float32).reshape(-1, E)
        if m.router_bias:
            logits = logits + along(vector(self, "router_bias", "router", (E,)), logits)
        scores = jax.nn.softmax(logits, -1) if m.score == "softmax" else jax.nn.sigmoid(logits)
        rank = scores
        if m.selection_bias:
            rank = rank + along(vector(self, "selection_bias", "router", (E,)), rank)
        if m.groups:
            apart = rank.reshape(-1, m.groups.count, E // m.groups.count)
            best = jax.lax.top_k(jax.lax.top_k(apart, m.groups.by)[0].sum(-1), m.groups.top)[1]             # [M, groups taken]
            taken = jax.nn.one_hot(best, m.groups.count, dtype=bool).any(1)[..., None]
            rank = jnp.where(taken, apart, -jnp.inf).reshape(-1, E)
        chosen = jax.lax.top_k(rank, m.top_k)[1]
        gates = jnp.take_along_axis(scores, chosen, -1)
        self.report(logits, scores if m.score == "softmax" else scores / (scores.sum(-1, keepdims=True) + 1e-20), chosen, segments)
        if m.renormalize:
            gates = gates / (gates.sum(-1, keepdims=True) + 1e-20)                  # sigmoids may all be 0
        return gates * m.scale, chosen

    def report(self, logits, probabilities, chosen, segments) -> None:
        """Load balance as in Switch Transformers (Fedus et al. 2021, eq. 4 to 6; with k choices a token a uniform router gives k) and the router z-loss of ST-MoE
        (Zoph et al. 2022, eq. 5), means over the tokens that are not padding."""
        if not self.is_mutable_collection("aux"):
            return
        used = jnp.ones(len(logits), jnp.float32) if segments is None else (jnp.broadcast_to(segments, (len(logits) // segments.shape[-1], segments.shape[-1])) > 0).reshape(-1).astype(jnp.float32)
        count = jnp.maximum(used.sum(), 1.0)
        share = jnp.einsum("mke,m->e", jax.nn.one_hot(chosen, self.spec.experts), used) / count
        mean = jnp.einsum("me,m->e", probabilities, used) / count
        self.sow("aux", "balance_loss", self.spec.experts * jnp.sum(share * mean))
        self.sow("aux", "router_z_loss", jnp.sum(jnp.square(jax.nn.logsumexp(logits, -1)) * used) / count)
        self.sow("aux", "expert_share", share / self.spec.top_k)
