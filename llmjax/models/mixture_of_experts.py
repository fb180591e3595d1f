"""Mixture of experts: a router, and the experts' gated MLPs over the tokens that chose them.

Legend: B batch, T length, M = B·T tokens, D embed, E experts, F expert hidden, k experts per token.
"""
from __future__ import annotations

import jax
import jax.numpy as jnp

from llmjax.core import Compute, Layout, dense, dot, partitioned
from llmjax.core.model_config import MixtureOfExperts, Mlp
from llmjax.kernels import grouped_matmul
from llmjax.models.dispatch import through_experts
from llmjax.models.feed_forward import MultiLayerPerceptron, clamped, gate
from llmjax.models.module import Module, along, compact, vector, weight
from llmjax.models.norms import Normalize


class Experts(Module):
    """x [B, T, D] -> [B, T, D]. Sows into `aux` what `report` says."""
    spec: MixtureOfExperts
    compute: Compute
    layout: Layout

    @compact
    def __call__(self, x: jax.Array, segments: jax.Array | None) -> jax.Array:
        m, D, E, F = self.spec, x.shape[-1], self.spec.experts, self.spec.hidden
        seen = self.normed(x, "norm")
        gates, chosen = self.route(self.normed(x, "router_norm") * D ** -0.5 if m.norms else x, segments)
        weights = {name: dense(weight(self, name, label, (E, *shape))) for name, label, shape in
                   (("up", "expert | embed -> mlp", (D, F)), ("gate", "expert | embed -> mlp", (D, F)), ("down", "expert | mlp -> embed", (F, D)))}
        axes = {"up": "expert . mlp", "gate": "expert . mlp", "down": "expert mlp ."}
        if m.bias:
            for name, label, size in (("gate", "expert mlp", F), ("up", "expert mlp", F), ("down", "expert norm", D)):
                weights[f"{name}_bias"], axes[f"{name}_bias"] = vector(self, f"{name}_bias", label, (E, size)), label.replace("norm", ".")
        if partitioned():
            weights = {name: w.astype(x.dtype) for name, w in weights.items()}          # what travels between devices
        with jax.named_scope("experts"):
            y, dropped = through_experts(self.work, weights, axes, seen, gates, chosen, self.layout, scale_inputs=m.scale_inputs, form=self.compute.dispatch, capacity=self.compute.capacity)
        if dropped is not None:
            self.sow("aux", "dropped", (dropped if segments is None else dropped * (segments > 0)).sum())
        y = self.normed(y, "norm_out")
        if m.shared is not None:
            shared = MultiLayerPerceptron(Mlp(m.shared, m.activation), self.compute, self.layout, name="shared")(self.normed(x, "shared_norm"))
            shared = self.normed(shared, "shared_norm_out")
            if m.shared_gate:
                shared = shared * jax.nn.sigmoid(dot("btd,dr->btr", x, weight(self, "shared_gate", "embed -> router", (D, 1)), out_dtype=jnp.float32)).astype(x.dtype)
            y = y + shared
        return y

    def normed(self, x: jax.Array, name: str) -> jax.Array:
        """x through a norm called `name`, of experts that have norms of their own."""
        return Normalize(self.spec.norms, self.compute, name=name)(x) if self.spec.norms else x

    def work(self, weights: dict[str, jax.Array], rows: jax.Array, sizes: jax.Array, which: jax.Array, alone: jax.Array) -> jax.Array:
        """What experts make of their rows (models/dispatch.py)."""
        m = self.spec

        def product(x, name):
            y = grouped_matmul(x, weights[name], sizes, implementation=self.compute.experts)
            if not m.bias:
                return y
            bias = weights[f"{name}_bias"].astype(y.dtype)
            return y + (jnp.where(alone, bias, 0) if name == "down" else bias)[which]
        g, u = product(rows, "gate"), product(rows, "up")
        return product(gate(m.activation, g, u) if m.limit is None else clamped(g, u, m.limit), "down")

    def route(self, x: jax.Array, segments: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Which experts each token goes to and what their answers count: (gates [B, T, k] float32, chosen [B, T, k] int32)."""
        m, (B, T, D), E = self.spec, x.shape, self.spec.experts
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
        if m.expert_scale:
            gates = gates * dense(vector(self, "expert_scale", "router", (E,), 1.0)).astype(gates.dtype)[chosen]
        return (gates * m.scale).reshape(B, T, -1), chosen.reshape(B, T, -1)

    def report(self, logits, probabilities, chosen, segments) -> None:
        """Sums over the tokens that are not padding, out of which a loss is made (objectives/language.py: router_statistics), so that parts of a batch add up exactly: choices [E],
        probabilities [E], squared_z and tokens, scalars; all float32."""
        if not self.is_mutable_collection("aux"):
            return
        used = jnp.ones(len(logits), jnp.float32) if segments is None else (jnp.broadcast_to(segments, (len(logits) // segments.shape[-1], segments.shape[-1])) > 0).reshape(-1).astype(jnp.float32)
        self.sow("aux", "choices", jnp.einsum("mke,m->e", jax.nn.one_hot(chosen, self.spec.experts), used))
        self.sow("aux", "probabilities", jnp.einsum("me,m->e", probabilities, used))
        self.sow("aux", "squared_z", jnp.sum(jnp.square(jax.nn.logsumexp(logits, -1)) * used))
        self.sow("aux", "tokens", used.sum())
