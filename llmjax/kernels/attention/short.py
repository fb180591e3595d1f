"""Attention over few enough scores to keep their probabilities: query blocks unrolled, each against the keys it may see.

The backward pass never contracts the long axis of a row-major block of scores: dk and dv come out transposed, [H, s], and are turned back at the end (on x86 that is up to three
times faster than `"ts,th->sh"`, which XLA runs as a transpose folded into a slow product; `accumulate` holds the two apart).

Legend: B batch, T query length, S key length, K kv heads, G queries per kv head, H head dim; P = G T.
"""
import functools

import jax
import jax.numpy as jnp

from llmjax.core.contract import accumulate
from llmjax.kernels.attention.scores import exponentials, gather, gather_turned, spread, take

BLOCK = 64  # queries a block: small ones skip more of what lies above the diagonal, large ones make larger products


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(total, q, k, v, sinks, slopes, where):
    """q [B, K, G, T, H], k [B, K, S, H], v [B, K, S, Hv], sinks, slopes [K, G] float32 or None -> [B, K, G, T, Hv] in `q.dtype`."""
    return _forward(total, q, k, v, sinks, slopes, where)[0]


def _blocks(total, length, keys):
    """-> (queries, keys) slices, one per block of queries."""
    size = BLOCK if total.pattern.in_order else length
    for first in range(0, length, size):
        stop = min(first + size, length)
        yield slice(first, stop), slice(*total.pattern.reach(first, stop - 1, keys))


def _forward(total, q, k, v, sinks, slopes, where):
    outs, probs, rests = [], [], []
    for rows, cols in _blocks(total, q.shape[3], k.shape[2]):
        block = q[:, :, :, rows]
        weights, denominator, top = exponentials(total.scores(block, k[:, :, cols], slopes, take(where, rows, cols)), sinks)
        p = (weights / denominator).astype(q.dtype)
        outs.append(spread(accumulate("bkps,bksh->bkph", gather(p), v[:, :, cols]), block).astype(q.dtype))
        probs.append(p)
        rests.append(None if sinks is None else jnp.exp(sinks[None, :, :, None, None] - top) / denominator)  # the sink's probability
    return jnp.concatenate(outs, 3), probs, None if sinks is None else jnp.concatenate(rests, 3)


def _keep(total, q, k, v, sinks, slopes, where):
    out, probs, rest = _forward(total, q, k, v, sinks, slopes, where)
    return out, (q, k, v, where, out, probs, rest)


def _backward(total, kept, g):
    q, k, v, _, out, probs, rest = kept
    vT, qT, gT = (x.swapaxes(-1, -2) for x in (v, q, g))  # [.., H, T]
    delta = (g.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)  # [B, K, G, T, 1]
    dkT, dvT = (jnp.zeros((*x.shape[:2], x.shape[3], x.shape[2]), jnp.float32) for x in (k, v))
    dq = []
    for p, (rows, cols) in zip(probs, _blocks(total, q.shape[3], k.shape[2])):
        dp = spread(accumulate("bkph,bkhs->bkps", gather(g[:, :, :, rows]), vT[..., cols]), p)
        ds = p.astype(jnp.float32) * (dp - delta[:, :, :, rows]) * total.scale
        if total.softcap is not None:
            ds = ds * total.slope(total.cap(total.products(q[:, :, :, rows], k[:, :, cols])))
        ds = gather(ds.astype(q.dtype))
        dq.append(spread(accumulate("bkps,bksh->bkph", ds, k[:, :, cols]), q[:, :, :, rows]).astype(q.dtype))
        dkT = dkT.at[..., cols].add(accumulate("bkhp,bkps->bkhs", gather_turned(qT[..., rows]), ds))
        dvT = dvT.at[..., cols].add(accumulate("bkhp,bkps->bkhs", gather_turned(gT[..., rows]), gather(p)))
    dsinks = None if rest is None else -(rest * delta).sum((0, 3, 4))
    return jnp.concatenate(dq, 3), dkT.swapaxes(-1, -2).astype(k.dtype), dvT.swapaxes(-1, -2).astype(v.dtype), dsinks, None, None


attend.defvjp(_keep, _backward)
