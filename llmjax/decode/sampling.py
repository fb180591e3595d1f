"""From logits to a token: per-row knobs (`Sampling`, checked by `make_sampling`), what they make of logits (`adjusted`, `filtered`), and one draw whose randomness depends on
(seed, position) alone. The functions on logits are in filters.py, what a row's text so far was in history.py.

Legend: B rows, V vocabulary.
"""
from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass

from llmjax.core import ConfigError
from llmjax.core.errors import nearest
from llmjax.decode import filters
from llmjax.decode.history import History, Wanted, begin_history, remember


@register_dataclass
@dc.dataclass(frozen=True)
class Sampling:
    """Per-row knobs, each [B] float32 unless said otherwise, or None where no row uses it (the step is then compiled without it). Applied in this order:

    logit_bias: ids [B, K] int32 and what is added to their logits [B, K].
    repetition_penalty (CTRL, Keskar et al. 2019; over prompt and answer); frequency_penalty, presence_penalty (OpenAI; over the answer).
    dry_multiplier, dry_base, dry_allowed_length [B] int32, dry_penalty_last_n [B] int32, dry_sequence_breakers [B, W] packed bits: llama.cpp's DRY, over prompt and answer.
    allowed_token_ids [B, W] packed bits; bad_words [B, N, L] int32 (filters.drop_bad_words); min_tokens [B] int32: before so many, end_tokens [B, E] int32 may not come.
    temperature: 0 takes the best token, and nothing below applies.
    top_n_sigma (Tang et al. 2024); top_k [B] int32; top_p (Holtzman et al. 2019); min_p (Nguyen et al. 2024); typical_p (Meister et al. 2022), each among what the former left.
    mirostat_tau (bits), mirostat_eta: mirostat 2 (Basu et al. 2020).
    """
    temperature: jax.Array | None = None
    top_k: jax.Array | None = None
    top_p: jax.Array | None = None
    min_p: jax.Array | None = None
    typical_p: jax.Array | None = None
    top_n_sigma: jax.Array | None = None
    mirostat_tau: jax.Array | None = None
    mirostat_eta: jax.Array | None = None
    repetition_penalty: jax.Array | None = None
    frequency_penalty: jax.Array | None = None
    presence_penalty: jax.Array | None = None
    dry_multiplier: jax.Array | None = None
    dry_base: jax.Array | None = None
    dry_allowed_length: jax.Array | None = None
    dry_penalty_last_n: jax.Array | None = None
    dry_sequence_breakers: jax.Array | None = None
    logit_bias: tuple[jax.Array, jax.Array] | None = None
    allowed_token_ids: jax.Array | None = None
    bad_words: jax.Array | None = None
    min_tokens: jax.Array | None = None
    end_tokens: jax.Array | None = None


@dc.dataclass(frozen=True)
class Number:
    """A knob that is a number: what it is where a row does not use it, what is allowed, in words and as a function, and the knob it says something about, if any."""
    neutral: float
    words: str
    fits: Callable[[Any], bool]
    of: str | None = None
    whole: bool = False


