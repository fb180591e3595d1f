"""The repeated layers over the stages of a pipeline: each stage holds a share of them, microbatches pass from stage to stage, all in one program.

GPipe (Huang et al. 2019, arXiv:1811.06965), and with `layout.interleave` v > 1 the circular schedule (Narayanan et al. 2021, arXiv:2104.04473, section 2.2): a stage holds v chunks of
layers, a microbatch goes round v times. With n stages and M microbatches there are M v + n − 1 ticks, n − 1 of them idle on each stage. At tick t a stage s works on
u = t − s: of each n v places of the order, the chunk (u mod n v) / n of microbatch (u / n v) n + u mod n.

Weights are brought together over the axes that divide the batch once, in the computing dtype, before the first tick, and their gradients are reduced once after the last.

Legend: B batch, b rows of a stage, T length, D embed; n stages, v chunks a stage, M microbatches, c layers of a chunk.
"""
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from llmjax.core import Layout, ShardingError, free_axes, platform
from llmjax.core.mesh import mesh_axes, microbatches, partition
from llmjax.core.tree import map_named

Stage = Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]]


def pipelined(layout: Layout) -> int:
    """Over how many stages the layers lie on the ambient mesh."""
    return free_axes("layer", layout.rules)[2]


def run(stage: Stage, params: Any, labels: Any, x: jax.Array, shared: Any, layout: Layout, dtype: Any) -> tuple[jax.Array, Any]:
    """-> (x [B, T, D] after all layers, what `stage` says, summed over the batch, stacked over the layers).

    stage(weights of some layers, x [b / M, T, D], shared) -> (x, sums stacked over these layers). params: stacks [layers, …] with their labels; shared: a tree of arrays whose first
    axis is the batch, or 1. Raises ShardingError where rows or layers do not divide.
    """
    mesh, (axis,), n = free_axes("layer", layout.rules)
    rows = tuple(a for a in free_axes("batch", layout.rules)[1] if a in ("data", "fsdp"))
    manual, v, M = {axis, *rows}, layout.interleave, microbatches(layout)
    B, count = x.shape[0], jax.tree.leaves(params)[0].shape[0]
    parts = int(np.prod([mesh.shape[a] for a in rows], dtype=int))
    if B % (parts * M):
        raise ShardingError(f"pipeline: a batch of {B} rows over {parts} parts does not divide into {M} microbatches; change batch_size or layout.microbatches")
    if count % (n * v):
        raise ShardingError(f"pipeline: {count} repeated layers do not divide into {n} stages of {v} chunks; change layout.stage or layout.interleave, or let some layers stand in model.suffix")

    def spec(name, leaf, label):
        if not hasattr(leaf, "ndim") or isinstance(leaf, jax.ShapeDtypeStruct) or leaf.ndim != len(label.axes):
            return PartitionSpec(axis)
        whole = partition(label.axes, leaf.shape, mesh, layout.rules, name)
        return PartitionSpec(*(tuple(a for a in mesh_axes(entry) if a in manual) or None for entry in whole))
    specs = map_named(spec, params, labels)

    def within(name, leaf, label):
        whole = partition(label.axes, leaf.shape, mesh, layout.rules, name) if label.is_matrix else ()
        return PartitionSpec(*(tuple(a for a in mesh_axes(entry) if a not in manual and mesh.shape[a] > 1) or None for entry in whole))
    inner = map_named(within, params, labels)
    _, divided, share = free_axes("residual", layout.rules)
    stream = PartitionSpec(None, tuple(a for a in divided if a not in manual)) if share > 1 and x.shape[1] % share == 0 else PartitionSpec()
    batch = jax.tree.map(lambda y: PartitionSpec(rows or None) if y.shape[0] == B and B > 1 else PartitionSpec(), shared)
    matrices = map_named(lambda name, leaf, label: label.is_matrix, params, labels)

    def local(params, x, shared):
        x = x.astype(dtype)
        weights = jax.tree.map(lambda w, at, rest, matrix: gathered(w.astype(dtype) if matrix and jnp.issubdtype(w.dtype, jnp.floating) else w, at, rest, axis), params, specs, inner, matrices)
        weights = jax.tree.map(lambda w: w.reshape(v, w.shape[0] // v, *w.shape[1:]), dealt(weights, axis, n, v) if v > 1 else weights)
        split = lambda y: y.reshape(y.shape[0] // M, M, *y.shape[1:]) if y.shape[0] == x.shape[0] else y[:, None]       # rows i M + m are microbatch m: a divided batch axis stays divided
        pick = lambda y, m: jax.lax.dynamic_index_in_dim(y, m if y.shape[1] > 1 else 0, 1, keepdims=False)
        parts, shared = split(x), jax.tree.map(split, shared)
        mine = jax.lax.axis_index(axis)

        def work(weights, h, t):
            u = t - mine
            live, u = (u >= 0) & (u < M * v), jnp.clip(u, 0, M * v - 1)
            j, m = u % (n * v) // n, u // (n * v) * n + u % n
            chunk = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, j, 0, keepdims=False), weights)
            h = jnp.where((mine == 0) & (j == 0), pick(parts, m), h)
            y, said = stage(chunk, h, jax.tree.map(lambda s: pick(s, m), shared))
            return y, jax.tree.map(lambda s: jnp.where(live, s, 0), said), j, m, live & (mine == n - 1) & (j == v - 1)
        if v > 1:                                                                                 # else every tick would keep what a whole chunk keeps, v times as often
            work = jax.checkpoint(work, prevent_cse=False)

        def tick(carry, t):
            h, done, sums = carry
            y, said, j, m, last = work(weights, h, t)
            sums = jax.tree.map(lambda total, s: total.at[j].add(s), sums, said)
            old = jax.lax.dynamic_index_in_dim(done, m, 1, keepdims=False)
            done = jax.lax.dynamic_update_index_in_dim(done, jnp.where(last, y, old), m, 1)
            return (jax.lax.ppermute(y, axis, [(i, (i + 1) % n) for i in range(n)]), done, sums), None
        said = jax.eval_shape(work, weights, parts[:, 0], jnp.int32(0))[1]
        start = jnp.zeros_like(parts[:, 0]), jnp.zeros_like(parts), jax.tree.map(lambda s: jnp.zeros((v, *s.shape), s.dtype), said)
        (_, done, sums), _ = jax.lax.scan(tick, start, jnp.arange(M * v + n - 1))
        sums = jax.tree.map(lambda s: (jax.lax.psum(s, rows) if rows else s).reshape(-1, *s.shape[2:]), sums)
        return scattered(done.reshape(x.shape), axis, stream), sums
    out = jax.shard_map(local, in_specs=(specs, PartitionSpec(rows or None), batch), out_specs=(PartitionSpec((*rows, axis)), PartitionSpec(axis)), axis_names=manual, check_vma=False)
    y, sums = out(params, wide(x), shared)          # a stage's gradient of x is summed with the others' zeros
    order = np.argsort([(j * n + s) * (count // (n * v)) + i for s in range(n) for j in range(v) for i in range(count // (n * v))])
    return y, jax.tree.map(lambda s: s[order], sums)


def wide(x: jax.Array) -> jax.Array:
    """What a sum over devices is made in: XLA's CPU backend stops at one of 16-bit numbers over manual axes."""
    return x.astype(jnp.float32) if platform() == "cpu" and x.dtype.itemsize < 4 else x


def gathered(w: jax.Array, spec: PartitionSpec, rest: PartitionSpec, stage: str) -> jax.Array:
    """A stage's piece of a weight -> the whole of it, over every axis but the stage's; the gradient is summed once over all of them. rest: the automatic axes that divide it, and go on doing so."""
    for dim, entry in enumerate(spec):
        for a in reversed([a for a in mesh_axes(entry) if a != stage]):
            w = gather(a, dim, rest, w)
    return w


def apart(function: Callable[[jax.Array], jax.Array], rest: PartitionSpec) -> Callable[[jax.Array], jax.Array]:
    """A collective over manual axes on an array that automatic axes divide: each of their devices does its own. The partitioner would bring the array together over them first."""
    axes = {a for entry in rest for a in mesh_axes(entry)}
    return jax.shard_map(function, in_specs=rest, out_specs=rest, axis_names=axes, check_vma=False) if axes else function


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def gather(axis: str, dim: int, rest: PartitionSpec, w: jax.Array) -> jax.Array:
    return apart(lambda w: jax.lax.all_gather(w, axis, axis=dim, tiled=True), rest)(w)


def _gather_backward(axis: str, dim: int, rest: PartitionSpec, _: None, g: jax.Array) -> tuple[jax.Array]:
    return (apart(lambda g: jax.lax.psum_scatter(wide(g), axis, scatter_dimension=dim, tiled=True).astype(g.dtype), rest)(g),)


gather.defvjp(lambda axis, dim, rest, w: (gather(axis, dim, rest, w), None), _gather_backward)


def scattered(x: jax.Array, axis: str, rest: PartitionSpec) -> jax.Array:
    """x [b, …], zero on all stages but one -> each stage its share of the rows [b / n, …]; rows that do not divide stay whole, summed."""
    return apart(lambda x: jax.lax.psum_scatter(wide(x), axis, scatter_dimension=0, tiled=True).astype(x.dtype), rest)(x)


@functools.cache
def deal(n: int, v: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """How chunks travel from where they are kept (stage s: chunks s v … s v + v − 1) to where they are computed (chunk g on stage g mod n): v rounds, in each of which every stage
    sends one and gets one. -> per round and sender (its chunk's number 0 … v − 1, the receiver)."""
    left = [[[i for i in range(v) if (s * v + i) % n == d] for d in range(n)] for s in range(n)]
    rounds = []
    for _ in range(v):
        to = maximum_bipartite_matching(csr_array(np.array([[len(c) for c in row] for row in left])), perm_type="column")
        rounds.append(tuple((left[s][int(to[s])].pop(), int(to[s])) for s in range(n)))
    return tuple(rounds)


def dealt(weights: Any, axis: str, n: int, v: int) -> Any:
    """Stacks [v c, …] of a stage as they are kept -> as they are computed, chunk after chunk."""
    mine = jax.lax.axis_index(axis)

    def one(w):
        chunks = w.reshape(v, w.shape[0] // v, *w.shape[1:])
        out = jnp.zeros_like(chunks)
        for sends in deal(n, v):
            got = chunks[jnp.array([i for i, _ in sends])[mine]]
            if any(s != d for s, (_, d) in enumerate(sends)):
                got = jax.lax.ppermute(got, axis, [(s, d) for s, (_, d) in enumerate(sends)])
            place = {d: (s * v + i) // n for s, (i, d) in enumerate(sends)}
            out = out.at[jnp.array([place[d] for d in range(n)])[mine]].set(got)
        return out.reshape(w.shape)
    return jax.tree.map(one, weights)
