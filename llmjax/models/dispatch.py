"""Tokens to their experts and back: sorted by expert, one grouped product a matrix, summed with their gates. On a mesh every device sorts its own tokens; where experts lie on several
devices, these bring their tokens together and each works on its own experts.

Legend: M tokens, k experts per token, D embed, E experts, e of them on this device, R rows of a buffer.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llmjax.core import Layout, free_axes, partitioned

Work = Callable[[Any, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def through_experts(work: Work, weights: Any, axes: Any, x: jax.Array, gates: jax.Array, chosen: jax.Array, layout: Layout, *, scale_inputs: bool = False) -> jax.Array:
    """-> [B, T, D], each token's experts' answers summed with its gates; none is dropped.

    work(weights of e experts, rows [R, D] sorted by expert, sizes [e], which expert's each row is [R], whether biases count here) -> [R, D].
    weights: a tree of arrays [E, …], None for what there is not; axes: their logical axes, as in labels. x [B, T, D], gates [B, T, k] float32, chosen [B, T, k].
    scale_inputs: gates multiply the rows before the experts, not after.
    """
    if not partitioned():
        return routed(work, weights, x, gates, chosen, scale_inputs, first=0, alone=jnp.bool_(True))
    mesh, experts, _ = free_axes("expert", layout.rules)
    _, hidden, _ = free_axes("mlp", layout.rules)
    _, rows, into = free_axes("batch", layout.rules)
    _, cuts, pieces = free_axes("length", layout.rules)
    rows, cuts = () if x.shape[0] % into else rows, () if x.shape[1] % pieces else cuts
    together = tuple(a for a in experts if a in rows)                  # whose devices hold other tokens; over the rest of `experts` tokens are repeated
    placed = {"expert": experts, "mlp": hidden}
    specs = jax.tree.map(lambda w, names: PartitionSpec(*(placed.get(name) or None for name in names.split())), weights, axes)
    tokens = PartitionSpec(rows or None, cuts or None)

    def local(weights, x, gates, chosen):
        whole = lambda y: jax.lax.all_gather(y, together, axis=0, tiled=True) if together else y
        e = jax.tree.leaves(weights)[0].shape[0]
        first = jax.lax.axis_index(experts) * e if experts else 0
        alone = jax.lax.axis_index(hidden) == 0 if hidden else jnp.bool_(True)
        y = routed(work, weights, whole(x), whole(gates), whole(chosen), scale_inputs, first=first, alone=alone, partial=bool(experts)).astype(jnp.float32)
        over = tuple(a for a in (*hidden, *experts) if a not in together)
        y = jax.lax.psum(y, over) if over else y
        y = jax.lax.psum_scatter(y, together, scatter_dimension=0, tiled=True) if together else y
        return y.astype(x.dtype)
    free = {a for a in mesh.axis_names if a not in mesh.manual_axes}
    return jax.shard_map(local, in_specs=(specs, tokens, tokens, tokens), out_specs=tokens, axis_names=free, check_vma=False)(weights, x, gates, chosen)


def routed(work: Work, weights: Any, x: jax.Array, gates: jax.Array, chosen: jax.Array, scale_inputs: bool, *, first: Any, alone: jax.Array, partial: bool = False) -> jax.Array:
    """The sum over those of each token's choices that are experts `first` and the next ones (`partial`: there are others). -> [B, T, D]."""
    (B, T, D), k, e = x.shape, chosen.shape[-1], jax.tree.leaves(weights)[0].shape[0]
    mine = chosen.reshape(-1) - first
    if partial:
        mine = jnp.where((mine >= 0) & (mine < e), mine, e)                                   # the others' come last
    order = jnp.argsort(mine)
    place = jnp.argsort(order)                                                                # [M k]: where a choice stands among the rows
    order = order[:B * T * min(k, e)]                                                         # [R]: no token chooses an expert twice
    rows = picked(x.reshape(-1, D), order, place)
    if scale_inputs:
        rows, gates = rows * gates.reshape(-1)[order, None].astype(rows.dtype), jnp.ones_like(gates)
    y = work(weights, rows, jnp.bincount(mine, length=e), jnp.minimum(mine[order], e - 1), alone)
    return combined(y, jnp.where(mine.reshape(-1, k) < e, gates.reshape(-1, k), 0.0), order, place).reshape(B, T, D).astype(x.dtype)


@jax.custom_vjp
def picked(x: jax.Array, order: jax.Array, place: jax.Array) -> jax.Array:
    """The rows of the choices `order` [R] among all M k: x [M, D] -> [R, D]. Its gradient is a lookup and a sum (that of a lookup would be a scattered one)."""
    return x[order // (place.shape[0] // x.shape[0])]


def _picked_backward(kept, g):
    place, like = kept
    k = place.shape[0] // like.shape[0]
    return looked_up(g, place).reshape(-1, k, g.shape[1]).astype(jnp.float32).sum(1).astype(g.dtype), None, None


picked.defvjp(lambda x, order, place: (picked(x, order, place), (place, x[:, :0])), _picked_backward)


def looked_up(rows: jax.Array, place: jax.Array) -> jax.Array:
    """rows[place], zeros where there is no such row."""
    return rows.at[place].get(mode="fill", fill_value=0)


@jax.custom_vjp
def combined(y: jax.Array, gates: jax.Array, order: jax.Array, place: jax.Array) -> jax.Array:
    """Rows y [R, D] back to their tokens, summed with gates [M, k] (0 for a choice that is not among them) -> float32 [M, D]."""
    return jnp.einsum("mkd,mk->md", looked_up(y, place).reshape(*gates.shape, -1).astype(jnp.float32), gates)


def _combined_backward(kept, g):
    y, gates, order, place = kept
    dy = g[order // gates.shape[1]] * gates.reshape(-1)[order, None]
    return dy.astype(y.dtype), jnp.einsum("mkd,md->mk", looked_up(y, place).reshape(*gates.shape, -1).astype(jnp.float32), g), None, None


combined.defvjp(lambda y, gates, order, place: (combined(y, gates, order, place), (y, gates, order, place)), _combined_backward)
