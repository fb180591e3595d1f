"""Copies of transposed arrays that stay in the processor's cache, and memory that jax on a CPU takes without a copy.

numpy walks a transposed copy row by row and misses the cache at every number; in tiles of 128 × 128 it is four to five times faster (16 M numbers: 0.3 s -> 0.07 s).
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

TILE = 128


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
    if x.ndim < 2 or x.size < TILE * TILE:
        out[...] = x
        return
    fast = min(range(x.ndim), key=lambda i: (abs(x.strides[i]), -i))
    last = x.ndim - 1
    if fast == last:
        out[...] = x
        return
    for i in range(0, x.shape[fast], TILE):
        for j in range(0, x.shape[last], TILE):
            tile: list[slice] = [slice(None)] * x.ndim
            tile[fast], tile[last] = slice(i, i + TILE), slice(j, j + TILE)
            out[tuple(tile)] = x[tuple(tile)]


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
