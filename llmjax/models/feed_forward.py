"""Feed-forward blocks: plain and gated MLP.

Legend: B batch, T length, D embed, F mlp hidden.
"""
from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llmjax.core import Compute, Layout, constrain, dot, dots, platform
from llmjax.core.model_config import Mlp
from llmjax.models.module import Module, along, compact, vector, weight

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
    "tanh": jnp.tanh,
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gate(activation: str, g: jax.Array, u: jax.Array) -> jax.Array:
    """act(g) · u in float32, in g's dtype. The backward pass keeps g and u alone and is one pass over memory; by autodiff it would be several, in g's dtype."""
    return (ACTIVATIONS[activation](g.astype(jnp.float32)) * u.astype(jnp.float32)).astype(g.dtype)


def _gate_backward(activation: str, kept: tuple[jax.Array, jax.Array], d: jax.Array) -> tuple[jax.Array, jax.Array]:
    held = (*kept, d)
    if platform() == "cpu":          # else XLA finds act(g) again in the forward pass and keeps it, in float32, for every layer
        held = jax.lax.optimization_barrier(held)
    g, u, d = (x.astype(jnp.float32) for x in held)
    a, slope = jax.jvp(ACTIVATIONS[activation], (g,), (jnp.ones_like(g),))
    return (d * u * slope).astype(kept[0].dtype), (d * a).astype(kept[1].dtype)


gate.defvjp(lambda activation, g, u: (gate(activation, g, u), (g, u)), _gate_backward)


def clamped(g: jax.Array, u: jax.Array, limit: float) -> jax.Array:
    """gpt-oss' gate, in float32, in g's dtype: g at most `limit`, u within ± limit, (u + 1) · g · sigmoid(1.702 g)."""
    low, high = jnp.minimum(g.astype(jnp.float32), limit), jnp.clip(u.astype(jnp.float32), -limit, limit)
    return ((high + 1.0) * ACTIVATIONS["quick_gelu"](low)).astype(g.dtype)


class MultiLayerPerceptron(Module):
    """x [B, T, D] -> [B, T, D]: down(act(gate x) * up x), or down(act(up x)) without a gate."""
    spec: Mlp
    compute: Compute
    layout: Layout

    @compact
    def __call__(self, x: jax.Array) -> jax.Array:
        m, (D, F) = self.spec, (x.shape[-1], self.spec.hidden)

        names = ("gate", "up") if m.gated else ("up",)
        into = dots("btd,df->btf", x, [weight(self, name, "embed -> mlp", (D, F)) for name in names])
        if m.bias:
            into = [y + along(vector(self, f"{name}_bias", "mlp", (F,)), y) for name, y in zip(names, into)]
        h = gate(m.activation, *into) if m.gated else ACTIVATIONS[m.activation](*into)
        h = constrain(h, "batch length mlp", self.layout.rules)
        y = dot("btf,fd->btd", h, weight(self, "down", "mlp -> embed", (F, D)))
        return y + along(vector(self, "down_bias", "norm", (D,)), y) if m.bias else y
