"""Attention over keys and values that lie in pages of one pool (Kwon et al. 2023, arXiv:2309.06180, section 4.1): position p of row b is offset p mod page of page table[b, p // page].

`paged` goes over the pages in blocks with an online softmax, from the first block that some row's window reaches to the last that some row has written, so that a step costs what is in
use, not what the table could name, and no row's keys are ever whole in memory. `dense` is the slow twin: every page the table names side by side, then the whole score matrix.
It is plain JAX and runs on every platform; kernels of jax for one platform may come behind the same function.

Legend: B rows, T query length, S keys of a block, P pages, W width of the table, N query heads, K kv heads, G queries per kv head, H head dim.
"""
import dataclasses

import jax
import jax.numpy as jnp

from llmjax.core.contract import accumulate
from llmjax.core.platform import platform
from llmjax.kernels.attention.few import few_in_pages, fits
from llmjax.kernels.attention.merged import narrowed, pays, widened
from llmjax.kernels.attention.scores import gather, spread
from llmjax.kernels.attention.stored import decode

BLOCK = 128             # keys a row and turn: measured on a CPU (1 to 16 rows, 64 to 512 keys), fewer make more turns, more do not stay in the processor's cache
SCORES = 1 << 21        # but no more scores of all heads and rows at once than these, where queries are many
TPU = 2048, 1 << 20     # the same on a TPU, by whose compiler's estimate a turn costs some 20,000 cycles before it reads anything (as much as 16,000 keys of a head), so few turns where rows are
                        # few; 64 rows of 2,048 keys cost a seventh more in fours of 512 than in two of 1,024, and a text of 100 tokens half as much


