"""The encoder: every token sees the others, and a head answers about them.

Legend: B batch, T length, D embed.

`model.apply({"params": params}, tokens, positions, segment_ids) -> (the head's answer, None)`; `method="features"` gives the hidden states [B, T, D].
"""
from __future__ import annotations

import jax

from llmjax.core.errors import ConfigError
from llmjax.models.heads import HEADS
from llmjax.models.stack import Stack


class Encoder(Stack):
    """An encoder with the head that `config.head` says; its signature is the decoder's, so that objectives and loaders need not tell them apart."""

    def setup(self):
        super().setup()
        name, module = HEADS[type(self.config.head)]
        setattr(self, name, module(self.config, self.compute))

    def __call__(self, tokens: jax.Array, positions: jax.Array | None = None, segment_ids: jax.Array | None = None, cache: None = None,
                 token_types: jax.Array | None = None) -> tuple[jax.Array, None]:
        """tokens, positions, segment_ids (0 is padding), token_types [B, T] int32 -> (answer float32, None): [B, T, V] of a MaskedHead, [B, C] of a ClassifierHead, [B, T, C] of a
        TokenHead, [B, T, 2] of a SpanHead, [B, T] of a ReplacedHead, [B, T, D] without a head. Raises ConfigError with a cache: tokens that come later change the earlier ones."""
        x, _ = self.features(tokens, positions, segment_ids, cache, token_types)
        with jax.named_scope("head"):
            return getattr(self, HEADS[type(self.config.head)][0])(x, self.embed(), segment_ids), None

    def features(self, tokens: jax.Array, positions: jax.Array | None = None, segment_ids: jax.Array | None = None, cache: None = None,
                 token_types: jax.Array | None = None) -> tuple[jax.Array, None]:
        """-> ([B, T, D] in the computing dtype, None): everything before the head."""
        if cache is not None:
            raise ConfigError("an encoder has no cache: its tokens see each other both ways")
        return self.body(tokens, positions, segment_ids, None, self.embed(), token_types)[0], None
