"""Rows of an embedding table on a mesh, with a gradient that crosses the wires in the computing dtype.

Where the batch and the table's width are divided over the same devices, rows and their gradients change places between them. By autodiff the gradient is widened first and crosses in
float32; here it crosses as it is and is widened where it is added up, which is in the table's dtype either way.

Legend: B batch, T length, V vocab, D embed.
"""
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llmjax.core.leaves import is_leaf, take
from llmjax.core.mesh import RULES, mesh_axes
from llmjax.core.platform import partitioned


def lookup(table, ids: jax.Array, dtype) -> jax.Array:
    """`core.take`: table [V, D] of any leaf kind, ids [B, T] int -> [B, T, D] in `dtype`."""
    if is_leaf(table) or ids.ndim != 2 or jnp.dtype(dtype).itemsize >= table.dtype.itemsize or not partitioned():
        return take(table, ids, dtype)
    return _rows((table.shape, table.dtype, jnp.dtype(dtype)), table, ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(kind, table, ids):
    return take(table, ids, kind[2])


def _backward(kind, ids, g):
    shape, dtype, _ = kind
    wide = jax.lax.optimization_barrier(_as_the_table_lies(g)).astype(dtype)           # without the barrier the compiler widens before it sends
    return jnp.zeros(shape, dtype).at[ids].add(wide), None


_rows.defvjp(lambda kind, table, ids: (_rows(kind, table, ids), ids), _backward)


def _as_the_table_lies(g):
    """g [B, T, D] with D divided as a table's width is, B over what is left."""
    mesh, rules = jax.sharding.get_abstract_mesh(), dict(reversed(RULES))
    free = {axis: size for axis, size in mesh.shape.items() if size > 1 and axis not in mesh.manual_axes}
    across = tuple(a for a in mesh_axes(rules["embed"]) if a in free)
    rows = tuple(a for a in mesh_axes(rules["batch"]) if a in free and a not in across)
    if g.shape[-1] % math.prod(free[a] for a in across) or g.shape[0] % math.prod(free[a] for a in rows):
        return g
    return jax.lax.with_sharding_constraint(g, PartitionSpec(rows or None, PartitionSpec.UNCONSTRAINED, across or None))
