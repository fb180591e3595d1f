"""How a cache keeps the numbers of keys and values: as they are, or in 8 or 4 bits. A kept array is a float array or a leaf whose arrays share all axes but the last, so that whoever moves
tokens about (slots, rings, pages) does it to each array alike and knows no more.

- `Int8`: a scale per token and head. Nothing else is needed at 8 bits.
- `Int4`: a scale and a smallest value for each `GROUP` numbers of a token and head. What the literature found is that values bear it and keys do not: some channels of keys are outliers
  in all tokens (KIVI, Liu et al. 2024, arXiv:2402.02750, section 3.2; KVQuant, Hooper et al. 2024, arXiv:2401.18079, section 3.1). Both papers answer with scales per channel of keys, which
  want many tokens at once and a tail of unquantised ones; here queries and keys are turned by a Hadamard matrix instead, which spreads an outlier over all channels and changes no
  product (QuaRot, Ashkboos et al. 2024, arXiv:2404.00456, section 4): every token is written on its own, wherever it lies. benchmarks/cache_quality.py has the figures of each way: on
  SmolLM2-135M turning takes back a third of what 4-bit keys lose, scales per channel would take back four fifths. Where that matters, "int8/int4" keeps keys in 8 bits, values in 4.

Legend: … any leading axes (rows or pages, tokens, heads), H numbers of a head, U groups of them.
"""
from __future__ import annotations

import dataclasses as dc
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass

GROUP = 32             # numbers that share a scale at 4 bits: 1 bit more a number; KIVI's and llama.cpp's (Q4_1) size
QUANTIZED = {"int8": ("int8", "int8"), "int4": ("int4", "int4"), "int8/int4": ("int8", "int4")}         # kinds: what keys and what values are kept in


@register_dataclass
@dc.dataclass(frozen=True)
class Int8:
    """q · scale: q int8 […, H], scale bfloat16 […, 1]."""
    q: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.q.shape


@register_dataclass
@dc.dataclass(frozen=True)
class Int4:
    """q · scale + low: q uint8 […, H / 2], two numbers a byte (the first half of a head in the lower bits), scale and low bfloat16 […, U]."""
    q: jax.Array
    scale: jax.Array
    low: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.q.shape[:-1], 2 * self.q.shape[-1])


Stored = jax.Array | Int8 | Int4


def empty(shape: tuple[int, ...], kind: Any) -> Stored:
    """Zeros of `shape` […, H], kept as `kind`: a float dtype, "int8" or "int4". Raises ValueError for an odd H in 4 bits."""
    if kind == "int8" and shape[-1]:
        return Int8(jnp.zeros(shape, jnp.int8), jnp.zeros((*shape[:-1], 1), jnp.bfloat16))
    if kind == "int4" and shape[-1]:
        if shape[-1] % 2:
            raise ValueError(f"a cache in 4 bits keeps two numbers a byte: a head of {shape[-1]} has an odd number; use int8")
        scale, low = (jnp.zeros((*shape[:-1], shape[-1] // math.gcd(shape[-1], GROUP)), jnp.bfloat16) for _ in range(2))        # two arrays: one given away twice is an error
        return Int4(jnp.zeros((*shape[:-1], shape[-1] // 2), jnp.uint8), scale, low)
    return jnp.zeros(shape, jnp.bfloat16 if kind in ("int8", "int4") else kind)


def encode(like: Stored, x: jax.Array) -> Stored:
    """x […, H] as `like` keeps it."""
    if isinstance(like, Int8):
        x = x.astype(jnp.float32)
        scale = (jnp.max(jnp.abs(x), -1, keepdims=True) / 127).astype(jnp.bfloat16)
        return Int8(jnp.clip(jnp.round(x / nonzero(scale)), -127, 127).astype(jnp.int8), scale)
    if isinstance(like, Int4):
        groups = x.astype(jnp.float32).reshape(*x.shape[:-1], like.scale.shape[-1], -1)              # […, U, H / U]
        low = jnp.min(groups, -1).astype(jnp.bfloat16)
        scale = ((jnp.max(groups, -1) - low.astype(jnp.float32)) / 15).astype(jnp.bfloat16)
        q = jnp.round((groups - low.astype(jnp.float32)[..., None]) / nonzero(scale)[..., None])
        q = jnp.clip(q, 0, 15).astype(jnp.uint8).reshape(*x.shape[:-1], 2, -1)
        return Int4(q[..., 0, :] | (q[..., 1, :] << 4), scale, low)
    return x.astype(like.dtype)


def decode(stored: Stored, dtype: Any) -> jax.Array:
    """-> […, H]: a float array as it is kept, quantised numbers in `dtype`."""
    if isinstance(stored, Int8):
        return (stored.q.astype(jnp.float32) * stored.scale.astype(jnp.float32)).astype(dtype)
    if isinstance(stored, Int4):
        q = jnp.concatenate([stored.q & 15, stored.q >> 4], -1).astype(jnp.float32)
        groups = q.reshape(*q.shape[:-1], stored.scale.shape[-1], -1) * stored.scale.astype(jnp.float32)[..., None] + stored.low.astype(jnp.float32)[..., None]
        return groups.reshape(q.shape).astype(dtype)
    return stored


def nonzero(scale: jax.Array) -> jax.Array:
    scale = scale.astype(jnp.float32)
    return jnp.where(scale > 0, scale, 1.0)


def turn(x: jax.Array) -> jax.Array:
    """x […, H] times a Hadamard matrix over H (in blocks of the largest power of two that divides it), divided by its norm: lengths and products stay."""
    size = x.shape[-1] & -x.shape[-1]
    if size == 1:
        return x
    y = jnp.einsum("...ub,bc->...uc", x.reshape(*x.shape[:-1], -1, size), jnp.asarray(hadamard(size), x.dtype), preferred_element_type=jnp.float32, precision="highest")
    return (y * size ** -0.5).reshape(x.shape).astype(x.dtype)


@functools.cache
def hadamard(size: int) -> np.ndarray:
    """Sylvester's matrix of ±1, `size` a power of two."""
    return np.ones((1, 1), np.float32) if size == 1 else np.block([[hadamard(size // 2), hadamard(size // 2)], [hadamard(size // 2), -hadamard(size // 2)]])
