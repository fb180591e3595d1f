"""Answers that follow grammars: the host walks the grammars while the device computes; masks are applied inside the draw; tokens that a grammar forces are fed together, undrawn.

Legend: B rows, T tokens fed at a time, V vocabulary, n alternatives.
"""
from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.decode.grammar import Matcher
from llmjax.decode.history import History, remember
from llmjax.decode.prompts import bucket, padded
from llmjax.decode.rows import Row
from llmjax.decode.sampling import Sampling, best_logprobs, logprobs_of, sample
from llmjax.models import Cache, Decoder, jit_by_model

TOGETHER = 16                          # forced tokens fed at a time; what is left waits for the next


@jit_by_model(donate_argnames=("cache", "history"), static_argnames="alternatives")
def feed(model: Decoder, params: Any, tokens: jax.Array, positions: jax.Array, segments: jax.Array, unknown: jax.Array, logits: jax.Array, cache: Cache, history: History,
         alternatives: int = 0) -> tuple:
    """tokens, positions, segments [B, T] int32 (0 is padding, on the right), logits [B, V] before them -> (logits after each row's last token, as they were where it has none; each token's
    log-probability [B, T]; their alternatives; cache; history with the tokens where unknown [B, T] is true)."""
    x, cache = model.apply({"params": params}, tokens, positions, segments, cache, method="features")
    after = jnp.concatenate([logits[:, None], model.apply({"params": params}, x, method="unembed")], 1)         # [B, T + 1, V]
    if jax.tree.leaves(history):
        for t in range(tokens.shape[1]):
            history = remember(history, tokens[:, t], unknown[:, t], history.mu)
    others = best_logprobs(after[:, :-1], alternatives) if alternatives else None
    return jnp.take_along_axis(after, segments.sum(-1)[:, None, None], 1)[:, 0], logprobs_of(after[:, :-1], tokens), others, cache, history


@functools.partial(jax.jit, static_argnames="alternatives", donate_argnames="history")
def draw_masked(logits: jax.Array, sampling: Sampling, keys: jax.Array, positions: jax.Array, history: History, mask: jax.Array | None, active: jax.Array, alternatives: int = 0) -> tuple:
    """`sample` under masks [B, ceil(V / 32)] int32, or none -> (tokens [B], log-probabilities [B], alternatives [B, n] or None, history)."""
    tokens, logprobs, history = sample(logits, sampling, keys, positions, history, mask, active)
    return tokens, logprobs, best_logprobs(logits, alternatives) if alternatives else None, history


def walked(matcher: Matcher) -> list[int]:
    """The tokens that are forced here, advanced over."""
    tokens = matcher.forced()
    for token in tokens:
        matcher.advance(token)
    return tokens


def constrained(model: Decoder, params: Any, logits: jax.Array, cache: Cache, rows: Sequence[Row], matchers: Sequence[Matcher | None], sampling: Sampling, keys: jax.Array,
                history: History, alternatives: int = 0) -> Iterator[None]:
    """Fills `rows` in place until all are done, one yield per draw. logits [B, V] after the prompts, cache, keys [B], history: as `begin` takes them; matchers: None for a row without a
    grammar. Raises ConfigError where other knobs leave nothing that fits a grammar."""
    mask = np.full((len(rows), -(-logits.shape[-1] // 32)), -1, np.int32)
    pending = [walked(matcher) if matcher else [] for matcher in matchers]         # to be fed
    taken = [0] * len(rows)                                                         # so many of them the rows have already: what was drawn
    while True:
        pending = [[] if row.finish else tokens[:row.limit - len(row.ids) + k] for row, tokens, k in zip(rows, pending, taken)]
        told: list[tuple] = []
        for at in range(0, max(map(len, pending)), TOGETHER):
            tokens, _, segments = padded([ids[at:at + TOGETHER] for ids in pending], bucket(min(TOGETHER, max(map(len, pending)) - at), 1))
            columns = at + np.arange(tokens.shape[1], dtype=np.int32)[None]
            positions = np.asarray([[row.position - k] for row, k in zip(rows, taken)], np.int32) + columns
            logits, *some, cache, history = feed(model, params, tokens, positions, segments, (segments > 0) & (columns >= np.asarray(taken)[:, None]), logits, cache, history, alternatives)
            told.append(tuple(some))
        for row, matcher, bits in zip(rows, matchers, mask):           # the host walks the grammars while the device computes
            if matcher and not row.finish:
                matcher.mask(bits)
        if any(len(ids) > k for ids, k in zip(pending, taken)):
            logprobs, others = jax.tree.map(lambda *parts: np.concatenate(parts, 1), *jax.device_get(told))
            for i, (row, matcher, ids, k) in enumerate(zip(rows, matchers, pending, taken)):
                row.take(ids[k:], logprobs[i, k:], None if others is None else (others[0][i, k:], others[1][i, k:]))
                if matcher and matcher.done and not row.finish:
                    row.finish = "end"
        active = np.asarray([not row.finish for row in rows])
        if not active.any():
            return
        tokens, logprobs, others, history = draw_masked(logits, sampling, keys, np.asarray([row.position for row in rows], np.int32), history, mask, active, alternatives)
        tokens, logprobs, others = jax.device_get((tokens, logprobs, others))
        for i, (row, matcher) in enumerate(zip(rows, matchers)):
            pending[i], taken[i] = [], 1
            if row.finish:
                continue
            row.take(tokens[i:i + 1].tolist(), logprobs[i:i + 1], None if others is None else (others[0][i:i + 1], others[1][i:i + 1]))
            pending[i] = tokens[i:i + 1].tolist()
            if matcher:
                matcher.advance(pending[i][0])                          # an end token too: where nothing was left to draw, it may be one out of place
                pending[i] += [] if row.finish else walked(matcher)
                if matcher.done and len(pending[i]) == 1:
                    row.finish = "end"
        yield
