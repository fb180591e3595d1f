"""Array leaves: what may stand in a parameter tree where a weight stood, and `dot`, the only place that knows the kinds.

A leaf replaces a weight without the model knowing: a LoRA leaf adds a low-rank product, an int8 leaf holds quantised numbers, a leaf of rows holds the same
numbers in the order and the form in which a CPU reads them fastest, a joined leaf several weights of one input side by side. Leaves compose: QLoRA is a LoRA leaf around a
quantised leaf.
Each leaf answers `shape` (the weight's own), `dtype` (what `dense` gives) and `ndim`.
"""
from __future__ import annotations

import dataclasses as dc
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass

from llmjax.core.contract import contract
from llmjax.core.kept import times, widen
from llmjax.core.platform import platform


class Around:
    """A leaf around the weight w, whose shape and dtype are its own."""
    w: Any

    @property
    def shape(self):
        return self.w.shape

    @property
    def dtype(self):
        return self.w.dtype

    @property
    def ndim(self):
        return len(self.w.shape)


@register_dataclass
@dc.dataclass(frozen=True)
class Lora(Around):
    """w + (alpha / rank) · a b (Hu et al. 2021, eq. 3). w [batch…, in…, out…], a [batch…, in…, R], b [batch…, R, out…]."""
    w: Any
    a: jax.Array
    b: jax.Array
    alpha: float = dc.field(metadata=dict(static=True))


@register_dataclass
@dc.dataclass(frozen=True)
class Int8:
    """q · scale: symmetric int8, one float scale per output channel. q has the weight's shape; scale too, with size 1 on the contracted dimensions."""
    q: jax.Array
    scale: jax.Array

    @property
    def shape(self):
        return self.q.shape

    @property
    def dtype(self):
        return self.scale.dtype

    @property
    def ndim(self):
        return self.q.ndim


@register_dataclass
@dc.dataclass(frozen=True)
class Rows:
    """A weight of `shape` [in…, out…], of which the first `inputs` dimensions are contracted, as a CPU reads it fastest: the matrix [prod(out), prod(in)], its numbers w and scale in one of
    the forms of `core/kept.py`. inputs 0: a tied embedding [V, D], kept as it is and as the head reads it. `dtype` is what the weight's numbers are to everyone else."""
    w: jax.Array
    scale: jax.Array | None
    shape: tuple[int, ...] = dc.field(metadata=dict(static=True))
    inputs: int = dc.field(metadata=dict(static=True))
    dtype: Any = dc.field(metadata=dict(static=True))

    @property
    def ndim(self):
        return len(self.shape)


@register_dataclass
@dc.dataclass(frozen=True)
class Joined:
    """One of several weights that `dots` multiplies with the same input: number `place` of those with `shapes` [in…, out…]. The first holds them all, side by side, as the Rows
    of a weight [prod(in), sum of prod(out)]; in the others w is None."""
    w: Rows | None
    shapes: tuple[tuple[int, ...], ...] = dc.field(metadata=dict(static=True))
    inputs: int = dc.field(metadata=dict(static=True))
    place: int = dc.field(metadata=dict(static=True))

    @property
    def shape(self):
        return self.shapes[self.place]

    @property
    def dtype(self):
        return None if self.w is None else self.w.dtype

    @property
    def ndim(self):
        return len(self.shape)


@register_dataclass
@dc.dataclass(frozen=True)
class Adapters(Around):
    """Several low-rank adapters of one weight, of which each row of a batch takes one or none: row b is multiplied with w + a[i] b[i], i = which[b] - 1; 0 is w alone.

    w: the weight, of any kind but this; a [n, in…, R], b [n, R, out…] with each adapter's scale in it, a smaller rank padded with zeros. which [B] int32, set by `chosen` within a program;
    None: no row takes any. All n are multiplied with all rows, side by side, and the rows' own kept: n R columns beside the weight's own, which is little while n R is (S-LoRA's gathering
    kernels, Sheng et al. 2023, arXiv:2311.03285, are for many more). Activations have their batch axis first; the weight has no batch axes.
    """
    w: Any
    a: jax.Array
    b: jax.Array
    which: jax.Array | None = None


KINDS = (Lora, Int8, Rows, Joined, Adapters)


def is_leaf(x: Any) -> bool:
    """Whether x stands for one weight although jax sees a subtree."""
    return isinstance(x, KINDS)


