"""The one step of the engine: forward over the paged cache and a draw per row, in one program; the newest token of each row stays on the device, so that the next step can be sent
before this one is read.

Legend: r rows of this call, T tokens of each, W pages in a row's table, R rows of the engine, V vocabulary.
"""
from __future__ import annotations

import dataclasses as dc
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass

from llmjax.core import chosen
from llmjax.decode.history import History
from llmjax.decode.sampling import NUMBERS, Sampling, best_logprobs, sample
from llmjax.models import Cache
from llmjax.models.cache import Pool

TOP = 20               # log-probabilities of the best tokens that a request may ask for
PLAIN, DRAWN, FILTERED, FULL = 0, 1, 2, 3
BIASES, ENDS = 320, 16      # logit biases and end tokens of a row


@register_dataclass
@dc.dataclass(frozen=True)
class Rows:
    """What one call feeds. tokens [r, T]; start, count [r]: count tokens from position start (0: an idle row); table [r, W]; row [r] of the engine; again [r] bool: the token is the one
    this row drew last, which the host may not know yet; draws [r] bool; seed [r] uint32 and fold [r]: a draw's key is that of (seed, fold, position). made [r]: tokens drawn before.
    knobs: Sampling with all that level FULL uses, each [r]; mask [r, ceil(V / 32)] int32: a grammar's bits. level [] int32: what of it any row uses (PLAIN: nothing, DRAWN: temperature,
    FILTERED: top_k, top_p, min_p too, FULL: everything); top [] bool: whether any row wants the best tokens' log-probabilities. adapter [r]: the place of its adapter, from 1, or 0."""
    tokens: Any
    start: Any
    count: Any
    table: Any
    row: Any
    again: Any
    draws: Any
    seed: Any
    fold: Any
    made: Any
    knobs: Sampling
    mask: Any
    level: Any
    top: Any
    adapter: Any


@register_dataclass
@dc.dataclass(frozen=True)
class Drawn:
    """tokens [r] int32; logprobs [r] float32 under the model's own softmax (not finite where the logits were not); best_ids, best [r, TOP]."""
    tokens: jax.Array
    logprobs: jax.Array
    best_ids: jax.Array
    best: jax.Array


def draw(logits: jax.Array, rows: Rows, positions: jax.Array, history: History) -> tuple[jax.Array, jax.Array]:
    """A token and its log-probability per row [r]; pays for what some row uses."""
    keys = jax.vmap(lambda s, f: jax.random.fold_in(jax.random.key(s), f))(rows.seed, rows.fold)
    k = rows.knobs

    def full() -> tuple[jax.Array, jax.Array]:
        assert history.seen is not None and history.counts is not None
        mine = History(seen=history.seen[rows.row], counts=history.counts[rows.row], made=rows.made)
        return sample(logits, k, keys, positions, mine, rows.mask)[:2]
    forms = (Sampling(), Sampling(k.temperature), Sampling(k.temperature, k.top_k, k.top_p, k.min_p))
    return jax.lax.switch(rows.level, [*(lambda s=s: sample(logits, s, keys, positions)[:2] for s in forms), full])


