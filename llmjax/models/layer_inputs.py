"""The inputs that each layer gets of its own (Gemma 3n and 4): a second embedding, a row per layer, beside a projection of the first.

Legend: B batch, T length, D embed, L layers, P width of a layer's own input.
"""
from __future__ import annotations

import jax
import jax.numpy as jnp

from llmjax.core import Compute, dot, take
from llmjax.core.model_config import LayerInputs, Norm
from llmjax.models.module import Module, Start, compact, weight
from llmjax.models.norms import Normalize


class OwnInputs(Module):
    """tokens [B, T], their embeddings x [B, T, D] -> [B, T, L, P]: (table[token] sqrt(P) + norm(x projected)) / sqrt(2). As transformers' Gemma4TextModel; its factor 1 / sqrt(D) before
    the norm is kept, for the norm has an epsilon."""
    spec: LayerInputs
    layers: int
    norm: Norm
    compute: Compute

    @compact
    def __call__(self, tokens: jax.Array, x: jax.Array) -> jax.Array:
        (L, P), D = (self.layers, self.spec.dim), x.shape[-1]
        with jax.named_scope("layer_inputs"):
            known = take(weight(self, "table", "vocab layer embed", (self.spec.vocab_size, L, P), Start(0.02)), tokens, x.dtype)
            told = dot("btd,dlp->btlp", x, weight(self, "projection", "embed -> layer head_dim", (D, L, P)))
            told = Normalize(self.norm, self.compute, name="norm")(told * jnp.asarray(D ** -0.5, x.dtype))
            return (told + known * jnp.asarray(P ** 0.5, x.dtype)) * jnp.asarray(2 ** -0.5, x.dtype)
