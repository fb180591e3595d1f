"""The gated delta rule: a state that decays, forgets along a key what it predicts there, and stores the value instead.

    S <- exp(g) S;   S <- S + k (beta (v - k S))^T;   y = q S          (Yang et al. 2024, arXiv:2412.06464, eq. 10)

`gated_delta_rule` takes many tokens in chunks: within one the corrections follow from a triangular system (the UT transform, section 3.2 there), between chunks only the state is
carried. One token is one step. `recurrence` is the slow twin, token by token.

Legend: B batch, T length, L tokens of a chunk (i a token, j an earlier one), N value heads, K key heads, R = N / K, D key dim, V value dim.
"""
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from llmjax.kernels.recurrence import documents, lengthened, over_chunks

CHUNK = 64          # as the reference implementation; the system of a chunk costs L² a token, the state's products D V


def gated_delta_rule(q: jax.Array, k: jax.Array, v: jax.Array, decay: jax.Array, beta: jax.Array, *, segments: jax.Array | None = None,
                     state: jax.Array | None = None, segment: jax.Array | None = None, chunk: int = CHUNK) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The sum of `recurrence`, same arguments; differentiable in all arrays, with memory for the inputs and one state per chunk. Raises ValueError (check)."""
    (B, T, K, D), (N, V), state, segment, segments = check(q, k, v, decay, beta, segments, state, segment)
    grouped = state.reshape(B, K, N // K, D, V)
    decay, beta = (jnp.where(segments[..., None] > 0, x.astype(jnp.float32), 0) for x in (decay, beta))          # padding neither decays nor writes
    size = min(chunk, T)
    numbers, last = documents(lengthened(segments, size), segment)
    v, decay, beta = (x.reshape(B, T, K, N // K, *x.shape[3:]) for x in (v, decay, beta))
    with jax.default_matmul_precision("highest" if q.dtype == jnp.float32 else "high"):          # products with a float32 state: on a TPU the default would round it to bfloat16
        if T == 1:
            out, grouped = step(q[:, 0], k[:, 0], v[:, 0], decay[:, 0], beta[:, 0], jnp.where((numbers == 0)[..., None, None, None], grouped, 0))
            out = out[:, None]
        else:
            start = (grouped, jnp.zeros((B,), jnp.int32))
            (grouped, _), out = over_chunks(_chunk, start, (*(lengthened(x, size) for x in (q, k, v, decay, beta)), numbers), size)
    return out[:, :T].reshape(B, T, N, V).astype(v.dtype), grouped.reshape(B, N, D, V), last


def step(q: jax.Array, k: jax.Array, v: jax.Array, decay: jax.Array, beta: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One token: q, k [B, K, D], v [B, K, R, V], decay, beta [B, K, R], state [B, K, R, D, V] float32 -> ([B, K, R, V] float32, state). The state is read once and written once."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    left = jnp.exp(decay)[..., None]
    read, predicted = (left * jnp.einsum("bkd,bkrdv->bkrv", x, state) for x in (q, k))
    correction = beta[..., None] * (v - predicted)
    out = read + jnp.sum(q * k, -1)[:, :, None, None] * correction
    return out, left[..., None] * state + k[:, :, None, :, None] * correction[..., None, :]


def _chunk(carried, q, k, v, decay, beta, numbers):
    """carried: the state [B, K, R, D, V] and the number of its document [B]; arrays as in gated_delta_rule with L tokens, heads apart."""
    state, current = carried
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    decay, beta = (x.transpose(0, 2, 3, 1) for x in (decay, beta))                                 # [B, K, R, L]
    wide = lambda x: x[:, None, None]
    near = wide((numbers[:, :, None] == numbers[:, None, :]) & jnp.tri(q.shape[1], dtype=bool)[None])
    # sums of the coarse part are exact up to 4,096, so a total is rounded once, as the reference implementation's: XLA's sum alone leaves 1e-4 after strong decays
    coarse = jax.lax.stop_gradient(jnp.round(decay * 4096)) / 4096
    total = jnp.cumsum(coarse, -1) + jnp.cumsum(decay - coarse, -1)
    pair = jnp.exp(jnp.where(near, total[..., :, None] - total[..., None, :], -jnp.inf))           # what token i still sees of what j wrote
    entering = jnp.where(wide(numbers == current[:, None]), jnp.exp(total), 0)                     # … and of the state before the chunk

    system = beta[..., None] * jnp.einsum("bikd,bjkd->bkij", k, k)[:, :, None] * pair
    wanted = beta[..., None] * (v.transpose(0, 2, 3, 1, 4) - entering[..., None] * jnp.einsum("bikd,bkrdv->bkriv", k, state))
    written = jax.lax.linalg.triangular_solve(system, wanted, left_side=True, lower=True, unit_diagonal=True)
    out = entering[..., None] * jnp.einsum("bikd,bkrdv->bkriv", q, state) + jnp.einsum("bkrij,bkrjv->bkriv", jnp.einsum("bikd,bjkd->bkij", q, k)[:, :, None] * pair, written)
    state = entering[..., -1:, None] * state + jnp.einsum("bjkd,bkrjv->bkrdv", k, pair[..., -1, :, None] * written)     # what the last token sees is what is kept
    return (state, numbers[:, -1]), out.transpose(0, 3, 1, 2, 4)


def recurrence(q: jax.Array, k: jax.Array, v: jax.Array, decay: jax.Array, beta: jax.Array, *, segments: jax.Array | None = None,
               state: jax.Array | None = None, segment: jax.Array | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The slow twin, token by token in float32 (arXiv:2412.06464, eq. 10).

    q, k [B, T, K, D], v [B, T, N, V], decay (the logarithm, at most 0) and beta [B, T, N]; value head n reads key head n // (N // K). Segments [B, T] int32: 0 is padding, which changes
    nothing; a new segment begins with an empty state. state [B, N, D, V] float32 and segment [B] int32: what came before and the segment it belongs to (0: nothing).
    -> (y [B, T, N, V] in v's dtype, the state after the last token, its segment). Raises ValueError (check).
    """
    (_, _, K, _), (N, _), *past, segments = check(q, k, v, decay, beta, segments, state, segment)
    dtype = v.dtype
    q, k = (jnp.repeat(x.astype(jnp.float32), N // K, 2) for x in (q, k))
    wide = lambda x: x[..., None, None]

    def one(carried, token):
        state, segment = carried
        q, k, v, g, b, s = token
        fresh = jnp.where(wide(s == segment)[..., None], state, 0)
        fresh = wide(jnp.exp(g)) * fresh
        fresh = fresh + k[..., None] * (b[..., None] * (v - jnp.einsum("bnd,bndv->bnv", k, fresh, precision="highest")))[..., None, :]
        state = jnp.where(wide(s > 0)[..., None], fresh, state)
        return (state, jnp.where(s > 0, s, segment)), jnp.einsum("bnd,bndv->bnv", q, state, precision="highest")
    tokens = [jnp.moveaxis(x.astype(jnp.float32), 1, 0) for x in (q, k, v, decay, beta)]
    (last, ends), out = jax.lax.scan(one, tuple(past), (*tokens, segments.T))
    return jnp.moveaxis(out, 0, 1).astype(dtype), last, ends


def check(q, k, v, decay, beta, segments, state, segment) -> tuple[Any, Any, Any, Any, Any]:
    """-> (B, T, K, D), (N, V), state, segment and segments with defaults filled in. Raises ValueError, naming the argument and its shape, where shapes do not go together."""
    if q.ndim != 4 or k.shape != q.shape or v.ndim != 4 or v.shape[:2] != q.shape[:2]:
        raise ValueError(f"delta rule: q, k, v have shapes {q.shape}, {k.shape}, {v.shape}; they must be [B, T, K, D], [B, T, K, D], [B, T, N, V]")
    (B, T, K, D), (N, V) = q.shape, v.shape[2:]
    if N % K:
        raise ValueError(f"delta rule: {N} value heads do not divide into groups over {K} key heads; N must be a multiple of K")
    given = dict(decay=(decay, (B, T, N)), beta=(beta, (B, T, N)), segments=(segments, (B, T)), state=(state, (B, N, D, V)), segment=(segment, (B,)))
    for name, (x, shape) in given.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"delta rule: {name} has shape {x.shape}; it must be {list(shape)}")
    if (state is None) != (segment is None):
        raise ValueError("delta rule: state and segment say together what came before; give both or neither")
    state = jnp.zeros((B, N, D, V), jnp.float32) if state is None else state
    return q.shape, v.shape[2:], state, jnp.zeros((B,), jnp.int32) if segment is None else segment, jnp.ones((B, T), jnp.int32) if segments is None else segments
