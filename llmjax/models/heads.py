"""Heads of encoders: what is answered about the hidden states.

Legend: B batch, T length, D embed, E width of the embedding, V vocabulary, C labels.
"""
from __future__ import annotations

import dataclasses as dc
from typing import Any

import jax
import jax.numpy as jnp

from llmjax.core import Compute, dot
from llmjax.core.model_config import ClassifierHead, MaskedHead, ModelConfig, NoHead, ReplacedHead, SpanHead, TokenHead, Transform
from llmjax.models.feed_forward import ACTIVATIONS
from llmjax.models.module import Module, Start, along, compact, vector, weight
from llmjax.models.norms import Normalize


class HeadModule(Module):
    """x [B, T, D], the embedding [V, E], segments [B, T] or None -> the answer, float32."""
    config: ModelConfig
    compute: Compute

    def transformed(self, spec: Transform | None, x: jax.Array, size: int | None = None) -> jax.Array:
        """x [B, T, D] -> [B, T, size] (D unless given) through a head's dense layer."""
        if spec is None:
            return x
        size = size or x.shape[-1]
        y = dot("btd,de->bte", x, weight(self, "dense", "embed -> norm", (x.shape[-1], size)))
        if spec.bias:
            y = y + along(vector(self, "dense_bias", "norm", (size,)), y)
        y = ACTIVATIONS[spec.activation](y)
        return Normalize(self.config.norm, self.compute, name="norm")(y) if spec.norm else y

    def scores(self, x: jax.Array, count: int) -> jax.Array:
        """x [B, T, D] -> [B, T, C] float32."""
        y = dot("btd,dc->btc", x, weight(self, "out", "embed -> label", (x.shape[-1], count), Start(0.02)), out_dtype=jnp.float32)
        return y + along(vector(self, "out_bias", "label", (count,)), y)


class Masked(HeadModule):
    """-> [B, T, V]; the scores of the whole text [B, C], where the head has some, are sown into `aux`."""

    @compact
    def __call__(self, x: jax.Array, table: Any, segments: jax.Array | None) -> jax.Array:
        c, spec = self.config, self.config.head
        assert isinstance(spec, MaskedHead)
        width = c.embed_dim or c.dim
        if spec.text and (self.is_initializing() or self.is_mutable_collection("aux")):
            self.sow("aux", "scores", Classifier(dc.replace(c, head=spec.text), self.compute, name="text")(x, table, segments))
        x = self.transformed(spec.transform, x, width)
        if c.tied:
            logits = dot("bte,ve->btv", x, table, out_dtype=jnp.float32)
        else:
            logits = dot("bte,ev->btv", x, weight(self, "kernel", "embed -> vocab", (width, c.vocab_size), Start(0.02)), out_dtype=jnp.float32)
        names = ("bias", "out_bias") if spec.spare_bias else ("bias",)
        return logits + [along(vector(self, name, "vocab", (c.vocab_size,)), logits) for name in names][-1] if c.head_bias else logits


class Classifier(HeadModule):
    """-> [B, C]. The first token is the first that is not padding; the mean is over those that are not."""

    @compact
    def __call__(self, x: jax.Array, table: Any, segments: jax.Array | None) -> jax.Array:
        spec = self.config.head
        assert isinstance(spec, ClassifierHead)
        x = first(x, segments) if spec.pooling == "first" else mean(x, segments)[:, None].astype(x.dtype)
        return self.scores(self.transformed(spec.transform, x), len(spec.labels))[:, 0]


class Tagger(HeadModule):
    """-> [B, T, C]."""

    @compact
    def __call__(self, x: jax.Array, table: Any, segments: jax.Array | None) -> jax.Array:
        spec = self.config.head
        assert isinstance(spec, TokenHead)
        return self.scores(self.transformed(spec.transform, x), len(spec.labels))


class Span(HeadModule):
    """-> [B, T, 2]: an answer starts here, ends here."""

    @compact
    def __call__(self, x: jax.Array, table: Any, segments: jax.Array | None) -> jax.Array:
        spec = self.config.head
        assert isinstance(spec, SpanHead)
        return self.scores(self.transformed(spec.transform, x), 2)


class Detector(HeadModule):
    """-> [B, T]."""

    @compact
    def __call__(self, x: jax.Array, table: Any, segments: jax.Array | None) -> jax.Array:
        spec = self.config.head
        assert isinstance(spec, ReplacedHead)
        return self.scores(self.transformed(spec.transform, x), 1)[..., 0]


class Pooler(HeadModule):
    """-> the hidden states [B, T, D]; the pooled first token [B, D] is sown into `aux`."""

    @compact
    def __call__(self, x: jax.Array, table: Any, segments: jax.Array | None) -> jax.Array:
        spec = self.config.head
        assert isinstance(spec, NoHead)
        if spec.pooler and (self.is_initializing() or self.is_mutable_collection("aux")):
            self.sow("aux", "pooled", self.transformed(spec.pooler, first(x, segments))[:, 0])
        return x.astype(jnp.float32)


def first(x: jax.Array, segments: jax.Array | None) -> jax.Array:
    """x [B, T, D] -> [B, 1, D]: each row's first token that is not padding."""
    if segments is None:
        return x[:, :1]
    return jnp.take_along_axis(x, jnp.argmax(segments > 0, -1)[:, None, None], 1)


def mean(x: jax.Array, segments: jax.Array | None) -> jax.Array:
    """x [B, T, D] -> [B, D] float32: the mean over the tokens that are not padding."""
    used = jnp.ones(x.shape[:2], jnp.float32) if segments is None else jnp.broadcast_to(segments > 0, x.shape[:2]).astype(jnp.float32)
    return jnp.einsum("btd,bt->bd", x.astype(jnp.float32), used) / jnp.maximum(used.sum(-1, keepdims=True), 1.0)


# The name of each head's parameters in the tree, and its module.
HEADS: dict[type, tuple[str, type[HeadModule]]] = {MaskedHead: ("masked", Masked), ClassifierHead: ("classifier", Classifier), TokenHead: ("tagger", Tagger), SpanHead: ("span", Span),
                                                   ReplacedHead: ("detector", Detector), NoHead: ("pooler", Pooler)}
