"""Adam's moments in 8 bits: block-wise dynamic quantisation (Dettmers et al. 2022, arXiv:2110.02861), a quarter of the memory of float32.

A block is a run of numbers along the last axis, scaled by its largest one; a code stands for one of 256 numbers between -1 and 1 (moments) or 0 and 1 (squares) that lie evenly
within each power of ten, so that small moments keep two digits beside large ones.
"""
from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

BLOCK, SMALL = 256, 4096       # numbers a block; arrays with fewer numbers than SMALL stay in float32, as in bitsandbytes


@functools.cache
def codebook(signed: bool) -> np.ndarray:
    """The 256 numbers, ascending, float32: 0, 1 and for each of seven powers of ten the middles of evenly cut intervals of [0.1, 1], twice as many for each larger power."""
    numbers = [0.0, 1.0]
    for power in range(7):
        edges = np.linspace(0.1, 1.0, (2 ** power if signed else 2 ** (power + 1)) + 1)
        middles = 10.0 ** (power - 6) * (edges[1:] + edges[:-1]) / 2
        numbers += [*middles, *-middles] if signed else [*middles]
    return np.sort(np.array(numbers, np.float32))


def block_of(shape: tuple[int, ...]) -> int:
    """The length of a block: the largest divisor of the last axis up to BLOCK."""
    return next(n for n in range(min(BLOCK, shape[-1]), 0, -1) if shape[-1] % n == 0)


def small(x: Any) -> bool:
    return x.ndim == 0 or x.size < SMALL


def quantize(x: jax.Array, signed: bool) -> tuple[jax.Array, jax.Array]:
    """float32 [..., n] -> (codes uint8 [..., n], scales float32 [..., n / block]): the nearest of the 256 numbers each. A small array stays as it is, with an empty scale."""
    if small(x):
        return x, jnp.zeros((0,), jnp.float32)
    blocks = x.reshape(*x.shape[:-1], -1, block_of(x.shape))
    scale = jnp.abs(blocks).max(-1)
    book = codebook(signed)
    codes = jnp.searchsorted(jnp.asarray((book[1:] + book[:-1]) / 2), blocks / jnp.where(scale == 0, 1.0, scale)[..., None])
    return codes.astype(jnp.uint8).reshape(x.shape), scale


def dequantize(codes: jax.Array, scale: jax.Array, signed: bool) -> jax.Array:
    """quantize's inverse, but for the rounding."""
    if not scale.size:
        return codes
    numbers = jnp.asarray(codebook(signed))[codes.astype(jnp.int32)]
    return (numbers.reshape(*scale.shape, -1) * scale[..., None]).reshape(codes.shape)


class State(NamedTuple):
    """steps int32; codes and scales of both moments, each a tree like the parameters'."""
    steps: jax.Array
    mu: Any
    mu_scale: Any
    nu: Any
    nu_scale: Any


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """optax.scale_by_adam with its moments kept in 8 bits between steps."""
    inner = optax.scale_by_adam(b1, b2, eps)

    def both(function, tree, which):
        return jax.tree.map(lambda x: function(x)[which], tree)

    def init(params):
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        moments = [both(lambda x, signed=signed: quantize(x, signed), zeros, which) for signed in (True, False) for which in (0, 1)]
        return State(jnp.zeros((), jnp.int32), *moments)

    def update(grads, state, params=None):
        mu = jax.tree.map(lambda c, s: dequantize(c, s, True), state.mu, state.mu_scale)
        nu = jax.tree.map(lambda c, s: dequantize(c, s, False), state.nu, state.nu_scale)
        updates, new = inner.update(jax.tree.map(lambda g: g.astype(jnp.float32), grads), optax.ScaleByAdamState(state.steps, mu, nu), params)
        moments = [both(lambda x, signed=signed: quantize(x, signed), tree, which) for tree, signed in ((new.mu, True), (new.nu, False)) for which in (0, 1)]
        return updates, State(new.count, *moments)
    return optax.GradientTransformation(init, update)
