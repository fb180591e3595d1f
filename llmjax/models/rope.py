"""Rotary positions: frequencies of each scaling, tables of sines and cosines, the rotation. Formulas as in transformers' modeling_rope_utils (the reference of the tests).

Legend: B batch, T query length, N heads, H head dim.
"""
from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.core.positions import DynamicNtk, LinearScaling, Llama3Scaling, LongRope, Proportional, Rope, Yarn


def rotary_dims(rope: Rope, head_dim: int) -> int:
    return int(head_dim * rope.fraction)


def frequencies(rope: Rope, head_dim: int, length: jax.Array | None = None) -> tuple[jax.Array, float]:
    """-> (radians per position, [d/2] float32, or [B, 1, d/2] where they depend on the sequence; factor on sines and cosines). `length` [B]: tokens of each row, for DynamicNtk and LongRope."""
    d = rotary_dims(rope, head_dim)
    exponents = np.arange(0, d, 2, dtype=np.float32) / d
    plain = 1.0 / rope.theta ** exponents.astype(np.float64)
    match rope.scaling:
        case None:
            return jnp.asarray(plain, jnp.float32), 1.0
        case Proportional(fraction, factor):
            return jnp.asarray(np.where(np.arange(d // 2) < int(fraction * d // 2), plain, 0) / factor, jnp.float32), 1.0
        case LinearScaling(factor):
            return jnp.asarray(plain / factor, jnp.float32), 1.0
        case DynamicNtk(factor, context):
            assert length is not None, "DynamicNtk needs the length"
            longest = jnp.maximum(length.astype(jnp.float32), context)
            theta = rope.theta * (factor * longest / context - (factor - 1)) ** (d / (d - 2))
            return (1.0 / theta[:, None] ** jnp.asarray(exponents)[None])[:, None], 1.0
        case Llama3Scaling(factor, low_factor, high_factor, context):
            wavelength = 2 * math.pi / plain
            above = context / wavelength - low_factor
            smooth = np.clip(above / (high_factor - low_factor), 0.0, 1.0) if high_factor != low_factor else (above >= 0).astype(np.float64)
            return jnp.asarray((1 - smooth) * plain / factor + smooth * plain, jnp.float32), 1.0
        case LongRope(short, long, context, factor):
            assert length is not None, "LongRope needs the length"
            near, far = (jnp.asarray(plain / np.array(divisors), jnp.float32) for divisors in (short, long))
            return jnp.where((length > context)[:, None, None], far[None, None], near[None, None]), factor
        case Yarn() as yarn:
            return yarn_frequencies(rope.theta, plain, d, yarn)
    raise TypeError(f"rope scaling {rope.scaling!r}")


def yarn_frequencies(theta: float, plain: np.ndarray, d: int, yarn: Yarn) -> tuple[jax.Array, float]:
    """NTK-by-parts (arXiv:2309.00071, eq. 17 to 23): dimensions that turn more than beta_fast times within the context stay, those below beta_slow are interpolated."""
    def dimension(turns):
        return d * math.log(yarn.context / (turns * 2 * math.pi)) / (2 * math.log(theta))
    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    ramp = np.clip((np.arange(d // 2) - low) / max(high - low, 1e-3), 0, 1)
    mixed = plain / yarn.factor * ramp + plain * (1 - ramp)
    factor = yarn.attention_factor
    if factor is None:
        factor = yarn.temperature(yarn.mscale) / yarn.temperature(yarn.mscale_all_dim) if yarn.mscale and yarn.mscale_all_dim else yarn.temperature(1.0)
    return jnp.asarray(mixed, jnp.float32), factor


def tables(rope: Rope, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sines (signed for `rotate`) and cosines, [B, T, 1, d] float32 each, for positions [B, T] int32."""
    radians, factor = frequencies(rope, head_dim, positions.max(-1) + 1)
    angles = (positions[..., None].astype(jnp.float32) * radians.reshape(-1, 1, radians.shape[-1]))[:, :, None]
    sin, cos = jnp.sin(angles) * (-factor if rope.reverse else factor), jnp.cos(angles) * factor
    if rope.interleaved:
        return jnp.stack([-sin, sin], -1).reshape(*sin.shape[:-1], -1), jnp.repeat(cos, 2, -1)
    return jnp.concatenate([-sin, sin], -1), jnp.concatenate([cos, cos], -1)


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array], rope: Rope) -> jax.Array:
    """x [B, T, N, H] with its first d dimensions turned; in float32, result in x's dtype.

    Written as x · cos + partner · sin with a rolled (or flipped) partner: autodiff of split and concatenate costs several passes over memory.
    """
    sin, cos = table
    d = sin.shape[-1]
    turned, rest = x[..., :d].astype(jnp.float32), x[..., d:]
    if rope.interleaved:
        partner = jnp.flip(turned.reshape(*turned.shape[:-1], d // 2, 2), -1).reshape(turned.shape)
    else:
        partner = jnp.roll(turned, d // 2, -1)
    y = (turned * cos + partner * sin).astype(x.dtype)
    return jnp.concatenate([y, rest], -1) if rest.shape[-1] else y