def best_tokens(logits: jax.Array, wanted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(ids, log-probabilities) [r, TOP] of the most probable tokens, or zeros where nobody wants them."""
    count = min(TOP, logits.shape[-1])

    def nothing() -> tuple[jax.Array, jax.Array]:
        return jnp.zeros((logits.shape[0], count), jnp.int32), jnp.zeros((logits.shape[0], count), jnp.float32)
    return jax.lax.cond(wanted, lambda: best_logprobs(logits, count), nothing)


@register_dataclass
@dc.dataclass(frozen=True)
class Memory:
    """What stays on the device between steps. cache: without a table (a call's own is in Rows, and its shape must not make another program of it); last [R + 1] int32: the newest token
    of each row (the last place is nobody's); history: `seen` and `counts` [R + 1, V], right for rows that have penalties."""
    cache: Cache
    last: jax.Array
    history: History


def step(model: Any, params: Any, memory: Memory, rows: Rows) -> tuple[Memory, Drawn]:
    """Feeds and draws."""
    params = chosen(params, rows.adapter)
    tokens = jnp.where(rows.again[:, None], memory.last[rows.row][:, None], rows.tokens)
    offsets = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    positions, segments = rows.start[:, None] + offsets, (offsets < rows.count[:, None]).astype(jnp.int32)
    x, cache = model.apply({"params": params}, tokens, positions, segments, dc.replace(memory.cache, table=rows.table), method="features")
    x = jnp.take_along_axis(x, jnp.maximum(rows.count - 1, 0)[:, None, None], 1)
    logits = model.apply({"params": params}, x, method="unembed")[:, 0]
    token, logprob = draw(logits, rows, rows.start + rows.count, memory.history)
    ids, best = best_tokens(logits, rows.top)
    row = jnp.where(rows.draws, rows.row, memory.last.shape[0] - 1)
    seen, counts = memory.history.seen, memory.history.counts
    assert seen is not None and counts is not None
    history = History(seen=seen.at[row, token].set(True), counts=counts.at[row, token].add(1))
    return Memory(dc.replace(cache, table=None), memory.last.at[row].set(token), history), Drawn(token, logprob, ids, best)


@functools.partial(jax.jit, donate_argnums=0)
def recall(history: History, row: jax.Array, prompt: jax.Array, answer: jax.Array) -> History:
    """With a row that begins: prompt [P] and answer so far [A] int32, padded with -1."""
    assert history.seen is not None and history.counts is not None
    size = history.seen.shape[1]

    def known(ids: jax.Array) -> jax.Array:
        return jnp.where(ids < 0, size, ids)
    seen = jnp.zeros(size, bool).at[known(prompt)].set(True, mode="drop").at[known(answer)].set(True, mode="drop")
    counts = jnp.zeros(size, jnp.int32).at[known(answer)].add(1, mode="drop")
    return History(seen=history.seen.at[row].set(seen), counts=history.counts.at[row].set(counts))


@functools.lru_cache(maxsize=64)
def program(model: Any, tree: Any, leaves: tuple[jax.ShapeDtypeStruct, ...]) -> Any:
    args = jax.tree.unflatten(tree, leaves)
    places = jax.tree.map(lambda x: x.sharding, args[1])
    return jax.jit(functools.partial(step, model), donate_argnums=1, out_shardings=(places, None)).lower(*args).compile()


def compiled(model: Any, params: Any, memory: Any, rows: Rows) -> Any:
    """`step` of this model, compiled ahead for arguments of these shapes and places: (params, memory, rows) -> (memory, drawn). The memory is given away."""
    def abstract(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))
    leaves, tree = jax.tree.flatten(jax.tree.map(abstract, (params, memory, rows)))
    return program(model, tree, tuple(leaves))


NEUTRAL = dict(temperature=0.0, top_k=NUMBERS["top_k"].neutral, top_p=1.0, min_p=0.0, repetition_penalty=1.0, frequency_penalty=0.0, presence_penalty=0.0, min_tokens=0)


def empty_rows(rows: int, width: int, pages: int, engine_rows: int, vocab_size: int, mask: Any = None) -> Rows:
    """Idle rows, as numpy arrays to be filled in. pages: W. mask: of no grammar, where one was made before."""
    def ints(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.int32)
    numbers: dict[str, Any] = {name: np.full(rows, value, np.int32 if NUMBERS[name].whole else np.float32) for name, value in NEUTRAL.items()}
    knobs = Sampling(**numbers, logit_bias=(np.full((rows, BIASES), vocab_size, np.int32), np.zeros((rows, BIASES), np.float32)), end_tokens=np.full((rows, ENDS), vocab_size, np.int32))      # type: ignore[arg-type]
    return Rows(ints(rows, width), ints(rows), ints(rows), ints(rows, pages), np.full(rows, engine_rows, np.int32), np.zeros(rows, bool), np.zeros(rows, bool), np.zeros(rows, np.uint32),
                ints(rows), ints(rows), knobs, no_mask(rows, vocab_size) if mask is None else mask, np.int32(PLAIN), np.bool_(False), ints(rows))


def no_mask(rows: int, vocab_size: int) -> np.ndarray:
    return np.full((rows, -(-vocab_size // 32)), -1, np.int32)


@functools.partial(jax.jit, donate_argnames="cache")
def clean(cache: Cache, pages: jax.Array) -> Cache:
    """The cache with these pages [n] int32 set to zero (below 0: none): what is not finite must not outlive its sequence, for a masked key is multiplied by zero, and zero times NaN
    is NaN."""
    def one(kept: Any, axis: int) -> Any:
        if not isinstance(kept, Pool):
            return kept
        return jax.tree.map(lambda x: x.at[(*(slice(None),) * axis, jnp.where(pages < 0, x.shape[axis], pages))].set(0, mode="drop"), kept)
    return dc.replace(cache, layers={part: tuple(one(kept, int(part == "cycle")) for kept in entries) for part, entries in cache.layers.items()})
