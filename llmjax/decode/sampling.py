"""From logits to a token: filters as functions of per-row arrays, then one draw whose key depends on (seed, position) alone.

Legend: B rows, V vocabulary. No sort: thresholds of top-k and top-p are found by bisection over float32's bit patterns, exact, 32 passes of a reduction.
"""
from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass

from llmjax.core import ConfigError

LOW = -1e30


@register_dataclass
@dc.dataclass(frozen=True)
class Sampling:
    """Per-row knobs, each [B] float32 (top_k int32), or None where no row uses it (the step is then compiled without it).

    temperature 0 takes the best token. Applied in this order, as in transformers: repetition_penalty (CTRL, Keskar et al. 2019), temperature, top_k, top_p
    (Holtzman et al. 2019), min_p (Nguyen et al. 2024).
    """
    temperature: jax.Array | None = None
    top_k: jax.Array | None = None
    top_p: jax.Array | None = None
    min_p: jax.Array | None = None
    repetition_penalty: jax.Array | None = None


LIMITS = {"temperature": (0.0, None, "0 or more (0 takes the best token)"), "top_k": (1, None, "a whole number from 1"), "top_p": (0.0, 1.0, "above 0 and at most 1"),
          "min_p": (0.0, 1.0, "from 0 to 1"), "repetition_penalty": (0.0, None, "above 0 (1 changes nothing)")}
NEUTRAL = {"temperature": 0.0, "top_k": np.iinfo(np.int32).max, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


def make_sampling(rows: int, **knobs: float | Sequence[float] | None) -> Sampling:
    """Numbers, or one per row, checked. Raises ConfigError naming the knob, its value and what is allowed."""
    found: dict[str, Any] = {}
    for name, value in knobs.items():
        if value is None:
            continue
        values: list[Any] = [value] * rows if np.ndim(value) == 0 else list(value)     # type: ignore[arg-type]
        if len(values) != rows:
            raise ConfigError(f"{name}: {len(values)} values for {rows} rows; give one, or one per row")
        low, high, words = LIMITS[name]
        for v in values:
            bad = v is not None and (isinstance(v, bool) or not np.isfinite(v) or v < low or (high is not None and v > high) or (name == "top_k" and v != int(v))
                                     or (name in ("top_p", "repetition_penalty") and v == 0))
            if bad:
                raise ConfigError(f"{name}={v}: {words} is wanted")
        filled = [NEUTRAL[name] if v is None else v for v in values]
        if any(v != NEUTRAL[name] for v in filled):
            found[name] = jnp.asarray(filled, jnp.int32 if name == "top_k" else jnp.float32)
    return Sampling(**found)


def ordered(x: jax.Array) -> jax.Array:
    """float32 as uint32 in the same order."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def largest_threshold(keys: jax.Array, enough: Any) -> jax.Array:
    """The largest t [B, 1] uint32 such that enough(keys >= t) holds, bit by bit from the top. `enough` is monotone and holds for t = 0."""
    def bit(i, t):
        candidate = t | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(enough(keys >= candidate), candidate, t)
    return jax.lax.fori_loop(0, 32, bit, jnp.zeros((keys.shape[0], 1), jnp.uint32))


def keep_top_k(logits: jax.Array, k: jax.Array) -> jax.Array:
    """Everything below the k-th largest of a row goes; ties with it stay. logits [B, V], k [B]."""
    keys = ordered(logits)
    return jnp.where(keys >= largest_threshold(keys, lambda kept: kept.sum(-1, keepdims=True) >= jnp.minimum(k, logits.shape[-1])[:, None]), logits, LOW)


def keep_top_p(logits: jax.Array, p: jax.Array) -> jax.Array:
    """The smallest set of the most probable tokens whose mass reaches p stays (ties with its last member too)."""
    probabilities = jax.nn.softmax(logits, -1)
    keys = ordered(logits)
    total = probabilities.sum(-1, keepdims=True)
    mass = jnp.minimum(p[:, None], total * (1 - 1e-6))
    return jnp.where(keys >= largest_threshold(keys, lambda kept: jnp.where(kept, probabilities, 0.0).sum(-1, keepdims=True) >= mass), logits, LOW)


def keep_min_p(logits: jax.Array, p: jax.Array) -> jax.Array:
    """Tokens less probable than p times the most probable one go."""
    return jnp.where(logits >= logits.max(-1, keepdims=True) + jnp.log(p)[:, None], logits, LOW)


def penalize_repetition(logits: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """Logits of tokens already in the row, seen [B, V] bool, divided by the penalty where positive and multiplied where negative."""
    p = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / p, logits * p), logits)


def sample(logits: jax.Array, sampling: Sampling, keys: jax.Array, positions: jax.Array, seen: Any = None) -> tuple[jax.Array, jax.Array]:
    """logits [B, V] float32, keys [B] random keys, positions [B] of the tokens drawn -> (tokens [B] int32, their log-probabilities [B] under the model's own softmax)."""
    raw = logits
    if sampling.repetition_penalty is not None:
        logits = penalize_repetition(logits, seen, sampling.repetition_penalty)
    best = jnp.argmax(logits, -1)
    if sampling.temperature is None:
        tokens = best
    else:
        greedy = sampling.temperature == 0
        logits = logits / jnp.where(greedy, 1.0, sampling.temperature)[:, None]
        for knob, keep in ((sampling.top_k, keep_top_k), (sampling.top_p, keep_top_p), (sampling.min_p, keep_min_p)):
            if knob is not None:
                logits = keep(logits, knob)
        drawn = jax.vmap(lambda key, position, row: jax.random.categorical(jax.random.fold_in(key, position), row))(keys, positions, logits)
        tokens = jnp.where(greedy, best, drawn)
    logprobs = jnp.take_along_axis(raw, tokens[:, None], -1)[:, 0] - jax.nn.logsumexp(raw, -1)
    return tokens.astype(jnp.int32), logprobs


def row_keys(seed: int | Sequence[int], rows: int) -> jax.Array:
    """One random key per row: of one number the row's fold, of a sequence each row's own. Raises ConfigError where there are not as many seeds as rows."""
    if np.ndim(seed) == 0:
        return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(rows))      # type: ignore[arg-type]
    if len(seed) != rows:                                        # type: ignore[arg-type]
        raise ConfigError(f"seed: {len(seed)} seeds for {rows} rows; give one, or one per row")      # type: ignore[arg-type]
    return jax.vmap(jax.random.key)(jnp.asarray(seed, jnp.uint32))
