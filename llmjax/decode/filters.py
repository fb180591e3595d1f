"""Functions on logits, [B, V] float32 in and out, that samplers are made of. Each takes per-row arrays and leaves a row alone whose knob is neutral.

Legend: B rows, V vocabulary, H tokens of text looked back at (newest first, -1 where there is none). What may not be drawn is LOW. No sort of the vocabulary: thresholds come from the
WIDTH largest logits, and where a row's lie deeper, from a bisection over float32's bit patterns (exact, 32 passes of a reduction). Which of the two found a row's threshold depends on
that row alone, so a text does not depend on the rows beside it.
"""
from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

LOW = -1e30
WIDTH = 128                            # of the largest logits looked at before bisecting


def allowed(logits: jax.Array) -> jax.Array:
    """Where something may still be drawn. [B, V] bool."""
    return logits > LOW / 2


# thresholds

def ordered(x: jax.Array) -> jax.Array:
    """float32 as uint32 in the same order."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def unordered(keys: jax.Array) -> jax.Array:
    """The inverse of `ordered`."""
    return jax.lax.bitcast_convert_type(jnp.where(keys >> 31 == 1, keys & jnp.uint32((1 << 31) - 1), ~keys), jnp.float32)


def largest_threshold(keys: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The largest t [B, 1] uint32 such that enough(keys >= t) holds, bit by bit from the top. `enough` is monotone and holds for t = 0."""
    def bit(i, t):
        candidate = t | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(enough(keys >= candidate), candidate, t)
    return jax.lax.fori_loop(0, 32, bit, jnp.zeros((keys.shape[0], 1), jnp.uint32))


def cut(scores: jax.Array, weights: jax.Array | None, wanted: jax.Array, idle: jax.Array) -> jax.Array:
    """The largest t [B, 1] such that the tokens with scores [B, V] of t or more weigh at least wanted [B] together; weights [B, V], or None for 1 each. Exact but for the rounding of
    a sum; wanted must not be more than everything weighs. Rows where idle [B] is true keep everything."""
    width = min(WIDTH, scores.shape[-1])
    top, where = jax.lax.top_k(scores, width)
    reached = (jnp.arange(1, width + 1)[None] if weights is None else jnp.cumsum(jnp.take_along_axis(weights, where, -1), -1)) >= wanted[:, None]
    found = reached[:, -1:] | idle[:, None]
    near = jnp.where(idle[:, None], -jnp.inf, jnp.take_along_axis(top, jnp.argmax(reached, -1)[:, None], -1))

    def bisected():
        def enough(kept):
            return (kept.sum(-1, keepdims=True) if weights is None else jnp.where(kept, weights, 0.0).sum(-1, keepdims=True)) >= wanted[:, None]
        return jnp.where(found, near, unordered(largest_threshold(ordered(scores), enough)))
    return jax.lax.cond(found.all(), lambda: near, bisected)


def keep_mass(logits: jax.Array, scores: jax.Array, mass: jax.Array) -> jax.Array:
    """Of the tokens in falling order of scores [B, V] the fewest whose probability reaches mass [B] stay, and those that score like the last; mass 1 keeps all."""
    probabilities = jax.nn.softmax(logits, -1)
    wanted = jnp.minimum(mass, probabilities.sum(-1) * (1 - 1e-6))
    return jnp.where(scores >= cut(scores, probabilities, wanted, mass >= 1), logits, LOW)


# filters

def keep_top_k(logits: jax.Array, k: jax.Array) -> jax.Array:
    """Everything below the k-th largest of a row goes; ties with it stay. k [B] int32."""
    return jnp.where(logits >= cut(logits, None, jnp.minimum(k, logits.shape[-1]), k >= logits.shape[-1]), logits, LOW)


def keep_top_p(logits: jax.Array, p: jax.Array) -> jax.Array:
    """The smallest set of the most probable tokens whose mass reaches p stays (ties with its last member too). Holtzman et al. 2019, equation 3."""
    return keep_mass(logits, logits, p)


def keep_min_p(logits: jax.Array, p: jax.Array) -> jax.Array:
    """Tokens less probable than p times the most probable one go. Nguyen et al. 2024, section 3."""
    return jnp.where(logits >= logits.max(-1, keepdims=True) + jnp.log(p)[:, None], logits, LOW)


