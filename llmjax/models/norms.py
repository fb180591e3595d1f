"""RMSNorm and LayerNorm over the last dimension, computed in float32."""
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from llmjax.core.model_config import Norm
from llmjax.core.run_config import Compute
from llmjax.models.module import Module, along, compact, vector


class Normalize(Module):
    """x [..., D] -> [..., D] in x's dtype; with `each`, [..., N, D]."""
    spec: Norm
    compute: Compute
    each: bool = False          # a scale (and bias) for each of the heads in the last dimension but one

    @compact
    def __call__(self, x: jax.Array) -> jax.Array:
        spec, shape = self.spec, x.shape[-2:] if self.each else x.shape[-1:]
        label = "heads head_dim" if self.each else "norm"
        y: Any = x.astype(jnp.float32)
        if spec.kind == "layer":
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + spec.eps)
        if spec.scale:
            scale = along(vector(self, "scale", label, shape, 1.0 - spec.offset), y)
            y = y * (scale + spec.offset if spec.offset else scale)
        if spec.bias:
            y = y + along(vector(self, "bias", label, shape), y)
        return y.astype(x.dtype)
