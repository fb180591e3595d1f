"""The slow twin: the whole score matrix, autodiff, no tricks. Every other implementation is held against it.

Legend: B batch, T query length, S key length, N query heads, K kv heads, G queries per kv head, H head dim.
"""
import jax
import jax.numpy as jnp

from llmjax.kernels.attention.mask import check, visible, whereabouts


def reference(q, k, v, *, query_positions=None, key_positions=None, query_segments=None, key_segments=None,
              causal: bool, in_order: bool, window: int | None, softcap: float | None, scale: float, sinks=None, slopes=None, bias=None) -> jax.Array:
    """softmax(cap(scale q·k)) v over the visible keys (arXiv:1706.03762 eq. 1; soft-cap arXiv:2408.00118 section 2; sinks: one more logit per head in the denominator, gpt-oss;
    slopes [N]: scores fall by slope × distance, ALiBi, arXiv:2108.12409).

    q [B, T, N, H], k [B, S, K, H], v [B, S, K, Hv] -> [B, T, N, Hv] in `q.dtype`; query head n reads kv head n // (N // K). Everything in between is float32.
    bias [B or 1, N, T, S] float32, or None, is added to the scaled scores (relative positions).
    Positions and segments [B, T] / [B, S] int32; None is a range, one document; segment 0 is padding. A query that sees nothing gives zeros. O(T S) memory. Raises ValueError
    (mask.check).
    """
    check(q, k, v, query_positions, key_positions, query_segments, key_segments, causal, in_order, window, softcap, sinks, slopes)
    B, T, N, H = q.shape
    K = k.shape[2]
    grouped = q.reshape(B, T, K, N // K, H).astype(jnp.float32)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k.astype(jnp.float32), precision="highest") * scale
    if bias is not None:
        scores = scores + bias.reshape(bias.shape[0], K, N // K, T, k.shape[1]).astype(jnp.float32)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    where = whereabouts(q, k, query_positions, key_positions, query_segments, key_segments)
    if slopes is not None:
        distance = jnp.abs(where[0][:, :, None] - where[1][:, None, :]).astype(jnp.float32)[:, None, None]
        scores = scores - slopes.astype(jnp.float32).reshape(1, K, N // K, 1, 1) * distance
    see = visible(*where, causal=causal, window=window)[:, None, None]
    scores = jnp.where(see, scores, -1e30)
    if sinks is not None:
        column = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(1, K, N // K, 1, 1), (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, column], -1)
    probs = jax.nn.softmax(scores, -1)[..., : k.shape[1]] * see  # a row of nothing but -1e30 is uniform: the product makes it zero
    out = jnp.einsum("bkgts,bskh->btkgh", probs, v.astype(jnp.float32), precision="highest")
    return out.reshape(B, T, N, v.shape[-1]).astype(q.dtype)
