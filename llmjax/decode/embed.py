"""Texts as vectors: hidden states pooled over the tokens of each text.

Legend: B texts, T length, D embed.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.core.errors import ConfigError, nearest
from llmjax.decode.prompts import Prompt, bucket, padded
from llmjax.models import EncoderDecoder, jit_by_model
from llmjax.models.heads import first, mean

Pooling = Literal["mean", "cls"]


@jit_by_model(static_argnums=(3, 4))
def pooled(model: Any, params: Any, tokens: jax.Array, segments: jax.Array, pooling: Pooling, normalize: bool) -> jax.Array:
    """tokens, segments [B, T] int32 -> [B, D] float32."""
    if isinstance(model, EncoderDecoder):
        x = model.apply({"params": params}, tokens, segments, method="encode")
    else:
        x, _ = model.apply({"params": params}, tokens, segment_ids=segments, method="features")
    y = mean(x, segments) if pooling == "mean" else first(x, segments)[:, 0].astype(jnp.float32)
    return y / jnp.maximum(jnp.linalg.norm(y, axis=-1, keepdims=True), 1e-12) if normalize else y


def embed(model: Any, params: Any, tokenizer: Any, texts: Sequence[Prompt], pooling: Pooling = "mean", normalize: bool = True, *, max_length: int | None = None,
          batch_size: int = 32) -> np.ndarray:
    """Embeddings [len(texts), D] float32 (as sentence-transformers makes them: Reimers & Gurevych 2019, section 3) of an encoder, or of any other model's last hidden states.

    texts: texts, or lists of ids (then tokenizer may be None); special tokens are added to texts. pooling: "mean" over the tokens of a text, or "cls", its first token. normalize: to
    length 1. max_length: longer texts are cut to it (a last special token stays); None: they are an error beyond the model's context.
    Raises ConfigError for another pooling, an empty text, and one that is too long.
    """
    if pooling not in get_args(Pooling):
        raise ConfigError(f"pooling={pooling!r}: mean or cls" + nearest(str(pooling), get_args(Pooling)))
    if isinstance(texts, str):
        raise ConfigError("texts: a list is wanted; put this text in one")
    config = model.config.encoder or model.config
    rows = [token_row(i, text, tokenizer, model.config.vocab_size, config.context, max_length) for i, text in enumerate(texts)]
    out = np.zeros((len(rows), model.config.dim), np.float32)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start:start + batch_size]
        length = min(bucket(len(rows[chosen[-1]])), max(config.context, len(rows[chosen[-1]])))
        size = min(batch_size, bucket(len(chosen), 1))
        tokens, _, segments = padded([rows[i] for i in chosen] + [[]] * (size - len(chosen)), length)       # few shapes, so that few programs are compiled
        out[chosen] = np.asarray(pooled(model, params, tokens, segments, pooling, normalize))[:len(chosen)]
    return out


def token_row(i: int, text: Prompt, tokenizer: Any, vocab_size: int, context: int, max_length: int | None) -> list[int]:
    """The ids of text number i, checked and cut."""
    if isinstance(text, str) and tokenizer is None:
        raise ConfigError(f"text {i} is text and there is no tokenizer: pass ids, or a tokenizer")
    ids = tokenizer.encode(text, add_special_tokens=True) if isinstance(text, str) else [int(x) for x in text]
    if not ids:
        raise ConfigError(f"text {i} is empty: at least one token is needed")
    limit = min(context, max_length or context)
    if len(ids) > limit and max_length is None:
        raise ConfigError(f"text {i} has {len(ids)} tokens, the model's context is {context}: shorten it, or give max_length to have it cut")
    if len(ids) > limit:
        last = ids[-1:] if tokenizer is not None and ids[-1] in tokenizer.special_tokens.values() else []
        ids = ids[:limit - len(last)] + last
    wrong = [x for x in ids if not 0 <= x < vocab_size]
    if wrong:
        raise ConfigError(f"text {i} holds the id {wrong[0]}, the model's vocabulary has {vocab_size}")
    return list(ids)