def dot(equation: str, x: jax.Array, weight: Any, *, out_dtype: Any = None) -> jax.Array:
    """einsum(equation, x, weight) for any kind of weight, accumulated in float32, in x's dtype unless `out_dtype` says otherwise.

    equation: "btd,dnh->btnh": activations (the contracted axes last), then the weight with its batch axes, contracted axes and produced axes in this order.
    """
    if isinstance(weight, Lora):
        down, up = lora_equations(equation, weight.a.ndim, weight.b.ndim, weight.ndim)
        low = contract(up, contract(down, x, weight.a), weight.b, out_dtype=out_dtype)
        return dot(equation, x, weight.w, out_dtype=out_dtype) + jnp.asarray(weight.alpha / weight.a.shape[-1], low.dtype) * low
    if isinstance(weight, Int8):
        left, out = equation.split("->")
        letters = left.split(",")[1]
        kept = "".join(c for i, c in enumerate(letters) if weight.scale.shape[i] != 1 or c in out)
        scale = weight.scale.reshape([n for c, n in zip(letters, weight.scale.shape) if c in kept])
        y = jnp.einsum(equation, x, weight.q.astype(x.dtype), preferred_element_type=jnp.float32)
        return (y * aligned(scale, kept, out)).astype(out_dtype or x.dtype)
    if isinstance(weight, Rows):
        return through_rows(x, weight, weight.shape[weight.inputs:] if weight.inputs else weight.shape[:1], out_dtype)
    if isinstance(weight, Adapters):
        y = dot(equation, x, weight.w, out_dtype=out_dtype)
        return y + of_adapters(equation, x, weight, out_dtype) if weight.which is not None else y
    if isinstance(weight, Joined):
        raise TypeError("a Joined leaf is read with its companions, by dots")
    if alone(equation, x):
        return contract(equation, jnp.pad(x, [(0, 1), *[(0, 0)] * (x.ndim - 1)]), weight, out_dtype=out_dtype)[:1]
    return contract(equation, x, weight, out_dtype=out_dtype)


def alone(equation: str, x: jax.Array) -> bool:
    """Whether x is a single row of 16-bit numbers on a CPU, where XLA's products need two: else they convert the whole weight first (a head of 49,152 × 576: 25 ms against 2)."""
    letters, ws = equation.split("->")[0].split(",")
    rows = [n for c, n in zip(letters, x.shape) if c not in ws]
    return platform() == "cpu" and x.dtype.itemsize == 2 and letters[0] not in ws and math.prod(rows) == 1


def of_adapters(equation: str, x: jax.Array, weight: Adapters, out_dtype: Any) -> jax.Array:
    """What the adapters add to dot(equation, x, weight.w)."""
    left, out = equation.split("->")
    xs, ws = left.split(",")
    inputs = weight.a.ndim - 2
    rest = "".join(c for c in xs if c not in ws[:inputs])
    low = contract(f"{xs},y{ws[:inputs]}z->{rest}yz", x, weight.a)
    return contract(f"{rest}yz,yz{ws[inputs:]}->{out}", own(weight, low, len(rest)), weight.b, out_dtype=out_dtype)


def own(weight: Adapters, low: jax.Array, place: int) -> jax.Array:
    """low [B, …, n, R], its axis `place` that of the adapters, with zeros but for each row's own."""
    assert weight.which is not None
    count = weight.a.shape[0]
    mine = weight.which[:, None] == jnp.arange(1, count + 1)[None]
    return jnp.where(mine.reshape(-1, *[1] * (place - 1), count, 1), low, 0)


def chosen(params: Any, which: jax.Array) -> Any:
    """The parameters for a batch whose row b takes adapter which[b] of every Adapters leaf (0: none). which [B] int32."""
    return jax.tree.map(lambda w: dc.replace(w, which=which) if isinstance(w, Adapters) else w, params, is_leaf=is_leaf)


def through_rows(x: jax.Array, weight: Rows, shape: tuple[int, ...], out_dtype: Any) -> jax.Array:
    """x [..., in…] -> [..., *shape]"""
    lead, size, inputs = x.ndim, 1, math.prod(weight.shape[:weight.inputs]) if weight.inputs else weight.shape[1]
    while size < inputs:                                   # the last axes of x, as many as the matrix takes in
        lead, size = lead - 1, size * x.shape[lead - 1]
    return times(x.reshape(-1, inputs), weight.w, weight.scale).astype(out_dtype or x.dtype).reshape(*x.shape[:lead], *shape)


def dots(equation: str, x: jax.Array, weights: Sequence[Any]) -> list[jax.Array]:
    """[dot(equation, x, w) for w in weights]: several weights of the same input, which may differ in the sizes they produce; in one product where they are joined."""
    if any(isinstance(w, Adapters) for w in weights):
        plain = dots(equation, x, [w.w if isinstance(w, Adapters) else w for w in weights])
        return [y + of_adapters(equation, x, w, None) if isinstance(w, Adapters) and w.which is not None else y for y, w in zip(plain, weights)]
    first = weights[0]
    if not isinstance(first, Joined) or first.w is None:
        return [dot(equation, x, w) for w in weights]
    made = [shape[first.inputs:] for shape in first.shapes]
    ends = np.cumsum([math.prod(shape) for shape in made])
    parts = jnp.split(through_rows(x, first.w, (int(ends[-1]),), None), ends[:-1], -1)
    return [y.reshape(*y.shape[:-1], *shape) for y, shape in zip(parts, made)]


def join(weights: Sequence[Rows]) -> list[Joined]:
    """Weights of the same inputs, kept in the same form, as Joined leaves."""
    first, shapes = weights[0], tuple(w.shape for w in weights)
    w, scales = jnp.concatenate([w.w for w in weights]), [w.scale for w in weights if w.scale is not None]
    whole = Rows(w, jnp.concatenate(scales) if scales else None, (math.prod(first.shape[:first.inputs]), len(w)), 1, first.dtype)
    return [Joined(None if i else whole, shapes, first.inputs, i) for i in range(len(weights))]


