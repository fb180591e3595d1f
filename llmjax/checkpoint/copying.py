"""Copies of transposed arrays that stay in the processor's cache, and memory that jax on a CPU takes without a copy.

numpy walks a transposed copy row by row and misses the cache at every number. In tiles it is several times faster, if a tile is first brought together: the rows of a matrix whose
width is a power of two all fall into the same few lines of the cache (a tile's rows are therefore a little longer than they need be). What is left is the price of writing in short
runs: the more rows a tile has, the longer they are. Measured on a core of two under load, reading included, 16-bit numbers per second: 0.6 G in tiles of 256 × 256, 0.8 G in
512 × 128 (512 × 64: 0.75 G; 1024 × 64 and 2048 × 32: 0.75 and 0.65 G). Exchanging 4 × 4 squares within 64-bit words first is no faster.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

ROWS, COLUMNS, PAD = 512, 128, 8                   # of a tile: what is written lies together for long, what is held fits the nearest caches


def aligned(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An empty array whose memory starts at a multiple of 64 bytes: jax on a CPU then takes it as it is, without a copy."""
    dtype = np.dtype(dtype)
    n = math.prod(shape) * dtype.itemsize
    raw = np.empty(n + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start:start + n].view(dtype).reshape(shape)


def copy_into(out: np.ndarray, x: np.ndarray) -> None:
    """out[...] = x, with a cast where the dtypes differ; out is C-contiguous."""
    if x.dtype == out.dtype and x.dtype.itemsize in (1, 2, 4, 8):
        plain = f"u{x.dtype.itemsize}"              # numpy copies its own integers faster than foreign floats
        out, x = out.view(plain), x.view(plain)
    out, x = merged(out, x)
    if x.ndim < 2 or x.size < 128 * 128:
        out[...] = x
        return
    fast = min(range(x.ndim), key=lambda i: (abs(x.strides[i]), -i))
    last = x.ndim - 1
    if fast == last:
        out[...] = x
        return
    others = [i for i in range(last) if i != fast]
    tile = np.empty((ROWS, COLUMNS + PAD), x.dtype)
    for index in np.ndindex(*(x.shape[i] for i in others)):
        place = tuple(index[others.index(i)] if i in others else slice(None) for i in range(x.ndim))
        transpose_into(out[place], x[place].T, tile)


def transpose_into(out: np.ndarray, x: np.ndarray, tile: np.ndarray) -> None:
    """out[...] = x.T for matrices whose rows are contiguous, through a tile of scratch."""
    for i in range(0, x.shape[0], ROWS):
        for j in range(0, x.shape[1], COLUMNS):
            part = x[i:i + ROWS, j:j + COLUMNS]
            held = tile[:part.shape[0], :part.shape[1]]
            held[...] = part
            out[j:j + COLUMNS, i:i + ROWS] = held.T


def merged(out: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both arrays with neighbouring dimensions joined where x lies evenly over them (out is contiguous, so it does everywhere)."""
    shape: list[int] = []
    inner = 0                                       # the stride of the dimension joined last
    for n, stride in zip(x.shape, x.strides):
        if n == 1:
            continue
        if shape and inner == n * stride:
            shape[-1] *= n
        else:
            shape.append(n)
        inner = stride
    return out.reshape(shape), x.reshape(shape)


def contiguous(x: np.ndarray) -> np.ndarray:
    """x itself where it is C-contiguous, else a copy that is."""
    if x.flags.c_contiguous:
        return x
    out = np.empty(x.shape, x.dtype)
    copy_into(out, x)
    return out
