"""Tiled copies are copies: every order of dimensions, slices, casts."""
import itertools

import ml_dtypes
import numpy as np
import pytest

from llmjax.checkpoint.copying import aligned, contiguous, copy_into

X = np.random.default_rng(0).normal(size=(3, 140, 5, 150)).astype(np.float32)


@pytest.mark.parametrize("order", itertools.permutations(range(4)))
def test_every_order(order):
    x = X.transpose(order)
    for dtype in (np.float32, ml_dtypes.bfloat16):
        out = aligned(x.shape, dtype)
        copy_into(out, x)
        np.testing.assert_array_equal(out, x.astype(dtype))
        assert out.ctypes.data % 64 == 0
    half = X.astype(ml_dtypes.bfloat16).transpose(order)[1:, ..., ::2]
    assert contiguous(half).flags.c_contiguous and np.array_equal(contiguous(half), half)


def test_small_and_empty():
    for x in (np.zeros((0, 3), np.float32), np.array(2.5), np.arange(6).reshape(2, 3).T, X[:, :1, :, :1]):
        out = aligned(x.shape, x.dtype)
        copy_into(out, x)
        np.testing.assert_array_equal(out, x)
