"""Prompts as arrays: ids checked against the model, padded to few lengths."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmjax.core import ConfigError
from llmjax.core.model_config import LanguageHead

Prompt = str | Sequence[int]


def bucket(n: int, smallest: int = 16) -> int:
    """n rounded up to a length that programs are compiled for: powers of two up to 256, then multiples of 256."""
    return max(smallest, 1 << (n - 1).bit_length()) if n <= 256 else -(-n // 256) * 256


def token_ids(prompts: Sequence[Prompt], tokenizer: Any, config: Any) -> list[list[int]]:
    """Prompts as ids; a text gets the model's begin token where it has one. Raises ConfigError for empty, foreign and over-long prompts, and for a model that does not generate."""
    if not isinstance(config.head, LanguageHead):
        raise ConfigError(f"this model's head is a {type(config.head).__name__}: it generates no text; call model.apply for its answer, or llmjax.embed for vectors")
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int | np.integer)):
        raise ConfigError("prompts: a list of prompts is wanted, each a text or a list of ids; put this one in a list")
    rows = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if tokenizer is None:
                raise ConfigError(f"prompt {i} is text and there is no tokenizer: pass ids, or a tokenizer")
            ids = list(tokenizer.encode(prompt, add_special_tokens=True))
        else:
            ids = [int(x) for x in prompt]
        if not ids:
            raise ConfigError(f"prompt {i} is empty: at least one token is needed")
        wrong = [x for x in ids if not 0 <= x < config.vocab_size]
        if wrong:
            raise ConfigError(f"prompt {i} holds the id {wrong[0]}, the model's vocabulary has {config.vocab_size}")
        context = (config.encoder or config).context
        if len(ids) > context:
            raise ConfigError(f"prompt {i} has {len(ids)} tokens, the model's context is {context}: shorten it")
        rows.append(ids)
    return rows


def padded(rows: list[list[int]], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tokens, positions, segments [B, length] int32, padded on the right."""
    tokens = np.zeros((len(rows), length), np.int32)
    segments = np.zeros((len(rows), length), np.int32)
    for i, ids in enumerate(rows):
        tokens[i, :len(ids)], segments[i, :len(ids)] = ids, 1
    return tokens, np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape), segments


def begun(rows: list[list[int]], config: Any) -> list[list[int]]:
    """What the decoder's tokens begin with: the prompts, or an encoder-decoder's start token. Raises ConfigError where it has none."""
    if config.encoder is None:
        return rows
    if config.decoder_start is None:
        raise ConfigError("the model's config names no decoder_start_token_id: an encoder-decoder's answer starts from it")
    return [[config.decoder_start]] * len(rows)
