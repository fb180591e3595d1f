"""Linear attention: the exponential of attention replaced by a product of features, so that the past is one matrix per head.

    y[i] = sum over j <= i of (q[i]·k[j]) v[j] / sum over j <= i of q[i]·k[j]          (Katharopoulos et al. 2020, arXiv:2006.16236, eq. 9 and 12)

q and k are features, not negative; `features` are the paper's. `linear_attention` takes many tokens in chunks, one token as one step; `quadratic` is the slow twin.

Legend: B batch, T length, L tokens of a chunk (i a token, j an earlier one), N query heads, K key/value heads, G = N / K, D key dim, V value dim; the state has V + 1 columns: the
last is the sum of the keys, the denominator's state.
"""
from __future__ import annotations

import jax
import jax.numpy as jnp

from llmjax.kernels.recurrence import documents, lengthened, over_chunks

CHUNK = 64


def features(x: jax.Array) -> jax.Array:
    """elu(x) + 1 in float32 (arXiv:2006.16236, eq. 7)."""
    return jax.nn.elu(x.astype(jnp.float32)) + 1


def linear_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, segments: jax.Array | None = None, state: jax.Array | None = None,
                     segment: jax.Array | None = None, chunk: int = CHUNK) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q [B, T, N, D], k [B, T, K, D] (features), v [B, T, K, V]; segments [B, T] int32: 0 is padding, which changes nothing, a new segment begins with an empty state; state [B, K, D, V + 1]
    float32 and segment [B] int32: what came before, and the segment it belongs to (0: nothing).

    -> (y [B, T, N, V] in v's dtype, zeros where nothing is seen; the state after the last token; its segment). Differentiable, with memory for the inputs and one state per chunk.
    Raises ValueError (check).
    """
    (B, T, N, D), (K, V), state, segment, segments = check(q, k, v, segments, state, segment)
    size = min(chunk, T)
    numbers, last = documents(lengthened(segments, size), segment)
    k = jnp.where((segments > 0)[:, :, None, None], k, 0)
    columns = jnp.concatenate([v.astype(jnp.float32), jnp.ones((B, T, K, 1), jnp.float32)], -1)
    arrays = (*(lengthened(x, size) for x in (q.reshape(B, T, K, N // K, D), k, columns)), numbers)
    with jax.default_matmul_precision("highest" if v.dtype == jnp.float32 else "high"):          # as the delta rule: a TPU's default would round the float32 state
        (state, _), sums = over_chunks(_chunk, (state, jnp.zeros((B,), jnp.int32)), arrays, size)
    sums = sums[:, :T].reshape(B, T, N, V + 1)
    total = sums[..., V:]
    return (sums[..., :V] / jnp.where(total > 0, total, 1.0)).astype(v.dtype), state, last


def _chunk(carried, q, k, v, numbers):
    """carried: the state [B, K, D, V + 1] and the number of its document [B]; q [B, L, K, G, D], k [B, L, K, D], v [B, L, K, V + 1]; also one token is a chunk."""
    state, current = carried
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    wide = lambda x: x[:, :, None, None, None]
    near = (numbers[:, :, None] == numbers[:, None, :]) & jnp.tri(q.shape[1], dtype=bool)[None]
    scores = jnp.where(near[:, None, None], jnp.einsum("bikgd,bjkd->bkgij", q, k), 0)
    out = jnp.where(wide(numbers == current[:, None]), jnp.einsum("bikgd,bkdv->bikgv", q, state), 0) + jnp.einsum("bkgij,bjkv->bikgv", scores, v)
    kept = jnp.where((numbers[:, -1] == current)[:, None, None, None], state, 0)
    mine = jnp.where((numbers == numbers[:, -1:])[:, :, None, None], k, 0)
    return (kept + jnp.einsum("bjkd,bjkv->bkdv", mine, v), numbers[:, -1]), out


def quadratic(q: jax.Array, k: jax.Array, v: jax.Array, *, segments: jax.Array | None = None) -> jax.Array:
    """The slow twin: all scores [T, T], float32. Arguments and y as in `linear_attention`, without a past. Raises ValueError (check)."""
    (B, T, N, D), (K, V), _, _, segments = check(q, k, v, segments, None, None)
    q, k = q.astype(jnp.float32).reshape(B, T, K, N // K, D), k.astype(jnp.float32)
    see = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, None, :] & jnp.tri(T, dtype=bool)[None]
    scores = jnp.where(see[:, None, None], jnp.einsum("bikgd,bjkd->bkgij", q, k, precision="highest"), 0)
    total = scores.sum(-1, keepdims=True)
    y = jnp.einsum("bkgij,bjkv->bikgv", scores / jnp.where(total > 0, total, 1.0), v.astype(jnp.float32), precision="highest")
    return y.reshape(B, T, N, V).astype(v.dtype)


def check(q, k, v, segments, state, segment):
    """-> (B, T, N, D), (K, V), state, segment and segments with defaults filled in. Raises ValueError, naming the argument and its shape, where shapes do not go together."""
    if not q.ndim == k.ndim == v.ndim == 4 or k.shape[:3] != v.shape[:3] or (*q.shape[:2], q.shape[3]) != (*k.shape[:2], k.shape[3]):
        raise ValueError(f"linear attention: q, k, v have shapes {q.shape}, {k.shape}, {v.shape}; they must be [B, T, N, D], [B, T, K, D], [B, T, K, V]")
    (B, T, N, D), (K, V) = q.shape, v.shape[2:]
    if N % K:
        raise ValueError(f"linear attention: {N} query heads do not divide into groups over {K} kv heads; N must be a multiple of K")
    for name, x, shape in (("segments", segments, (B, T)), ("state", state, (B, K, D, V + 1)), ("segment", segment, (B,))):
        if x is not None and x.shape != shape:
            raise ValueError(f"linear attention: {name} has shape {x.shape}; it must be {list(shape)}")
    if (state is None) != (segment is None):
        raise ValueError("linear attention: state and segment say together what came before; give both or neither")
    state = jnp.zeros((B, K, D, V + 1), jnp.float32) if state is None else state
    return q.shape, v.shape[2:], state, jnp.zeros((B,), jnp.int32) if segment is None else segment, jnp.ones((B, T), jnp.int32) if segments is None else segments
