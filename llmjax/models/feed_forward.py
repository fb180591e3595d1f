"""Feed-forward blocks: plain and gated MLP.

Legend: B batch, T length, D embed, F mlp hidden.
"""
from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from llmjax.core import Compute, Layout, constrain, dot
from llmjax.core.model_config import Mlp
from llmjax.models.module import Module, along, compact, vector, weight

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
}


class MultiLayerPerceptron(Module):
    """x [B, T, D] -> [B, T, D]: down(act(gate x) * up x), or down(act(up x)) without a gate."""
    spec: Mlp
    compute: Compute
    layout: Layout

    @compact
    def __call__(self, x: jax.Array) -> jax.Array:
        m, (D, F) = self.spec, (x.shape[-1], self.spec.hidden)

        def into(name):
            y = dot("btd,df->btf", x, weight(self, name, "embed -> mlp", (D, F)))
            return y + along(vector(self, f"{name}_bias", "mlp", (F,)), y) if m.bias else y
        act = ACTIVATIONS[m.activation]
        h = act(into("gate")) * into("up") if m.gated else act(into("up"))
        h = constrain(h, "batch length mlp", self.layout.rules)
        y = dot("btf,fd->btd", h, weight(self, "down", "mlp -> embed", (F, D)))
        return y + along(vector(self, "down_bias", "norm", (D,)), y) if m.bias else y
