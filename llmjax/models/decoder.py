"""The decoder-only language model.

Legend: B batch, T length, D embed, V vocabulary, P rows of a learned position table.

`model.apply({"params": params}, tokens, positions, segment_ids, cache) -> (logits, cache)`; its two parts answer by name: `method="features"` gives [B, T, D] before the
head, `method="unembed"` turns features into logits. One forward serves training, packing, prefill, chunked prefill and decoding.
"""
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from llmjax.core import Compute, dot
from llmjax.core.model_config import ModelConfig
from llmjax.models.cache import Cache
from llmjax.models.module import Module, Start, along, compact, vector, weight
from llmjax.models.stack import Stack


class Head(Module):
    """Features [B, T, D] -> logits [B, T, V] float32; with `table` given the head is that embedding."""
    config: ModelConfig
    compute: Compute

    @compact
    def __call__(self, x: jax.Array, table: Any | None) -> jax.Array:
        c = self.config
        width = c.embed_dim or c.dim
        if width != c.dim:
            x = dot("btd,de->bte", x, weight(self, "narrow", "embed -> factor", (c.dim, width)))
        if table is not None:
            logits = dot("btd,vd->btv", x, table, out_dtype=jnp.float32)
        else:
            kernel = weight(self, "kernel", "embed -> vocab" if width == c.dim else "factor -> vocab", (width, c.vocab_size), Start(0.02))
            logits = dot("btd,dv->btv", x, kernel, out_dtype=jnp.float32)
        if c.head_bias:
            logits = logits + along(vector(self, "bias", "vocab", (c.vocab_size,)), logits)
        if c.logit_scale != 1.0:
            logits = logits * c.logit_scale
        return logits if c.logit_softcap is None else c.logit_softcap * jnp.tanh(logits / c.logit_softcap)


class Decoder(Stack):
    """A decoder-only language model."""

    def setup(self):
        super().setup()
        self.head = Head(self.config, self.compute)

    def __call__(self, tokens: jax.Array, positions: jax.Array | None = None, segment_ids: jax.Array | None = None, cache: Cache | None = None,
                 prefix: jax.Array | None = None) -> tuple[jax.Array, Cache | None]:
        """tokens [B, T] int32; positions, segment_ids [B, T] int32 (0 is padding; tokens of a segment stand in order) -> (logits [B, T, V] float32, the cache with these tokens in it).

        prefix int32 [B] (or [B, T]: of each token's document): so many tokens at the start of a document see each other from both sides (prefix-LM: Raffel et al. 2019,
        arXiv:1910.10683, figure 4); with a cache all of them stand in one call. Raises ConfigError for a prefix where a layer has a window or is recurrent.
        """
        x, cache = self.features(tokens, positions, segment_ids, cache, prefix)
        return self.unembed(x), cache

    def features(self, tokens: jax.Array, positions: jax.Array | None = None, segment_ids: jax.Array | None = None, cache: Cache | None = None,
                 prefix: jax.Array | None = None) -> tuple[jax.Array, Cache | None]:
        """-> ([B, T, D] in the computing dtype, cache): everything before the head."""
        return self.body(tokens, positions, segment_ids, cache, self.embed(), prefix=prefix)

    def unembed(self, x: jax.Array) -> jax.Array:
        """Features [..., T, D] -> logits [..., T, V] float32."""
        with jax.named_scope("unembed"):
            return self.head(x, self.embed() if self.config.tied else None)
