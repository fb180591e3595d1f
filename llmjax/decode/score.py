"""Log-probabilities of text that is there: of a prompt's tokens, and what would have been likelier.

Legend: B rows, T length, V vocabulary.
"""
from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from llmjax.core import ConfigError
from llmjax.decode.prompts import Prompt, bucket, padded, token_ids
from llmjax.decode.rows import pairs
from llmjax.decode.sampling import best_logprobs, logprobs_of
from llmjax.models import Decoder, jit_by_model

CHUNK = 64                             # positions whose logits are in memory at a time


@dc.dataclass(frozen=True)
class Score:
    """Of one text. logprobs: of each id after those before it, None for the first; alternatives: at each place the most probable ids with their log-probabilities, best first."""
    ids: list[int]
    logprobs: list[float | None]
    alternatives: list[list[tuple[int, float]] | None] | None


@jit_by_model(static_argnums=3)
def scored(model: Decoder, params: Any, tokens: jax.Array, segments: jax.Array, alternatives: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """tokens, segments [B, T] int32, T a multiple of CHUNK -> (log-probabilities [B, T] of each token's successor, the most probable successors: ids and log-probabilities [B, T, n])."""
    x, _ = model.apply({"params": params}, tokens, segment_ids=segments, method="features")
    after = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))

    def part(start):
        here = jax.lax.dynamic_slice_in_dim(x, start, CHUNK, 1)
        logits = model.apply({"params": params}, here, method="unembed")
        return logprobs_of(logits, jax.lax.dynamic_slice_in_dim(after, start, CHUNK, 1)), best_logprobs(logits, alternatives) if alternatives else None
    parts = jax.lax.map(part, jnp.arange(0, tokens.shape[1], CHUNK))                    # [T / CHUNK, B, CHUNK, ...]
    return jax.tree.map(lambda y: jnp.swapaxes(y, 0, 1).reshape(*tokens.shape, *y.shape[3:]), parts)


def score(model: Decoder, params: Any, tokenizer: Any, texts: Sequence[Prompt], *, alternatives: int = 0) -> list[Score]:
    """Log-probabilities of texts, or of lists of ids (then tokenizer may be None), under the model. alternatives: how many of the most probable ids to tell at each place.
    Raises ConfigError for what `complete` would refuse as a prompt, and for an encoder-decoder, whose prompt is not what it writes."""
    if model.config.encoder:
        raise ConfigError("an encoder-decoder reads its prompt with the encoder: it has no log-probabilities of it")
    if not isinstance(alternatives, int) or not 0 <= alternatives <= model.config.vocab_size:
        raise ConfigError(f"alternatives={alternatives!r}: a whole number from 0 to the vocabulary's {model.config.vocab_size} is wanted")
    rows = token_ids(texts, tokenizer, model.config)
    if not rows:
        return []
    tokens, _, segments = padded(rows, -(-bucket(max(map(len, rows))) // CHUNK) * CHUNK)
    logprobs, others = jax.device_get(scored(model, params, tokens, segments, alternatives))
    return [Score(ids, [None, *(float(v) for v in logprobs[i, :len(ids) - 1])], None if others is None else [None, *pairs(others[0][i], others[1][i], len(ids) - 1)])
            for i, ids in enumerate(rows)]