def aligned(x: jax.Array, letters: str, target: str) -> jax.Array:
    """x, whose dimensions are `letters`, transposed and reshaped to broadcast against `target`."""
    order = sorted(range(len(letters)), key=lambda i: target.index(letters[i]))
    x = x.transpose(order)
    sizes = dict(zip((letters[i] for i in order), x.shape))
    return x.reshape([sizes.get(c, 1) for c in target])


@functools.cache
def lora_equations(equation: str, a_ndim: int, b_ndim: int, w_ndim: int) -> tuple[str, str]:
    """"btd,dnh->btnh" -> ("btd,dz->btz", "btz,znh->btnh"); batch axes of the weight go through both."""
    left, out = equation.split("->")
    xs, ws = left.split(",")
    batch = a_ndim + b_ndim - 2 - w_ndim
    inputs = a_ndim - 1 - batch
    lead, summed, made = ws[:batch], ws[batch:batch + inputs], ws[batch + inputs:]
    middle = "".join(c for c in xs if c not in summed) + "".join(c for c in lead if c not in xs) + "z"
    return f"{xs},{lead}{summed}z->{middle}", f"{middle},{lead}z{made}->{out}"


def dense(weight: Any) -> jax.Array:
    """The plain array a leaf stands for (for saving, merging and tests)."""
    if isinstance(weight, Lora):
        batch = weight.a.ndim + weight.b.ndim - 2 - weight.ndim
        w = dense(weight.w)
        lead, rank = weight.a.shape[:batch], weight.a.shape[-1]
        a = weight.a.reshape(*lead, -1, rank).astype(jnp.float32)
        b = weight.b.reshape(*lead, rank, -1).astype(jnp.float32)
        return (w + (weight.alpha / rank * (a @ b)).reshape(w.shape)).astype(w.dtype)
    if isinstance(weight, Adapters):
        raise TypeError("an Adapters leaf stands for several weights, one per row of a batch")
    if isinstance(weight, Int8):
        return weight.q.astype(weight.scale.dtype) * weight.scale
    if isinstance(weight, Rows):
        w = widen(weight.w, weight.scale).astype(weight.dtype)
        return (w.T if weight.inputs else w).reshape(weight.shape)
    if isinstance(weight, Joined):
        if weight.w is None:
            raise TypeError("this weight's numbers lie in another Joined leaf")
        return dense(weight.w)[:, :math.prod(weight.shape[weight.inputs:])].reshape(weight.shape)
    return weight


def take(table: Any, ids: jax.Array, dtype: Any) -> jax.Array:
    """Rows of an embedding table of any leaf kind. table [V, D], ids [...] int32 -> [..., D] in `dtype`."""
    if isinstance(table, Lora):
        low = take(table.a, ids, dtype) @ table.b.astype(dtype)
        return take(table.w, ids, dtype) + jnp.asarray(table.alpha / table.a.shape[-1], dtype) * low
    if isinstance(table, Adapters):
        x = take(table.w, ids, dtype)
        if table.which is None:
            return x
        low = own(table, jnp.moveaxis(table.a[:, ids], 0, -2).astype(dtype), ids.ndim)
        return x + jnp.einsum("...yz,yzd->...d", low, table.b.astype(dtype), preferred_element_type=jnp.float32).astype(dtype)
    if isinstance(table, Int8):
        scale = table.scale.reshape((1,) * ids.ndim + (-1,)) if table.scale.shape[0] == 1 else table.scale[ids]
        return table.q[ids].astype(dtype) * scale.astype(dtype)
    if isinstance(table, Rows):
        return widen(table.w[ids], None if table.scale is None else table.scale[ids]).astype(dtype)
    return table[ids].astype(dtype)


def quantize_int8(w: jax.Array, contracted: tuple[int, ...]) -> Int8:
    """Symmetric rounding to [-127, 127] with one scale per output channel (the largest magnitude over the contracted dimensions)."""
    largest = jnp.max(jnp.abs(w.astype(jnp.float32)), axis=contracted, keepdims=True)
    scale = jnp.where(largest > 0, largest, 1.0) / 127.0
    return Int8(jnp.round(w / scale).astype(jnp.int8), scale)


def add_lora(key: jax.Array, w: Any, inputs: tuple[int, ...], outputs: tuple[int, ...], rank: int, alpha: float | None = None) -> Lora:
    """A LoRA leaf around w that changes nothing yet: a ~ N(0, 1/fan_in), b = 0. `inputs` and `outputs` are dimension numbers (see Label.dims)."""
    lead = w.shape[:min(inputs)]
    ins, outs = (tuple(w.shape[i] for i in dims) for dims in (inputs, outputs))
    a = jax.random.normal(key, (*lead, *ins, rank), jnp.float32) / math.sqrt(math.prod(ins))
    return Lora(w, a, jnp.zeros((*lead, rank, *outs), jnp.float32), float(rank if alpha is None else alpha))
