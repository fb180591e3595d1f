"""The convolution beside an encoder's layer (He et al. 2021, arXiv:2006.03654, section 5.2, as DeBERTa-v2 has it)."""
from __future__ import annotations

import jax
import jax.numpy as jnp

from llmjax.core import Compute, dot
from llmjax.core.model_config import Convolution
from llmjax.models.feed_forward import ACTIVATIONS
from llmjax.models.module import Module, along, compact, vector, weight


class CentredConvolution(Module):
    """x [B, T, D], segments [B, T] or None (one document) -> [B, T, D]; tokens of other documents, padding, and what lies beyond either end count as zeros."""
    spec: Convolution
    compute: Compute

    @compact
    def __call__(self, x: jax.Array, segments: jax.Array | None) -> jax.Array:
        W, D = self.spec.width, x.shape[-1]
        with jax.named_scope("convolution"):
            near = windows(x, W)                                                           # [B, T, W, D]
            if segments is not None:
                near = jnp.where((windows(segments, W) == segments[:, :, None])[..., None], near, 0)
            y = dot("btwd,wde->bte", near, weight(self, "kernel", "width embed -> norm", (W, D, D)))
            return ACTIVATIONS[self.spec.activation](y + along(vector(self, "kernel_bias", "norm", (D,)), y))


def windows(x: jax.Array, width: int) -> jax.Array:
    """x [B, T, …] -> [B, T, width, …]: each token's neighbours, itself in the middle; zeros beyond the ends."""
    T, reach = x.shape[1], width // 2
    x = jnp.pad(x, [(reach, reach) if axis == 1 else (0, 0) for axis in range(x.ndim)])
    return jnp.stack([x[:, i:i + T] for i in range(width)], 2)
