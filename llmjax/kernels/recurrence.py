"""What recurrent kernels share: documents counted along a row, tokens taken in chunks, the causal depthwise convolution.

Segments say which tokens belong together: 0 is padding, which a recurrence passes over; where the segment changes a new document begins and nothing is remembered. The tokens of a
document stand next to each other but for padding.

Legend: B batch, T length, L tokens of a chunk, W width of the convolution, C channels.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def newest(segments: jax.Array, first: jax.Array) -> jax.Array:
    """The segment of the newest token up to each place, padding passed over: segments [B, T], first [B] (of what came before) -> [B, T]."""
    at = jax.lax.cummax(jnp.where(segments > 0, jnp.arange(1, segments.shape[1] + 1, dtype=jnp.int32)[None], 0), axis=1)
    return jnp.take_along_axis(jnp.concatenate([first[:, None], segments], 1), at, 1)


def documents(segments: jax.Array, first: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which document each token stands in: segments [B, T] int32, first [B] int32, the segment of what came before (0: nothing did).

    -> numbers [B, T]: 0 as long as that document goes on, one more at every change; padding has the number of what came before it. last [B]: the segment the row ends in.
    """
    running = newest(segments, first)
    before = jnp.concatenate([first[:, None], running[:, :-1]], 1)
    return jnp.cumsum((running != before).astype(jnp.int32), 1), running[:, -1]


def over_chunks(body: Callable, state: Any, arrays: tuple[jax.Array, ...], size: int) -> tuple[Any, jax.Array]:
    """A scan over chunks of L = `size` tokens of arrays [B, T, …], T a multiple of it. body(state, arrays [B, L, …]) -> (state, out [B, L, …]). -> (state, out [B, T, …]).

    The backward pass keeps the state before each chunk and makes the rest of the chunk again.
    """
    def cut(x):
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)
    state, out = jax.lax.scan(jax.checkpoint(lambda carried, pieces: body(carried, *pieces)), state, tuple(cut(x) for x in arrays))
    out = jnp.moveaxis(out, 0, 1)
    return state, out.reshape(out.shape[0], -1, *out.shape[3:])


def lengthened(x: jax.Array, size: int) -> jax.Array:
    """x [B, T, …] with zeros behind, up to a multiple of `size` tokens."""
    return jnp.pad(x, [(0, -x.shape[1] % size if axis == 1 else 0) for axis in range(x.ndim)])


def causal_conv(x: jax.Array, w: jax.Array, segments: jax.Array | None = None, history: tuple[jax.Array, jax.Array] | None = None) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """y[t] = sum over i of w[i] · x[t - W + 1 + i], each channel alone, over tokens of t's own document; padding is passed over, not counted.

    x [B, T, …], w [W, …] with the same channels; segments [B, T] int32 or None: one document. history: the last W - 1 tokens before, [B, W - 1, …], and their segments [B, W - 1]
    (0: there was none). -> (y like x but float32, the history after these tokens; None where none was given).
    """
    if segments is None and history is None:
        return _shifted(jnp.pad(x, [(w.shape[0] - 1 if axis == 1 else 0, 0) for axis in range(x.ndim)]), None, w), None
    if segments is None:
        segments = jnp.ones(x.shape[:2], jnp.int32)
    if history is not None:
        inputs, known = (jnp.concatenate([old.astype(new.dtype), new], 1) for old, new in zip(history, (x, segments)))
        if x.shape[1] > 1:
            return _closed_up(inputs, known, w)
        used = segments > 0                              # one token: no order to mend
        kept = jnp.where(used.reshape(-1, *(1,) * (x.ndim - 1)), inputs[:, 1:], inputs[:, :-1]), jnp.where(used, known[:, 1:], known[:, :-1])
        return _shifted(inputs, known, w), kept
    inputs, known = (jnp.pad(y, [(w.shape[0] - 1 if axis == 1 else 0, 0) for axis in range(y.ndim)]) for y in (x, segments))
    # moving tokens costs two passes over memory, and few batches have padding inside a document
    return jax.lax.cond(gaps(segments), lambda x: _closed_up(x, known, w)[0], lambda x: _shifted(x, known, w), inputs), None


def gaps(segments: jax.Array) -> jax.Array:
    """Whether padding stands between tokens of one document: segments [B, T] -> bool []."""
    nothing = jnp.zeros_like(segments[:, 0])
    before = jnp.concatenate([nothing[:, None], newest(segments, nothing)[:, :-1]], 1)
    neighbour = jnp.concatenate([nothing[:, None], segments[:, :-1]], 1)
    return ((segments > 0) & (segments == before) & (neighbour == 0)).any()


def _shifted(x: jax.Array, segments: jax.Array | None, w: jax.Array) -> jax.Array:
    """The sum where a token's neighbours in the array are its neighbours in the text: x [B, W - 1 + T, …], segments [B, W - 1 + T] -> [B, T, …] float32."""
    length = x.shape[1] - w.shape[0] + 1
    total: jax.Array | None = None
    for i in range(w.shape[0]):
        term = x[:, i:i + length].astype(jnp.float32) * w[i].astype(jnp.float32)[None, None]
        if segments is not None:
            same = segments[:, i:i + length] == segments[:, w.shape[0] - 1:]
            term = jnp.where(same.reshape(*same.shape, *(1,) * (x.ndim - 2)), term, 0)
        total = term if total is None else total + term
    assert total is not None
    return total


def _closed_up(x: jax.Array, segments: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The sum with padding moved out of the way, to the front. x [B, W - 1 + T, …], segments [B, W - 1 + T] -> ([B, T, …] float32, the last W - 1 tokens and their segments)."""
    before = w.shape[0] - 1
    order = jnp.argsort(segments > 0, axis=1, stable=True)
    pick = lambda y, at: jnp.take_along_axis(y, at.reshape(*at.shape, *(1,) * (y.ndim - 2)), 1)
    inputs, known = pick(x, order), pick(segments, order)
    y = _shifted(inputs, known, w)
    back = jnp.maximum(jnp.argsort(order, axis=1)[:, before:] - before, 0)      # below 0 stands padding alone: what it gets does not matter
    return pick(y, back), (inputs[:, x.shape[1] - before:], known[:, x.shape[1] - before:])
