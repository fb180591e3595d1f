"""The forms in which a matrix w [F, D] may be kept as rows, and the product with each.

    w.dtype                          scale                        a number of the matrix
    float32, bfloat16, float16       None                         w[f, d]
    int8 [F, D]                      float32 [F]                  w[f, d] · scale[f]
    int8 [F, D]                      float32 [F, D/32]            w[f, d] · scale[f, d/32]
    uint8 [F, D/2]                   float32 [F, D/32, 2]         n · scale[f, d/32, 0] + scale[f, d/32, 1], n the 4 bits of d: byte i of a block holds those of i (low) and i + 16 (high)

Blocks of 32 are those of GGUF's Q8_0, Q4_0 and Q4_1. `narrowest` finds the smallest form that holds a matrix exactly: weights that came from a file of 4 bits are read as 4 bits,
published bfloat16 weights as 16, though the model computes in float32.
"""
from typing import Any

import jax
import jax.numpy as jnp

from llmjax.core import native
from llmjax.core.contract import contract
from llmjax.core.native import BLOCK

SAMPLE = 64                                                  # rows that are tried before the whole matrix
FEW = 12                                                     # int8 and 16-bit activations: rows for which XLA's products, which know a processor's matrix unit, are not yet faster
FEW_FLOAT32, FEW_NARROW = 64, 256                            # float32 activations and weights; narrower weights, which XLA would widen first



def times(x: jax.Array, w: jax.Array, scale: jax.Array | None) -> jax.Array:
    """x [T, D] times the transposed matrix -> [T, F] float32."""
    few = FEW if (scale is not None and scale.ndim == 1) or x.dtype != jnp.float32 else FEW_FLOAT32 if scale is None and w.dtype == x.dtype else FEW_NARROW
    if len(x) <= few and x.shape[1] % BLOCK == 0 and w.dtype.name in native.KINDS and native.available():
        return native.few_rows(x.astype(jnp.float32), w, scale)
    if scale is not None and scale.ndim == 1:
        return int8_rows(x, w, scale)
    if len(x) == 1 and x.dtype.itemsize == 2:                # XLA's products of 16-bit numbers need two rows: with one they convert the whole matrix first
        return times(jnp.pad(x, [(0, 1), (0, 0)]), w, scale)[:1]
    return contract("td,fd->tf", x, widen(w, scale), out_dtype=jnp.float32)


def int8_rows(x: jax.Array, q: jax.Array, scale: jax.Array) -> jax.Array:
    """x [T, D] times (q [F, D] int8 · scale [F])ᵀ -> float32 [T, F], in integer products alone. A row of x is its largest magnitude times two int8 rows, the number and what rounding
    left of it: 15 bits or so. XLA's CPU products are fast from two columns on, so the second costs one token nothing; and faster with the weights first for few rows, with the rows first
    for many (128: 2.4 times)."""
    x = x.astype(jnp.float32)
    step = jnp.maximum(jnp.max(jnp.abs(x), -1, keepdims=True), 1e-30) / 127.0
    coarse = jnp.round(x / step)
    fine = jnp.round((x / step - coarse) * 254.0)
    columns = jnp.concatenate([coarse, fine]).astype(jnp.int8)
    product = lambda a, b: jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32).astype(jnp.float32)
    y = product(columns, q) if len(x) >= 8 else product(q, columns).T
    return (y[:len(x)] + y[len(x):] * (1 / 254.0)) * step * scale[None]


def widen(w: jax.Array, scale: jax.Array | None) -> jax.Array:
    """Rows of any form, w [..., D or D/2] and its scale -> the matrix [..., D] in floating point."""
    if scale is None:
        return w
    if w.dtype == jnp.uint8:
        pairs = w.reshape(*w.shape[:-1], -1, BLOCK // 2)
        n = jnp.concatenate([pairs & 15, pairs >> 4], -1).astype(scale.dtype)
        return (n * scale[..., :1] + scale[..., 1:]).reshape(*w.shape[:-1], -1)
    if scale.ndim == w.ndim:
        return (w.reshape(*scale.shape, BLOCK) * scale[..., None]).reshape(w.shape)
    return w * scale[..., None]


def narrowest(w: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """A matrix [F, D] -> (w, scale) of the fewest bytes that hold every number of it exactly. Only float32 is looked at, and only concrete arrays."""
    if w.dtype != jnp.float32 or w.shape[1] % BLOCK or isinstance(w, jax.core.Tracer):
        return w, None
    for form in (four_bits, eight_bits, sixteen_bits):
        if form(w[:SAMPLE])[2]:
            kept, scale, same = form(w)
            if same:
                return kept, scale
    return w, None


def holding(form: Any) -> Any:
    """form(w [F, D]) -> (kept, scale), jitted, with a third answer: whether they hold exactly w."""
    def tried(w):
        kept, scale = form(w)
        return kept, scale, jnp.all(widen(kept, scale).astype(w.dtype) == w)
    return jax.jit(tried)


@holding
def four_bits(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sixteen levels a block, their step a half-precision number: between the extremes (Q4_1), or eight below the number of the largest magnitude (Q4_0)."""
    blocks = w.reshape(len(w), -1, BLOCK)
    low, high = blocks.min(-1, keepdims=True), blocks.max(-1, keepdims=True)
    extreme = jnp.where(-low > high, low, high)
    tries = [(((high - low) / 15).astype(jnp.float16).astype(jnp.float32), low), (-extreme / 8, extreme)]
    (one, first), (two, second) = [(jnp.clip(jnp.round((blocks - offset) / jnp.where(step == 0, 1, step)), 0, 15), jnp.concatenate([step, offset], -1)) for step, offset in tries]
    right = jnp.all(one * first[..., :1] + first[..., 1:] == blocks, -1, keepdims=True)
    level = jnp.where(right, one, two).astype(jnp.uint8)
    return (level[..., :BLOCK // 2] | level[..., BLOCK // 2:] << 4).reshape(len(w), -1), jnp.where(right, first, second)


@holding
def eight_bits(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """255 levels a block around zero, the outermost the largest magnitude (Q8_0)."""
    blocks = w.reshape(len(w), -1, BLOCK)
    step = jnp.abs(blocks).max(-1) / 127
    return jnp.round(blocks / jnp.where(step == 0, 1, step)[..., None]).astype(jnp.int8).reshape(w.shape), step


@holding
def sixteen_bits(w: jax.Array) -> tuple[jax.Array, None]:
    return w.astype(jnp.bfloat16), None
