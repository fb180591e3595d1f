"""The one contraction of an activation with a dense weight: float32 accumulation everywhere, and on CPUs a gradient that reaches the fast products.

What it does not hold: leaf kinds (LoRA, int8, …); those stand in `dot`, which ends here.

Why a CPU form. XLA's CPU products of bfloat16 are fast (AMX, AVX-512 BF16) only with a float32 result, and slow where a single long axis is contracted (the weight gradient
`"md,mf->df"`: 60 to 80 GFLOP/s on a two-core Intel with AMX, against 240 to 500 for the same sum written over two axes, `"cmd,cmf->df"`). Autodiff of the plain form also
multiplies a float32 cotangent with a bfloat16 activation. So on a CPU the gradient is written by hand, in the activation's dtype, and the weight gradient leaves in the
weight's dtype straight from the float32 accumulator.
"""
import functools
import math

import jax
import jax.numpy as jnp

from llmjax.core.platform import partitioned, platform

SPLIT = 8  # parts of the long axis in the weight gradient; 4 to 16 measure alike where the products are large, 8 is never the slowest


def contract(equation: str, x: jax.Array, w: jax.Array, *, out_dtype=None) -> jax.Array:
    """einsum of activations `x` with a dense weight `w`, which is cast to `x.dtype`: accumulates in float32, answers in `out_dtype or x.dtype`.

    `equation` is explicit, of two operands, without ellipsis: "btd,dnh->btnh", "btnh,nhd->btd", "btd,vd->btv", "etd,edf->etf". Each letter stands in at least two of the three
    terms. On a GPU and on a mesh of several CPU devices it is the plain einsum, also to autodiff. On one CPU device with 16-bit activations the gradient is a custom one
    (reverse mode only) in which dw comes in `w.dtype`. On a TPU 16-bit products leave the matrix unit, which sums in float32 whatever it answers in, in the dtype asked for, and
    gradients in x's dtype (reverse mode only where that is another): what devices add up between them crosses the wires in 16 bits.
    Raises ValueError on an equation of another form and on a `w` that is not floating point.
    """
    _parse(equation)
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"contract: the weight has dtype {w.dtype}; a dense floating point weight is needed (quantised leaves go through dot)")
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    if x.dtype.itemsize == 2 and platform() == "cpu" and not partitioned():
        return _on_cpu(equation, out_dtype, x, w)
    if x.dtype.itemsize == 2 and platform() == "tpu":
        return jnp.einsum(equation, x, w.astype(x.dtype), preferred_element_type=out_dtype) if out_dtype == x.dtype else _wider(equation, out_dtype, x, w.astype(x.dtype))
    return jnp.einsum(equation, x, w.astype(x.dtype), preferred_element_type=jnp.float32).astype(out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _on_cpu(equation, out_dtype, x, w):
    return accumulate(equation, x, w.astype(x.dtype)).astype(out_dtype)


def _on_cpu_forward(equation, out_dtype, x, w):
    w_cast = w.astype(x.dtype)
    return accumulate(equation, x, w_cast).astype(out_dtype), (x, w_cast, jnp.zeros((0,), w.dtype))


def _on_cpu_backward(equation, out_dtype, kept, g):
    x, w, like = kept
    xs, ws, ys = _parse(equation)
    g = g.astype(x.dtype)
    return accumulate(f"{ys},{ws}->{xs}", g, w).astype(x.dtype), _weight_gradient(equation, x, g, like.dtype)


_on_cpu.defvjp(_on_cpu_forward, _on_cpu_backward)


def _weight_gradient(equation, x, g, dtype):
    """dw of `equation` in `dtype`, summed over the long axes (those of x and y that w lacks) in `SPLIT` parts."""
    xs, ws, ys = _parse(equation)
    batch = "".join(c for c in ws if c in xs and c in ys)
    long = "".join(c for c in xs if c in ys and c not in ws)
    inputs, outputs = ("".join(c for c in ws if c in term and c not in batch) for term in (xs, ys))
    size = dict(zip(xs, x.shape)) | dict(zip(ys, g.shape))
    length = math.prod(size[c] for c in long)
    parts = next((n for n in range(SPLIT, 1, -1) if length % n == 0), SPLIT)

    def cut(term, letters, array):  # -> [batch…, part, length // part, rest…]
        array = array.transpose([term.index(c) for c in batch + long + letters])
        array = array.reshape(*(size[c] for c in batch), length, *(size[c] for c in letters))
        if length % parts:  # a prime length: zero rows add nothing
            array = jnp.pad(array, [(0, parts - length % parts if i == len(batch) else 0) for i in range(array.ndim)])
        return array.reshape(*array.shape[: len(batch)], parts, -1, *array.shape[len(batch) + 1 :])

    part, row = (c for c in "PQ")  # upper case: equations of this code base are lower case
    first, second = (xs, inputs, x), (ys, outputs, g)
    if ws.find(outputs) < ws.find(inputs):  # weights stored [out, in]: their order, so that no transpose follows
        first, second = second, first
    natural = batch + first[1] + second[1]
    dw = accumulate(f"{batch}{part}{row}{first[1]},{batch}{part}{row}{second[1]}->{natural}", cut(*first), cut(*second))
    return dw.transpose([natural.index(c) for c in ws]).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _wider(equation, out_dtype, x, w):
    return jnp.einsum(equation, x, w, preferred_element_type=out_dtype)


def _wider_backward(equation, out_dtype, kept, g):
    x, w = kept
    return jax.vjp(functools.partial(jnp.einsum, equation, preferred_element_type=x.dtype), x, w)[1](g.astype(x.dtype))


_wider.defvjp(lambda equation, out_dtype, x, w: (_wider(equation, out_dtype, x, w), (x, w)), _wider_backward)


def accumulate(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """einsum with a float32 result, safe on XLA's CPU backend.

    A transpose near a 16-bit product is folded into it there, and what comes out cannot run ("Unsupported element type for DotThunk", jax 0.10.2: batch axes, several
    contracted axes) or is first turned into a float32 product, on one core. A barrier keeps a following transpose apart, a reshape that joins the batch axes a preceding one;
    products do not fuse on a CPU, so neither costs anything. Results in another order than the product's own are turned after the barrier.
    """
    if a.dtype.itemsize != 2 or platform() != "cpu":
        return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
    terms, out = equation.split("->")
    left, right = terms.split(",")
    size = dict(zip(left + right, a.shape + b.shape))
    batch = "".join(c for c in left if c in right and c in out)
    natural = batch + "".join(c for c in left if c in out and c not in batch) + "".join(c for c in right if c in out and c not in batch)
    made, joined = natural, len(batch) if left.startswith(batch) and right.startswith(batch) else 1
    if joined > 1:
        a, b = (x.reshape(-1, *x.shape[joined:]) for x in (a, b))
        left, right, made = (term[joined - 1:] for term in (left, right, natural))
    product = jax.lax.optimization_barrier(jnp.einsum(f"{left},{right}->{made}", a, b, preferred_element_type=jnp.float32))
    return product.reshape([size[c] for c in natural]).transpose([natural.index(c) for c in out])


@functools.cache
def _parse(equation):
    """-> the letters of x, w and y; ValueError on another form."""
    terms, arrow, ys = equation.replace(" ", "").partition("->")
    xs, comma, ws = terms.partition(",")
    letters = xs + ws + ys
    good = arrow and comma and letters.isalpha() and letters.islower() and all(len(set(term)) == len(term) for term in (xs, ws, ys))
    if not good or any(sum(c in term for term in (xs, ws, ys)) < 2 for c in letters):
        raise ValueError(f"contract: equation {equation!r}; it must be two terms of different lower-case letters and a result, each letter in two terms at least, as 'btd,df->btf'")
    return xs, ws, ys