MOST = np.iinfo(np.int32).max
NUMBERS = {
    "temperature": Number(0.0, "0 (takes the best token), or 1e-5 or more", lambda v: v == 0 or v >= 1e-5),
    "top_k": Number(MOST, "a whole number from 1", lambda v: v >= 1, whole=True),
    "top_p": Number(1.0, "above 0 and at most 1", lambda v: 0 < v <= 1),
    "min_p": Number(0.0, "from 0 to 1", lambda v: 0 <= v <= 1),
    "typical_p": Number(1.0, "above 0 and at most 1", lambda v: 0 < v <= 1),
    "top_n_sigma": Number(1e6, "above 0 (standard deviations)", lambda v: v > 0),
    "mirostat_tau": Number(np.inf, "above 0 (bits of surprise; llama.cpp takes 5)", lambda v: v > 0),
    "mirostat_eta": Number(0.1, "above 0 and at most 1 (the learning rate; llama.cpp takes 0.1)", lambda v: 0 < v <= 1, of="mirostat_tau"),
    "repetition_penalty": Number(1.0, "above 0 (1 changes nothing)", lambda v: v > 0),
    "frequency_penalty": Number(0.0, "from -2 to 2", lambda v: -2 <= v <= 2),
    "presence_penalty": Number(0.0, "from -2 to 2", lambda v: -2 <= v <= 2),
    "dry_multiplier": Number(0.0, "0 or more (0 changes nothing)", lambda v: v >= 0),
    "dry_base": Number(1.75, "1 or more", lambda v: v >= 1, of="dry_multiplier"),
    "dry_allowed_length": Number(2, "a whole number from 1", lambda v: v >= 1, of="dry_multiplier", whole=True),
    "dry_penalty_last_n": Number(MOST, "a whole number from 1 (tokens looked back at)", lambda v: v >= 1, of="dry_multiplier", whole=True),
    "min_tokens": Number(0, "a whole number from 0", lambda v: v >= 0, whole=True),
}
LISTS = {"logit_bias": 0, "allowed_token_ids": 1, "bad_words": 2, "end_tokens": 1, "dry_sequence_breakers": 1}      # how deep one row's lists go
KNOBS = (*NUMBERS, *LISTS)


def make_sampling(rows: int, vocab_size: int | None = None, **knobs: Any) -> Sampling:
    """Knobs checked and laid out for `rows` rows. A number, or one per row (None: not in this row); logit_bias {id: what is added}, allowed_token_ids and dry_sequence_breakers lists of
    ids, bad_words lists of lists of ids, end_tokens (what min_tokens holds back) a list of ids, or a list of such per row. vocab_size: the model's, needed for those with ids.
    What makes arrays wider is rounded up to a power of two, so that few programs are compiled. Raises ConfigError naming the knob, its value and what is allowed.
    """
    unknown = [name for name in knobs if name not in KNOBS]
    if unknown:
        raise ConfigError(f"{unknown[0]}={knobs[unknown[0]]!r}: there is no such knob" + nearest(unknown[0], KNOBS))
    found: dict[str, Any] = {}
    for name, knob in NUMBERS.items():
        values = per_row(name, knobs.get(name), rows, 0)
        for v in values:
            if v is not None and (isinstance(v, bool | str) or np.ndim(v) or not np.isfinite(v) or not knob.fits(v) or (knob.whole and v != int(v))):
                raise ConfigError(f"{name}={v!r}: {knob.words} is wanted")
        if knob.of and any(v is not None for v in values) and knobs.get(knob.of) is None:
            raise ConfigError(f"{name} says something about {knob.of}, which is not given")
        filled = [knob.neutral if v is None else min(v, MOST) if knob.whole else v for v in values]
        if any(v != knob.neutral for v in filled) or (knob.of in found):
            found[name] = jnp.asarray(filled, jnp.int32 if knob.whole else jnp.float32)
    lists = {name: per_row(name, knobs.get(name), rows, depth) for name, depth in LISTS.items()}
    if any(v is not None for name in LISTS for v in lists[name]):
        found |= token_knobs(lists, vocab_size, "dry_multiplier" in found)
    if "min_tokens" in found and "end_tokens" not in found:
        del found["min_tokens"]                                          # nothing ends these rows
    if "min_tokens" not in found:
        found.pop("end_tokens", None)
    return Sampling(**found)


def per_row(name: str, value: Any, rows: int, depth: int) -> list[Any]:
    """A knob's value for each row; `depth` is how many lists deep one row's value is."""
    def deep(x):
        if not isinstance(x, list | tuple | range | np.ndarray | jax.Array) or getattr(x, "ndim", 1) == 0:
            return 0
        return 1 + max((deep(y) for y in x), default=0)
    if value is None:
        return [None] * rows
    if deep(value) <= depth and not (depth and isinstance(value, list | tuple) and any(v is None for v in value)):
        return [value] * rows
    if len(value) != rows:
        raise ConfigError(f"{name}: {len(value)} values for {rows} rows; give one, or one per row")
    return [None if v is None else v for v in value]