def keep_typical(logits: jax.Array, p: jax.Array) -> jax.Array:
    """The fewest tokens whose surprise is nearest to the entropy and whose mass reaches p stay. Meister et al. 2022, equation 11."""
    logprobs = jax.nn.log_softmax(logits, -1)
    entropy = -jnp.where(allowed(logits), jnp.exp(logprobs) * logprobs, 0.0).sum(-1, keepdims=True)
    return keep_mass(logits, jnp.where(allowed(logits), -jnp.abs(-logprobs - entropy), LOW), p)


def keep_top_n_sigma(logits: jax.Array, n: jax.Array) -> jax.Array:
    """Logits more than n standard deviations (of the logits that are left) below the largest go. Tang et al. 2024, equation 4."""
    left = allowed(logits)
    count = left.sum(-1, keepdims=True)
    mean = jnp.where(left, logits, 0.0).sum(-1, keepdims=True) / count
    sigma = jnp.sqrt(jnp.where(left, (logits - mean) ** 2, 0.0).sum(-1, keepdims=True) / count)
    return jnp.where(logits >= logits.max(-1, keepdims=True) - n[:, None] * sigma, logits, LOW)


def keep_surprise(logits: jax.Array, mu: jax.Array) -> jax.Array:
    """Tokens that would surprise by more than mu [B] bits go; the most probable one stays. Mirostat 2: Basu et al. 2020, algorithm 2, as llama.cpp has it."""
    bits = -jax.nn.log_softmax(logits, -1) / jnp.log(2.0)
    return jnp.where((bits <= mu[:, None]) | (logits >= logits.max(-1, keepdims=True)), logits, LOW)


# penalties

def penalize_repetition(logits: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """Logits of tokens already in the row, seen [B, V] bool, divided by the penalty where positive and multiplied where negative. CTRL: Keskar et al. 2019, section 4.1."""
    p = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / p, logits * p), logits)


def penalize_counts(logits: jax.Array, counts: jax.Array, frequency: jax.Array | None, presence: jax.Array | None) -> jax.Array:
    """Logits less frequency [B] times how often each token was made, counts [B, V] int32, and less presence [B] where it was. As OpenAI's API defines them."""
    if frequency is not None:
        logits = logits - frequency[:, None] * counts.astype(jnp.float32)
    return logits if presence is None else logits - presence[:, None] * (counts > 0)


def repeats(recent: jax.Array, limit: jax.Array) -> jax.Array:
    """recent [B, H], limit [B] -> [B, H] int32: at k how many of the newest tokens also stand k tokens earlier, limit at most; 0 at k = 0. One pass over H per token of the longest repeat."""
    length = recent.shape[1]
    wide = jnp.pad(recent, ((0, 0), (0, length)), constant_values=-1)

    def longer(carry):
        n, going, found = carry
        now, earlier = jax.lax.dynamic_slice_in_dim(wide, n, 1, 1), jax.lax.dynamic_slice_in_dim(wide, n, length, 1)
        going = going & (now == earlier) & (now >= 0) & (n < limit)[:, None]
        return n + 1, going, found + going
    start = jnp.broadcast_to(jnp.arange(length) > 0, recent.shape)
    return jax.lax.while_loop(lambda carry: carry[1].any(), longer, (0, start, jnp.zeros(recent.shape, jnp.int32)))[2]


def penalize_dry(logits: jax.Array, recent: jax.Array, multiplier: jax.Array, base: jax.Array, allowed_length: jax.Array, last_n: jax.Array, breakers: jax.Array | None) -> jax.Array:
    """DRY, as llama.cpp has it: a token that would make a repeat of n tokens longer, n >= allowed_length, loses multiplier · base^(n - allowed_length).

    recent [B, H] int32; multiplier, base [B] float32; allowed_length, last_n (tokens looked back at) [B] int32; breakers: packed bits [B, V/32] of the tokens that no repeat goes over
    and that are never penalised, or None. No penalty is so large that float32 overflows, or that a token is ruled out.
    """
    rows, length = jnp.arange(recent.shape[0])[:, None], recent.shape[1]
    recent = jnp.where(jnp.arange(length)[None] < last_n[:, None], recent, -1)
    limit = jnp.full(recent.shape[:1], length, jnp.int32)
    if breakers is not None:
        breaks = (recent >= 0) & bit_at(breakers, recent)
        limit = jnp.where(breaks.any(-1), jnp.argmax(breaks, -1), limit)
    counted = repeats(recent, limit)[:, 1:]                             # what came k tokens ago was followed by recent[k - 1]
    following = jnp.where((counted > 0) & (counted >= allowed_length[:, None]), recent[:, :-1], logits.shape[-1])
    longest = jnp.zeros(logits.shape, jnp.int32).at[rows, following].max(counted, mode="drop")
    penalty = jnp.minimum(multiplier[:, None] * base[:, None] ** (longest - allowed_length[:, None]).astype(jnp.float32), -LOW / 10)
    fined = (longest > 0) & (longest >= allowed_length[:, None])
    if breakers is not None:
        fined = fined & ~bits_on(breakers, logits.shape[-1])
    return jnp.where(fined & (multiplier > 0)[:, None], logits - penalty, logits)


