"""Attention in blocks with a hand-written backward pass: the default on CPUs and the portable one elsewhere. Memory grows with T + S, never with T S.

Three sizes of the same sum:
- one query: a product with the cache, a softmax, a product (`_direct`);
- at most `TILE`² scores a head (training at short context): query blocks unrolled, each against the keys it may see, probabilities kept in the query's dtype for the backward
pass (`short.py`);
- more: tiles of `TILE` × `TILE` in loops with an online softmax (arXiv:2205.14135, arXiv:2307.08691), probabilities made again in the backward pass from the log-sum-exp
(`long.py`).

Legend: B batch, T query length, S key length, N query heads, K kv heads, G queries per kv head, H head dim; P = G T, the queries of one kv head as one axis.
"""
import jax
import jax.numpy as jnp

from llmjax.core.contract import accumulate
from llmjax.kernels.attention import long, short
from llmjax.kernels.attention.mask import check, whereabouts
from llmjax.kernels.attention.scores import Sum, exponentials

TILE = 512


def blockwise(q, k, v, *, query_positions=None, key_positions=None, query_segments=None, key_segments=None,
              causal: bool, in_order: bool, window: int | None, softcap: float | None, scale: float, sinks=None, slopes=None, tile: int = TILE) -> jax.Array:
    """The sum of `reference`, same arguments, same zeros for a query that sees nothing; gradients for q, k, v and sinks (not slopes) in reverse mode.

    q [B, T, N, H], k [B, S, K, H], v [B, S, K, Hv] -> [B, T, N, Hv] in `q.dtype`. Scores, softmax and sums are float32; probabilities enter their products in `q.dtype`.
    `tile` is the side of a tile of scores, and the length up to which probabilities are kept. Raises ValueError (mask.check).
    """
    pattern = check(q, k, v, query_positions, key_positions, query_segments, key_segments, causal, in_order, window, softcap, sinks, slopes)
    where = whereabouts(q, k, query_positions, key_positions, query_segments, key_segments)
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    total = Sum(pattern, softcap, scale)
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    q = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    sinks, slopes = (None if x is None else x.astype(jnp.float32).reshape(K, N // K) for x in (sinks, slopes))
    if T == 1:
        out = _direct(total, q, k, v, sinks, slopes, where)
    elif tile * tile >= T * S:
        out = short.attend(total, q, k.swapaxes(1, 2), v.swapaxes(1, 2), sinks, slopes, where)
    else:
        out = long.attend(total, tile, q, k.swapaxes(1, 2), v.swapaxes(1, 2), sinks, slopes, where)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, v.shape[-1])


def _direct(total, q, k, v, sinks, slopes, where):
    """One query: everything it sees at once, by autodiff. q [B, K, G, 1, H], k [B, S, K, H] as it lies in the cache, v [B, S, K, Hv] -> [B, K, G, 1, Hv]."""
    heads, kv = ("bkgth", "bskh") if k.shape[2] > 1 else ("bgh", "bsh")          # an axis of one head would make XLA's CPU backend turn keys round first
    scores = heads[:-1] + "s"
    part = lambda x, letters: x if len(letters) > 3 else x.reshape(x.shape[0], -1, x.shape[-1])
    products = accumulate(f"{heads},{kv}->{scores}", part(q, heads), part(k, kv)).reshape(*q.shape[:-1], k.shape[1])
    weights, denominator, _ = exponentials(total.seen(total.cap(products * total.scale), slopes, where), sinks)
    out = accumulate(f"{scores},{kv}->{heads}", part(weights.astype(q.dtype), scores), part(v, kv)).reshape(*q.shape[:-1], v.shape[-1])
    return (out / denominator).astype(q.dtype)