@dataclasses.dataclass(frozen=True)
class Rule:
    """Who sees whom beyond causality, hashable. window: a query sees so many positions, its own included; chunk: only those of its own chunk of so many; globals: with a window, also the
    first so many."""
    window: int | None = None
    chunk: int | None = None
    globals: int | None = None

    def sees(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """query [B, T], key [S] positions -> bool [B, T, S]."""
        q, k = query[:, :, None], key[None, None, :]
        see = k <= q
        if self.window is not None:
            near = q - k < self.window
            see = see & (near if self.globals is None else near | (k < self.globals) | (q < self.globals))
        return see if self.chunk is None else see & (q // self.chunk == k // self.chunk)


def paged(q, k, v, table, positions, used, *, rule: Rule = Rule(), softcap: float | None, scale: float, sinks=None, slopes=None, width: int | None = None, block: int | None = None) -> jax.Array:
    """The sum of `reference` over positions 0 … p of each row, causal. Not differentiable (decoding alone).

    q [B, T, N, H]; k [P, page, K, H], v [P, page, K, Hv], arrays or quantised (stored.py); table [B, W] int32 (entries beyond a row's newest page may be anything); positions [B, T]
    int32, the newest key each query may see; used [B, T] bool: others are padding and give zeros. width: values are the first `width` numbers of keys (v is not read). sinks, slopes [N]:
    see `reference`.
    -> [B, T, N, Hv] in `q.dtype`; scores and sums are float32, probabilities enter their product in `q.dtype`.
    """
    (B, T, N, _), (P, page, heads), W = q.shape, k.shape[:3], table.shape[1]
    if fits(q, k, v, width=width, softcap=softcap, slopes=slopes):
        see = rule.sees(positions, jnp.arange(W * page, dtype=jnp.int32)) & used[:, :, None]
        return few_in_pages(q, k, v, table, see, scale=scale, sinks=sinks, width=width)
    K = 1 if width is None and pays(q, k) else heads         # all kv heads as one; the pages are joined once they are collected, for XLA would copy a pool of another shape into the loop
    if heads > K:
        q = widened(q, heads)
    most, scores = TPU if platform() == "tpu" else (BLOCK, SCORES)
    count = max(1, min(max(1, min(block or most, scores // (B * N * T))) // page, W))      # pages a turn
    table = jnp.clip(jnp.pad(table, [(0, 0), (0, -W % count)]), 0, P - 1)
    newest = jnp.max(jnp.where(used, positions, -1), 1)                                    # [B]
    grouped = q.reshape(B, T, K, N // K, -1).transpose(0, 2, 3, 1, 4)                      # [B, K, G, T, H]; gathered, G and T are one axis
    sinks, slopes = (None if x is None else x.astype(jnp.float32).reshape(1, K, N // K, 1, 1) for x in (sinks, slopes))
    seen = jnp.where(used, positions, -1)

    def step(j, carry):
        top, norm, total = carry
        pages = jax.lax.dynamic_slice_in_dim(table, j * count, count, 1)                   # [B, count]
        at = j * count * page + jnp.arange(count * page, dtype=jnp.int32)                  # [S]
        keys, values = (heads_first(decode(jax.tree.map(lambda x: x[pages], kept), q.dtype).reshape(B, count * page, K, -1).astype(q.dtype)) for kept in (k, v))       # [B, K, S, H]
        values = values if width is None else keys[..., :width]
        values = jnp.where((at[None] <= newest[:, None])[:, None, :, None], values, 0)     # what an earlier tenant of a page left there may be NaN, and 0 · NaN is not 0
        scores = spread(accumulate("bkph,bksh->bkps", gather(grouped), keys), grouped) * scale
        scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
        if slopes is not None:
            scores = scores - slopes * jnp.abs(seen[:, :, None] - at[None, None]).astype(jnp.float32)[:, None, None]
        scores = jnp.where(rule.sees(seen, at)[:, None, None], scores, -jnp.inf)
        new = jnp.maximum(top, scores.max(-1, keepdims=True))
        safe = jnp.where(jnp.isneginf(new), 0.0, new)                                      # nothing seen yet: exp(-inf - 0) = 0, never exp(-inf + inf)
        p, shrink = jnp.exp(scores - safe), jnp.exp(top - safe)
        total = total * shrink + spread(accumulate("bkps,bksh->bkph", gather(p.astype(q.dtype)), values), grouped)
        return new, norm * shrink + p.sum(-1, keepdims=True), total
    top = jnp.full((B, K, N // K, T, 1), -jnp.inf, jnp.float32) if sinks is None else jnp.broadcast_to(sinks, (B, K, N // K, T, 1))
    norm = jnp.zeros_like(top) if sinks is None else jnp.ones_like(top)
    stop = jnp.max(newest) // (count * page) + 1
    first = 0 if rule.window is None or rule.globals is not None else jnp.maximum(jnp.min(jnp.where(used, positions, jnp.iinfo(jnp.int32).max)) - rule.window + 1, 0) // (count * page)
    Hv = v.shape[-1] * heads // K if width is None else width
    _, norm, total = jax.lax.fori_loop(first, stop, step, (top, norm, jnp.zeros((B, K, N // K, T, Hv), jnp.float32)))
    out = (total / jnp.where(norm == 0, 1.0, norm)).astype(q.dtype) * used[:, None, None, :, None].astype(q.dtype)
    out = out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, Hv)
    return narrowed(out, heads) if heads > K else out


def heads_first(x: jax.Array) -> jax.Array:
    """x [B, S, K, H] -> [B, K, S, H]; on a CPU before the product, not in it: measured 10 to 25 % faster, for what collects the pages turns them in the same pass."""
    x = x.swapaxes(1, 2)
    return jax.lax.optimization_barrier(x) if platform() == "cpu" else x


def dense(q, k, v, table, positions, used, *, rule: Rule = Rule(), softcap: float | None, scale: float, sinks=None, slopes=None, width: int | None = None) -> jax.Array:
    """The slow twin of `paged`, same arguments: all pages of a row side by side, all scores in float32."""
    (B, T, N, H), (P, page, K), W = q.shape, k.shape[:3], table.shape[1]
    keys, values = (decode(x, jnp.float32)[jnp.clip(table, 0, P - 1)].reshape(B, W * page, K, -1).astype(jnp.float32) for x in (k, v))
    values = values if width is None else keys[..., :width]
    at = jnp.arange(W * page, dtype=jnp.int32)
    scores = jnp.einsum("btkgh,bskh->bkgts", q.reshape(B, T, K, N // K, H).astype(jnp.float32), keys, precision="highest") * scale
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    if slopes is not None:
        scores = scores - slopes.astype(jnp.float32).reshape(1, K, N // K, 1, 1) * jnp.abs(positions[:, :, None] - at[None, None]).astype(jnp.float32)[:, None, None]
    see = (rule.sees(positions, at) & used[:, :, None])[:, None, None]
    scores = jnp.where(see, scores, -1e30)
    if sinks is not None:
        scores = jnp.concatenate([scores, jnp.broadcast_to(sinks.astype(jnp.float32).reshape(1, K, N // K, 1, 1), (*scores.shape[:-1], 1))], -1)
    probs = jax.nn.softmax(scores, -1)[..., : W * page] * see
    there = (at[None] <= jnp.max(jnp.where(used, positions, -1), 1, keepdims=True))[:, :, None, None]
    return jnp.einsum("bkgts,bskh->btkgh", probs, jnp.where(there, values, 0), precision="highest").reshape(B, T, N, values.shape[-1]).astype(q.dtype)
