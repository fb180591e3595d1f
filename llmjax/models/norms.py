"""RMSNorm and LayerNorm over the last dimension, computed in float32."""
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from llmjax.core.model_config import Norm
from llmjax.core.run_config import Compute
from llmjax.models.module import Module, along, compact, vector


class Normalize(Module):
    """x [..., D] -> [..., D] in x's dtype."""
    spec: Norm
    compute: Compute

    @compact
    def __call__(self, x: jax.Array) -> jax.Array:
        spec, size = self.spec, x.shape[-1]
        y: Any = x.astype(jnp.float32)
        if spec.kind == "layer":
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + spec.eps)
        if spec.scale:
            scale = along(vector(self, "scale", "norm", (size,), 1.0 - spec.offset), y)
            y = y * (scale + spec.offset if spec.offset else scale)
        if spec.bias:
            y = y + along(vector(self, "bias", "norm", (size,)), y)
        return y.astype(x.dtype)
