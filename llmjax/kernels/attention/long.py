"""Attention over many scores: tiles in loops, forward with an online softmax, backward with probabilities made again from the log-sum-exp.

FlashAttention's algorithm (arXiv:2205.14135; the backward of arXiv:2307.08691, algorithm 2) in plain JAX. Where tokens are in order, tiles above the diagonal and outside the
window are not visited. Memory is the inputs, the outputs, float32 copies of dq, dk, dv, and a few tiles of scores of all heads.

Legend: B batch, T query length, S key length, K kv heads, G queries per kv head, H head dim; P = G t, the queries of one tile and kv head as one axis; i query tile, j key tile.
"""
import functools

import jax
import jax.numpy as jnp
from jax.lax import dynamic_slice_in_dim as cut
from jax.lax import dynamic_update_slice_in_dim as put

from llmjax.core.contract import accumulate
from llmjax.kernels.attention.scores import gather, gather_turned, spread


def attend(total, tile, q, k, v, sinks, slopes, where):
    """q [B, K, G, T, H], k [B, K, S, H], v [B, K, S, Hv], sinks, slopes [K, G] float32 or None -> [B, K, G, T, Hv] in `q.dtype`.

    Lengths need not divide by the tile: they are filled with padding.
    """
    T, S = q.shape[3], k.shape[2]
    rows, cols = min(tile, T), min(tile, S)
    over, past = -T % rows, -S % cols
    query_positions, key_positions, query_segments, key_segments = where
    if past and key_segments is None:  # the filled keys are seen by nobody: they are padding
        query_segments, key_segments = jnp.ones_like(query_positions), jnp.ones_like(key_positions)
    fill = lambda x, axis, count: x if x is None or not count else jnp.pad(x, [(0, count if a == axis else 0) for a in range(x.ndim)])
    where = fill(query_positions, 1, over), fill(key_positions, 1, past), fill(query_segments, 1, over), fill(key_segments, 1, past)
    return _tiles(total, (rows, cols), fill(q, 3, over), fill(k, 2, past), fill(v, 2, past), sinks, slopes, where)[:, :, :, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tiles(total, sides, q, k, v, sinks, slopes, where):
    return forward(total, sides, q, k, v, sinks, slopes, where)[0]


def forward(total, sides, q, k, v, sinks, slopes, where, dtype=None):
    """-> out [B, K, G, T, Hv] in `dtype or q.dtype`, log-sum-exp float32 [B, K, G, T, 1] (+inf where nothing is seen). `sides` (queries, keys) of a tile divide T and S."""
    rows, cols = sides
    T, S = q.shape[3], k.shape[2]

    def one(i):
        qi = cut(q, i * rows, rows, 3)

        def step(j, carry):
            top, norm, acc = carry
            s = total.scores(qi, cut(k, j * cols, cols, 2), slopes, _take(where, sides, i, j))
            new = jnp.maximum(top, s.max(-1, keepdims=True))
            safe = jnp.where(jnp.isneginf(new), 0.0, new)  # nothing seen yet: exp(-inf - 0) = 0, never exp(-inf + inf)
            p, shrink = jnp.exp(s - safe), jnp.exp(top - safe)
            acc = acc * shrink + spread(accumulate("bkps,bksh->bkph", gather(p.astype(q.dtype)), cut(v, j * cols, cols, 2)), qi)
            return new, norm * shrink + p.sum(-1, keepdims=True), acc
        start = -jnp.inf if sinks is None else jnp.broadcast_to(sinks[None, :, :, None, None], (*qi.shape[:4], 1))
        top = jnp.full((*qi.shape[:4], 1), start, jnp.float32)
        norm = jnp.zeros_like(top) if sinks is None else jnp.ones_like(top)
        first, stop = _key_tiles(total.pattern, sides, i, S)
        top, norm, acc = jax.lax.fori_loop(first, stop, step, (top, norm, jnp.zeros((*qi.shape[:4], v.shape[-1]), jnp.float32)))
        empty = norm == 0
        return (acc / jnp.where(empty, 1.0, norm)).astype(dtype or q.dtype), jnp.where(empty, jnp.inf, top + jnp.log(norm))
    out, lse = jax.lax.map(one, jnp.arange(T // rows))  # [i, B, K, G, rows, ..]
    join = lambda x: jnp.moveaxis(x, 0, 3).reshape(*x.shape[1:4], T, x.shape[-1])
    return join(out), join(lse)


def _keep(total, sides, q, k, v, sinks, slopes, where):
    out, lse = forward(total, sides, q, k, v, sinks, slopes, where)
    return out, (q, k, v, sinks, slopes, where, out, lse)


def backward(total, sides, kept, g, dtype=None):
    """-> the gradients of (q, k, v, sinks, slopes, where), those of q, k and v in `dtype` or their own. kept: `forward`'s arguments and results; the log-sum-exp may be that of a longer
    row of keys than these, of which `out` is then the whole sum."""
    q, k, v, sinks, slopes, where, out, lse = kept
    rows, cols = sides
    T, S = q.shape[3], k.shape[2]
    delta = (g.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)  # [B, K, G, T, 1]

    def one(dq, j):
        kj, vj = cut(k, j * cols, cols, 2), cut(v, j * cols, cols, 2)
        vjT = vj.swapaxes(-1, -2)

        def step(i, carry):
            dq, dkT, dvT = carry
            qi, gi = cut(q, i * rows, rows, 3), cut(g, i * rows, rows, 3)
            s = total.scores(qi, kj, slopes, _take(where, sides, i, j))
            p = jnp.exp(s - cut(lse, i * rows, rows, 3))
            ds = p * (spread(accumulate("bkph,bkhs->bkps", gather(gi), vjT), p) - cut(delta, i * rows, rows, 3)) * total.scale
            if total.softcap is not None:
                ds = ds * jnp.where(jnp.isneginf(s), 0.0, total.slope(s))  # s is capped already
            ds, p = gather(ds.astype(q.dtype)), gather(p.astype(q.dtype))
            here = spread(accumulate("bkps,bksh->bkph", ds, kj), qi)
            dq = put(dq, cut(dq, i * rows, rows, 3) + here, i * rows, 3)
            dkT = dkT + accumulate("bkhp,bkps->bkhs", gather_turned(qi.swapaxes(-1, -2)), ds)  # transposed: scores.py's products, never the long axis of row-major scores
            dvT = dvT + accumulate("bkhp,bkps->bkhs", gather_turned(gi.swapaxes(-1, -2)), p)
            return dq, dkT, dvT
        zeros = lambda x: jnp.zeros((*x.shape[:2], x.shape[3], x.shape[2]), jnp.float32)
        first, stop = _query_tiles(total.pattern, sides, j, T)
        dq, dkT, dvT = jax.lax.fori_loop(first, stop, step, (dq, zeros(kj), zeros(vj)))
        return dq, (dkT.swapaxes(-1, -2).astype(dtype or k.dtype), dvT.swapaxes(-1, -2).astype(dtype or v.dtype))
    dq, (dk, dv) = jax.lax.scan(one, jnp.zeros(q.shape, jnp.float32), jnp.arange(S // cols))
    join = lambda x: jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], S, x.shape[-1])
    dsinks = None if sinks is None else -(jnp.exp(sinks[None, :, :, None, None] - lse) * delta).sum((0, 3, 4))
    return dq.astype(dtype or q.dtype), join(dk), join(dv), dsinks, None, None


_tiles.defvjp(_keep, backward)


def _take(where, sides, i, j):
    """Positions and segments of query tile i and key tile j."""
    query_positions, key_positions, query_segments, key_segments = where
    row, col = (lambda x: None if x is None else cut(x, i * sides[0], sides[0], 1)), (lambda x: None if x is None else cut(x, j * sides[1], sides[1], 1))
    return row(query_positions), col(key_positions), row(query_segments), col(key_segments)


def _key_tiles(pattern, sides, i, length):
    """-> [first, stop) of the key tiles that query tile i (traced) may see by index alone."""
    (rows, cols), count = sides, length // sides[1]
    if not pattern.in_order:
        return 0, count
    first = 0 if pattern.window is None else jnp.maximum(i * rows - pattern.window + 1, 0) // cols
    last = (i + 1) * rows - 1 + (0 if pattern.causal else pattern.window - 1 if pattern.window is not None else length)
    return first, jnp.minimum(last // cols + 1, count)


def _query_tiles(pattern, sides, j, length):
    """-> [first, stop) of the query tiles that may see key tile j (traced)."""
    (rows, cols), count = sides, length // sides[0]
    if not pattern.in_order:
        return 0, count
    near = length if pattern.window is None else pattern.window - 1
    first = j * cols // rows if pattern.causal else jnp.maximum(j * cols - near, 0) // rows
    return first, jnp.minimum(((j + 1) * cols - 1 + near) // rows + 1, count)