# single tokens

def add_bias(logits: jax.Array, ids: jax.Array, values: jax.Array) -> jax.Array:
    """ids [B, K] int32 (V: none), values [B, K] float32 are added to those logits."""
    return logits.at[jnp.arange(len(ids))[:, None], ids].add(values, mode="drop")


def bits_on(bits: jax.Array, size: int) -> jax.Array:
    """Packed bits [B, W] int32, bit i of word w being token 32 w + i -> [B, size] bool."""
    on = (bits[:, :, None] >> jnp.arange(32, dtype=jnp.int32)[None, None]) & 1
    return (on == 1).reshape(len(bits), -1)[:, :size]


def bit_at(bits: jax.Array, ids: jax.Array) -> jax.Array:
    """Packed bits [B, W], ids [B, H] -> [B, H] bool."""
    ids = jnp.maximum(ids, 0)
    return (jnp.take_along_axis(bits, ids >> 5, 1) >> (ids & 31)) & 1 == 1


def keep_bits(logits: jax.Array, bits: jax.Array) -> jax.Array:
    """Tokens whose bit is off go; bits [B, ceil(V / 32)] int32."""
    return jnp.where(bits_on(bits, logits.shape[-1]), logits, LOW)


def drop_bad_words(logits: jax.Array, words: jax.Array, recent: jax.Array | None) -> jax.Array:
    """The last token of a sequence goes where the text ends with the rest of it. words [B, N, L] int32: each from its last token backwards, -1 after its first; V as the last: no sequence."""
    fits = jnp.ones(words.shape[:2], bool)
    if words.shape[-1] > 1:
        before = words[:, :, 1:]
        assert recent is not None
        fits = ((before == recent[:, None, :before.shape[-1]]) | (before < 0)).all(-1)
    last = jnp.where(fits, words[:, :, 0], logits.shape[-1])
    return logits.at[jnp.arange(len(words))[:, None], last].set(LOW, mode="drop")


def drop_early(logits: jax.Array, ids: jax.Array, early: jax.Array) -> jax.Array:
    """ids [B, E] int32 (V: none) go in the rows where early [B] is true."""
    return logits.at[jnp.arange(len(ids))[:, None], jnp.where(early[:, None], ids, logits.shape[-1])].set(LOW, mode="drop")


# drawing

def pick(weights: jax.Array, u: jax.Array) -> jax.Array:
    """weights [B, n] >= 0, u [B] in [0, 1) -> [B] int32: the first whose running sum goes over u times all of it; never one that weighs nothing."""
    total = jnp.cumsum(weights, -1)
    over = (total > u[:, None] * total[:, -1:]) & (weights > 0)
    return jnp.where(over.any(-1), jnp.argmax(over, -1), jnp.argmax(weights, -1)).astype(jnp.int32)


def draw(weights: jax.Array, u: jax.Array, block: int = 512) -> jax.Array:
    """A token in proportion to weights [B, V], of two uniform numbers u [B, 2]: first a block of tokens, then one in it, so that a number of 23 bits is fine enough for any vocabulary."""
    rows, size = weights.shape
    parts = jnp.pad(weights, ((0, 0), (0, -size % block))).reshape(rows, -1, block)
    chosen = pick(parts.sum(-1), u[:, 0])
    return chosen * block + pick(jnp.take_along_axis(parts, chosen[:, None, None], 1)[:, 0], u[:, 1])


def weigh(logits: jax.Array) -> jax.Array:
    """Probabilities in proportion, [B, V], 1 for the largest and 0 for what may not be drawn."""
    return jnp.where(allowed(logits), jnp.exp(logits - logits.max(-1, keepdims=True)), 0.0)