def token_knobs(lists: dict[str, list[Any]], vocab_size: int | None, dry: bool) -> dict[str, Any]:
    """The knobs made of ids, as arrays."""
    if vocab_size is None:
        name = next(name for name, values in lists.items() if any(v is not None for v in values))
        raise ConfigError(f"{name} names ids: make_sampling needs vocab_size to check them")

    def check(name, ids):
        for x in ids:
            if isinstance(x, bool) or not isinstance(x, int | np.integer):
                raise ConfigError(f"{name}: {x!r} is no id; ids are whole numbers")
            if not 0 <= x < vocab_size:
                raise ConfigError(f"{name}: id {x} is outside the model's vocabulary of {vocab_size}")
        return ids

    def packed(name, neutral):
        table = np.full((len(lists[name]), -(-vocab_size // 32)), neutral, np.int32)
        for row, ids in zip(table, lists[name]):
            if ids is not None:
                row[:] = pack(check(name, ids), vocab_size)
        return jnp.asarray(table)

    def ragged(rows, fill, dtype=np.int32):
        table = np.full((len(rows), 1 << (max(1, *map(len, rows)) - 1).bit_length() if rows else 1), fill, dtype)
        for row, values in zip(table, rows):
            row[:len(values)] = values
        return table
    given = {name for name, values in lists.items() if any(v is not None and len(v) for v in values)}
    found: dict[str, Any] = {}
    if "logit_bias" in given:
        biases = [v or {} for v in lists["logit_bias"]]
        for b in biases:
            if not isinstance(b, dict):
                raise ConfigError(f"logit_bias={b!r}: a mapping of ids to numbers is wanted")
            check("logit_bias", list(b))
            wrong = [x for x in b.values() if isinstance(x, bool | str) or not abs(x) <= 1e6]
            if wrong:
                raise ConfigError(f"logit_bias: {wrong[0]!r} is no number from -1e6 to 1e6")
        found["logit_bias"] = (jnp.asarray(ragged([list(b) for b in biases], vocab_size)), jnp.asarray(ragged([list(b.values()) for b in biases], 0.0, np.float32)))
    if any(v is not None and not len(v) for v in lists["allowed_token_ids"]):
        raise ConfigError("allowed_token_ids is empty: nothing could be drawn; leave it out")
    if "allowed_token_ids" in given:
        found["allowed_token_ids"] = packed("allowed_token_ids", -1)
    if "bad_words" in given:
        words = [[list(check("bad_words", w))[::-1] for w in v or ()] for v in lists["bad_words"]]
        if any(not w for row in words for w in row):
            raise ConfigError("bad_words: an empty sequence; leave it out")
        count, longest = (1 << (max(1, max(sizes)) - 1).bit_length() for sizes in ([len(row) for row in words], [len(w) for row in words for w in row]))
        table = np.full((len(words), count, longest), -1, np.int32)
        table[:, :, 0] = vocab_size
        for i, row in enumerate(words):
            for j, w in enumerate(row):
                table[i, j, :len(w)] = w
        found["bad_words"] = jnp.asarray(table)
    if "end_tokens" in given:
        found["end_tokens"] = jnp.asarray(ragged([list(check("end_tokens", v or ())) for v in lists["end_tokens"]], vocab_size))
    if "dry_sequence_breakers" in given:
        if not dry:
            raise ConfigError("dry_sequence_breakers says something about dry_multiplier, which is not given")
        found["dry_sequence_breakers"] = packed("dry_sequence_breakers", 0)
    return found


def pack(ids: Sequence[int], vocab_size: int) -> np.ndarray:
    """Ids as bits [ceil(V / 32)] int32: bit i of word w is token 32 w + i."""
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[list(ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def start_history(sampling: Sampling, vocab_size: int, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]] | None = None, *, length: int) -> History:
    """The History these knobs ask for, of texts so far: a list of ids per row (answers: what was made already). length: how long the texts may get, which is how far back DRY looks at
    most. A row's part of a History may be put into another's of the same knobs: jax.tree.map(lambda all, new: all.at[i].set(new[j]), …)."""
    lookback = sampling.bad_words.shape[-1] - 1 if sampling.bad_words is not None else 0
    if sampling.dry_multiplier is not None:
        assert sampling.dry_penalty_last_n is not None
        reach = min(length, int(sampling.dry_penalty_last_n.max()))
        lookback = max(lookback, 1 << (reach - 1).bit_length())
    wanted = Wanted(sampling.repetition_penalty is not None, sampling.frequency_penalty is not None or sampling.presence_penalty is not None, sampling.min_tokens is not None, lookback)
    mu = None if sampling.mirostat_tau is None else 2 * sampling.mirostat_tau
    return begin_history(wanted, vocab_size, prompts, answers, mu)


def adjusted(logits: jax.Array, sampling: Sampling, history: History, mask: jax.Array | None = None) -> jax.Array:
    """What applies to the best token as well: biases, penalties, and what may not be drawn. mask [B, ceil(V / 32)] int32: further bits of what may, a grammar's."""
    s = sampling
    if s.logit_bias is not None:
        logits = filters.add_bias(logits, *s.logit_bias)
    if s.repetition_penalty is not None:
        logits = filters.penalize_repetition(logits, history.seen, s.repetition_penalty)                  # type: ignore[arg-type]
    if s.frequency_penalty is not None or s.presence_penalty is not None:
        logits = filters.penalize_counts(logits, history.counts, s.frequency_penalty, s.presence_penalty)     # type: ignore[arg-type]
    if s.dry_multiplier is not None:
        logits = filters.penalize_dry(logits, history.recent, s.dry_multiplier, s.dry_base, s.dry_allowed_length, s.dry_penalty_last_n, s.dry_sequence_breakers)    # type: ignore[arg-type]
    for bits in (s.allowed_token_ids, mask):
        if bits is not None:
            logits = filters.keep_bits(logits, bits)
    if s.bad_words is not None:
        logits = filters.drop_bad_words(logits, s.bad_words, history.recent)
    if s.min_tokens is not None:
        logits = filters.drop_early(logits, s.end_tokens, history.made < s.min_tokens)                    # type: ignore[arg-type, operator]
    return logits


FILTERS = (("top_n_sigma", filters.keep_top_n_sigma), ("top_k", filters.keep_top_k), ("top_p", filters.keep_top_p), ("min_p", filters.keep_min_p), ("typical_p", filters.keep_typical))


def filtered(logits: jax.Array, sampling: Sampling, history: History) -> jax.Array:
    """Adjusted logits after temperature and filters: the softmax of this is what is drawn from. Rows with temperature 0 are left as they are."""
    if sampling.temperature is None:
        return logits
    greedy = sampling.temperature == 0
    warm = jnp.where(filters.allowed(logits), logits / jnp.where(greedy, 1.0, sampling.temperature)[:, None], filters.LOW)
    for name, keep in FILTERS:
        knob = getattr(sampling, name)
        if knob is not None:
            warm = keep(warm, knob)
    if sampling.mirostat_tau is not None:
        warm = filters.keep_surprise(warm, history.mu)                                                     # type: ignore[arg-type]
    return jnp.where(greedy[:, None], logits, warm)


def distribution(logits: jax.Array, sampling: Sampling, history: History, mask: jax.Array | None = None) -> jax.Array:
    """What `sample` draws from: probabilities [B, V] float32; all on the best token in rows with temperature 0."""
    logits = adjusted(logits, sampling, history, mask)
    best = jax.nn.one_hot(jnp.argmax(logits, -1), logits.shape[-1], dtype=jnp.float32)
    if sampling.temperature is None:
        return best
    weights = filters.weigh(filtered(logits, sampling, history))
    return jnp.where((sampling.temperature == 0)[:, None], best, weights / weights.sum(-1, keepdims=True))


def sample(logits: jax.Array, sampling: Sampling, keys: jax.Array, positions: jax.Array, history: History | None = None, mask: jax.Array | None = None,
           active: jax.Array | None = None) -> tuple[jax.Array, jax.Array, History]:
    """logits [B, V] float32, keys [B] random keys, positions [B] of the tokens drawn -> (tokens [B] int32, their log-probabilities [B] under the model's own softmax, the history with
    them). history: from `start_history`; mask: see `adjusted`; active [B] bool: rows whose history goes on (all)."""
    history = history or History()
    raw, logits = logits, adjusted(logits, sampling, history, mask)
    tokens, mu = jnp.argmax(logits, -1).astype(jnp.int32), history.mu
    if sampling.temperature is not None:
        weights = filters.weigh(filtered(logits, sampling, history))
        drawn = filters.draw(weights, uniforms(keys, positions))
        tokens = jnp.where(sampling.temperature == 0, tokens, drawn)
        mu = next_mu(sampling, history, weights, tokens)
    if jax.tree.leaves(history):
        history = remember(history, tokens, jnp.ones(tokens.shape, bool) if active is None else active, mu)
    return tokens, logprobs_of(raw, tokens), history


def next_mu(sampling: Sampling, history: History, weights: jax.Array, tokens: jax.Array) -> jax.Array | None:
    """Mirostat's mu [B] after tokens [B] were drawn in proportion to weights [B, V]; None without it."""
    if history.mu is None or sampling.mirostat_tau is None or sampling.mirostat_eta is None:
        return history.mu
    surprise = jnp.log2(weights.sum(-1)) - jnp.log2(jnp.take_along_axis(weights, tokens[:, None], -1)[:, 0])
    return jnp.where(jnp.isfinite(sampling.mirostat_tau), history.mu - sampling.mirostat_eta * (surprise - sampling.mirostat_tau), history.mu)


def logprobs_of(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """logits [..., V], tokens [...] -> their log-probabilities [...] under the softmax of logits."""
    return jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0] - jax.nn.logsumexp(logits, -1)


def best_logprobs(logits: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """logits [..., V] -> the `count` most probable ids [..., count] int32 and their log-probabilities [..., count] under the softmax of logits, best first."""
    top, ids = jax.lax.top_k(logits, count)
    return ids.astype(jnp.int32), top - jax.nn.logsumexp(logits, -1, keepdims=True)


def uniforms(keys: jax.Array, positions: jax.Array) -> jax.Array:
    """Two numbers in [0, 1) per row, of its key [B] and position [B]: [B, 2] float32."""
    return jax.vmap(lambda key, position: jax.random.uniform(jax.random.fold_in(key, position), (2,)))(keys, positions)


def row_keys(seed: int | Sequence[int], rows: int) -> jax.Array:
    """One random key per row: of one number the row's fold, of a sequence each row's own. Numbers of 64 bits. Raises ConfigError where there are not as many seeds as rows."""
    seeds: list[Any] = [seed] if np.ndim(seed) == 0 else list(seed)                                    # type: ignore[arg-type]
    wrong = [s for s in seeds if isinstance(s, bool) or not isinstance(s, int | np.integer) or not -(1 << 63) <= s < 1 << 64]
    if wrong:
        raise ConfigError(f"seed={wrong[0]!r}: a whole number of 64 bits is wanted")
    low, high = (jnp.asarray([(int(s) >> shift) & 0xFFFFFFFF for s in seeds], jnp.uint32) for shift in (0, 32))
    keys = jax.vmap(lambda a, b: jax.lax.select(b == 0, jax.random.key_data(jax.random.key(a)), jax.random.key_data(jax.random.fold_in(jax.random.key(a), b))))(low, high)
    keys = jax.random.wrap_key_data(keys)
    if np.ndim(seed) == 0:
        return jax.vmap(lambda i: jax.random.fold_in(keys[0], i))(jnp.arange(rows))
    if len(seeds) != rows:
        raise ConfigError(f"seed: {len(seeds)} seeds for {rows} rows; give one, or one per row")
    return keys
