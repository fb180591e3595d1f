"""The encoder-decoder: a decoder whose layers also attend to an encoder's output. Both share one embedding unless the configuration says otherwise.

Legend: B batch, T length of the decoder's tokens, S of the encoder's, D embed.

Parameters are the decoder's, as ever, and the encoder's under "encoder/".
"""
from __future__ import annotations

import dataclasses as dc

import jax
import jax.numpy as jnp

from llmjax.core.errors import ConfigError
from llmjax.models.cache import Cache
from llmjax.models.decoder import Decoder
from llmjax.models.stack import Stack


class EncoderDecoder(Decoder):
    """T5, BART: `config` is the decoder's, with the encoder's in `config.encoder`."""

    def setup(self):
        super().setup()
        self.encoder = Stack(self.config.encoder, self.compute, self.layout)

    def __call__(self, tokens: jax.Array, positions: jax.Array | None = None, segment_ids: jax.Array | None = None, cache: Cache | None = None, encoder_tokens: jax.Array | None = None,
                 encoder_segment_ids: jax.Array | None = None, encoder_positions: jax.Array | None = None) -> tuple[jax.Array, Cache | None]:
        """tokens, positions, segment_ids [B, T] and encoder_tokens, encoder_segment_ids, encoder_positions [B, S] int32 -> (logits [B, T, V] float32, cache). A decoder token sees the
        encoder's tokens of its own segment (0 is padding). The first call with a cache keeps the encoder's keys and values in it; later ones leave encoder_tokens out.
        Raises ConfigError where there is neither."""
        x, cache = self.features(tokens, positions, segment_ids, cache, encoder_tokens, encoder_segment_ids, encoder_positions)
        return self.unembed(x), cache

    def features(self, tokens: jax.Array, positions: jax.Array | None = None, segment_ids: jax.Array | None = None, cache: Cache | None = None, encoder_tokens: jax.Array | None = None,
                 encoder_segment_ids: jax.Array | None = None, encoder_positions: jax.Array | None = None) -> tuple[jax.Array, Cache | None]:
        """-> ([B, T, D] in the computing dtype, cache): everything before the head."""
        if encoder_tokens is None and self.is_initializing():
            encoder_tokens = tokens
        if encoder_tokens is None:
            if cache is None or cache.source is None:
                raise ConfigError("encoder_tokens are missing: an encoder-decoder's first call needs the source's tokens")
            return self.body(tokens, positions, segment_ids, cache, self.embed(), source_segments=cache.source)
        source = self.encode(encoder_tokens, encoder_segment_ids, encoder_positions)
        seen = encoder_segment_ids
        if seen is None and (segment_ids is not None or cache is not None):
            seen = jnp.ones(encoder_tokens.shape, jnp.int32)
        x, cache = self.body(tokens, positions, segment_ids, cache, self.embed(), source=source, source_segments=seen)
        if cache is None or seen is None:
            return x, cache
        return x, dc.replace(cache, source=jnp.broadcast_to(seen, encoder_tokens.shape).astype(jnp.int32))

    def encode(self, tokens: jax.Array, segment_ids: jax.Array | None = None, positions: jax.Array | None = None) -> jax.Array:
        """The encoder's output [B, S, D] for tokens, segment_ids, positions [B, S] int32."""
        with jax.named_scope("encoder"):
            return self.encoder.body(tokens, positions, segment_ids, None, self.encoder.embed() if self.config.encoder_embeds else self.embed())[0]
