"""Rows sorted by group, each group times its own matrix: the product of a mixture of experts, at the cost of the rows there are.

`blocks`  CPU: a loop over blocks of rows of one group, as many as there are, with one expert's matrix at hand; backward by hand, dW accumulated in place.
`ragged`  TPU, GPU: `jax.lax.ragged_dot` (on a CPU it would multiply every row with every expert; on a GPU too unless jax_ragged_dot_use_gpu_pallas_triton_lowering is set).
`loop`    the slow twin: every expert on every row, masked.

Legend: M rows, D in, F out, E groups; m rows of a block.
"""
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.lax import dynamic_slice_in_dim as cut
from jax.lax import dynamic_update_slice_in_dim as put

from llmjax.core.contract import accumulate, contract
from llmjax.core.platform import platform


def grouped_matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array, *, implementation: str = "auto") -> jax.Array:
    """-> [M, F] in `x.dtype`: row r of group e is x[r] @ w[e], accumulated in float32.

    x [M, D], sorted by group; w [E, D, F], cast to `x.dtype`; group_sizes int [E], a group may be empty. Rows past their sum come out zero.
    Differentiable in x and w, in reverse mode.
    `implementation`: auto (blocks on a CPU, ragged elsewhere), blocks, ragged or loop. Raises ValueError on another name and on shapes that disagree.
    """
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[1] or group_sizes.shape != w.shape[:1] or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        found = f"x {list(x.shape)}, w {list(w.shape)}, group_sizes {group_sizes.dtype}{list(group_sizes.shape)}"
        raise ValueError(f"grouped_matmul: {found}; they must be [M, D], [E, D, F] and integers [E]")
    forms: dict[str, Callable] = dict(blocks=blocks, ragged=ragged, loop=loop)
    name = ("blocks" if platform() == "cpu" else "ragged") if implementation == "auto" else implementation
    if name not in forms:
        raise ValueError(f"grouped_matmul: implementation={implementation!r}; allowed are auto, {', '.join(forms)}")
    return forms[name](x, w, group_sizes)


def loop(x, w, group_sizes):
    """The slow twin."""
    ends = jnp.cumsum(group_sizes)
    row, out = jnp.arange(x.shape[0])[:, None], jnp.zeros((x.shape[0], w.shape[2]), x.dtype)
    for e in range(w.shape[0]):
        out = jnp.where((row >= ends[e] - group_sizes[e]) & (row < ends[e]), contract("md,df->mf", x, w[e]), out)
    return out


def ragged(x, w, group_sizes):
    """The compiler's own."""
    out = jax.lax.ragged_dot(x, w.astype(x.dtype), group_sizes.astype(jnp.int32), preferred_element_type=jnp.float32)
    inside = jnp.arange(x.shape[0])[:, None] < group_sizes.sum()  # kernels may leave rows past the sizes unwritten
    return jnp.where(inside, out, 0.0).astype(x.dtype)


@jax.custom_vjp
def blocks(x, w, group_sizes):
    """Loop over blocks of one group's rows. Rows are read and written where they lie: what a block writes past its group's end the next block writes over."""
    return _rows("md,df->mf", x, w, group_sizes, w.shape[2])


def _keep(x, w, group_sizes):
    return blocks(x, w, group_sizes), (x, w, group_sizes)


def _backward(kept, g):
    x, w, group_sizes = kept
    return _rows("mf,df->md", g, w, group_sizes, w.shape[1]), _matrices(x, g, group_sizes).astype(w.dtype), None


blocks.defvjp(_keep, _backward)


def _plan(rows, group_sizes):
    """-> (size of a block, number of blocks (traced), then per block: group, first row, end of its group; [most blocks there can be])."""
    groups = group_sizes.shape[0]
    size = min(256, max(16, 1 << (rows // groups).bit_length() - 1 if rows >= groups else 16))  # about a group's rows: little padding, and few reads of each matrix
    most = rows // size + groups
    ends = jnp.cumsum(group_sizes)
    counts = -(-group_sizes // size)
    first = jnp.cumsum(counts) - counts  # a group's first block
    index = jnp.arange(most)
    group = jnp.clip(jnp.searchsorted(jnp.cumsum(counts), index, side="right"), 0, groups - 1)
    start = (ends - group_sizes)[group] + (index - first[group]) * size
    return size, counts.sum(), group, start, ends[group]


def _rows(equation, x, w, group_sizes, width):
    size, count, group, start, end = _plan(x.shape[0], group_sizes)
    padded = jnp.pad(x, ((0, size), (0, 0)))

    def step(b, out):
        matrix = jax.lax.dynamic_index_in_dim(w, group[b], keepdims=False).astype(x.dtype)
        y = accumulate(equation, cut(padded, start[b], size), matrix)
        mine = start[b] + jnp.arange(size)[:, None] < end[b]
        return put(out, jnp.where(mine, y, 0.0).astype(x.dtype), start[b], 0)
    return jax.lax.fori_loop(0, count, step, jnp.zeros((x.shape[0] + size, width), x.dtype))[: x.shape[0]]


def _matrices(x, g, group_sizes):
    """-> float32 [E, D, F]: each group's x^T g."""
    size, count, group, start, end = _plan(x.shape[0], group_sizes)
    x, g = jnp.pad(x, ((0, size), (0, 0))), jnp.pad(g, ((0, size), (0, 0)))
    parts = lambda a: a.reshape(8, size // 8, -1)  # two axes to sum over: the fast product (core/contract.py)

    def step(b, dw):
        mine = start[b] + jnp.arange(size)[:, None] < end[b]
        more = accumulate("cmd,cmf->df", parts(jnp.where(mine, cut(x, start[b], size), 0)), parts(cut(g, start[b], size)))
        old = jax.lax.dynamic_index_in_dim(dw, group[b])
        return put(dw, old + more[None], group[b], 0)
    return jax.lax.fori_loop(0, count, step, jnp.zeros((group_sizes.shape[0], x.shape[1], g.shape[1]), jnp.float32))
