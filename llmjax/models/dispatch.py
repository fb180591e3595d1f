"""Tokens to their experts and back: sorted by expert, one grouped product a matrix, summed with their gates. On a mesh every device sorts its own tokens. Where experts lie on several
devices, these either bring all their tokens together and each works on its own experts (`gather`), or send each token where its experts are and get the answers back (`exchange`).

Legend: M tokens, k experts per token, D embed, E experts, e of them on this device, R rows of a buffer.
"""
from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llmjax.core import Layout, ShardingError, free_axes, partitioned, platform

Work = Callable[[Any, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def through_experts(work: Work, weights: Any, axes: Any, x: jax.Array, gates: jax.Array, chosen: jax.Array, layout: Layout, *, scale_inputs: bool = False,
                    form: str = "auto", capacity: float | None = None) -> tuple[jax.Array, jax.Array | None]:
    """-> ([B, T, D], each token's experts' answers summed with its gates; how many of its choices were dropped [B, T] float32, None where none can be).

    work(weights of e experts, rows [R, D] sorted by expert, sizes [e], which expert's each row is [R], whether biases count here) -> [R, D].
    weights: a tree of arrays [E, …]; axes: their logical axes, as in labels. x [B, T, D], gates [B, T, k] float32, chosen [B, T, k].
    scale_inputs: gates multiply the rows before the experts, not after. form: how tokens reach experts on other devices, `gather` or `exchange`; auto: exchange on a TPU.
    capacity: each device takes so many times an expert's even share of its own tokens, those that come first; what is over is dropped.
    """
    mesh, experts, devices = free_axes("expert", layout.rules)
    _, hidden, _ = free_axes("mlp", layout.rules)
    _, rows, into = free_axes("batch", layout.rules)
    _, cuts, pieces = free_axes("length", layout.rules)
    rows, cuts = () if x.shape[0] % into else rows, () if x.shape[1] % pieces else cuts
    together = tuple(a for a in experts if a in rows)                  # whose devices hold other tokens; over the rest of `experts` tokens are repeated
    apart = bool(together) and together == experts and (capacity is not None or form == "exchange" or (form == "auto" and platform() == "tpu"))

    def local(weights, x, gates, chosen):
        (B, T, D), k = x.shape, chosen.shape[-1]
        e = jax.tree.leaves(weights)[0].shape[0]
        alone = jax.lax.axis_index(hidden) == 0 if hidden else jnp.bool_(True)
        near = together if not apart else ()                           # over which every token is brought to every device
        whole = lambda y: jax.lax.all_gather(y, near, axis=0, tiled=True) if near else y
        tokens, scale, which = whole(x.reshape(-1, D)), whole(gates.reshape(-1, k)), whole(chosen.reshape(-1, k))
        if not apart and experts:
            which = which - jax.lax.axis_index(experts) * e
            which = jnp.where((which >= 0) & (which < e), which, e)    # the others' come last
        kept = sorted_choices(which, e * devices if apart else e) if capacity is None else first_choices(which, e * devices if apart else e, capacity)
        most = B * T * min(k, e) if capacity is None else len(kept.order) // devices
        taken = picked(tokens, kept.order, kept.place)
        if scale_inputs:
            taken, scale = taken * looked_up(scale.reshape(-1), kept.order)[:, None].astype(taken.dtype), jnp.ones_like(scale)
        y = at_home(work, weights, taken, kept, together, most, alone) if apart else work(weights, taken, kept.sizes, jnp.minimum(kept.expert, e - 1), alone)
        y = combined(y, scale if apart else jnp.where(which < e, scale, 0.0), kept.order, kept.place)
        over = tuple(a for a in (*hidden, *experts) if a not in together)
        y = jax.lax.psum(y, over) if over else y
        y = jax.lax.psum_scatter(y, near, scatter_dimension=0, tiled=True) if near else y
        dropped = None if capacity is None else (kept.place.reshape(B, T, k) >= len(kept.order)).sum(-1).astype(jnp.float32)
        return y.reshape(B, T, D).astype(x.dtype), dropped
    if not partitioned():
        return local(weights, x, gates, chosen)
    if capacity is not None and experts and not apart:
        raise ShardingError(f"compute.capacity={capacity}: {x.shape[0]} rows do not divide over the devices that share experts; leave it out, or change the batch")
    placed = {"expert": experts, "mlp": hidden}
    specs = jax.tree.map(lambda w, names: PartitionSpec(*(placed.get(name) or None for name in names.split())), weights, axes)
    spread = PartitionSpec(rows or None, cuts or None)
    free = {a for a in mesh.axis_names if a not in mesh.manual_axes}
    return jax.shard_map(local, in_specs=(specs, spread, spread, spread), out_specs=(spread, None if capacity is None else spread), axis_names=free, check_vma=False)(weights, x, gates, chosen)


class Kept(NamedTuple):
    """Rows made of choices: order [R], the choice (token · k + which of its k) each row is made of, M k where of none; place [M k], the row of each choice, R or more where it has none;
    expert [R], whose each row is; sizes [e], how many rows each expert has."""
    order: jax.Array
    place: jax.Array
    expert: jax.Array
    sizes: jax.Array


def sorted_choices(chosen: jax.Array, e: int) -> Kept:
    """Every choice [M, k] of an expert 0 … e − 1 (e: of none here), sorted by expert. No token chooses an expert twice: there are at most M min(k, e)."""
    flat, (M, k) = chosen.reshape(-1), chosen.shape
    order = jnp.argsort(flat)
    place = jnp.argsort(order)
    order = order[:M * min(k, e)]
    return Kept(order, place, flat[order], jnp.bincount(flat, length=e))


def first_choices(chosen: jax.Array, e: int, capacity: float) -> Kept:
    """The first ceil(capacity · M k / e) choices of each expert, as many rows for every expert (GShard, arXiv:2006.16668, algorithm 1, without its second choices' chance)."""
    flat, (M, k) = chosen.reshape(-1), chosen.shape
    room = math.ceil(capacity * M * k / e)
    order, sizes = jnp.argsort(flat), jnp.bincount(flat, length=e)
    rank = jnp.argsort(order) - (jnp.cumsum(sizes) - sizes)[jnp.minimum(flat, e - 1)]
    row, seat = jnp.divmod(jnp.arange(e * room), room)
    first = (jnp.cumsum(sizes) - sizes)[row] + seat
    return Kept(jnp.where(seat < sizes[row], looked_up(order, first), M * k), jnp.where((rank < room) & (flat < e), flat * room + rank, e * room), row, jnp.full((e,), room, sizes.dtype))


def at_home(work: Work, weights: Any, rows: jax.Array, kept: Kept, axis: tuple[str, ...], most: int, alone: jax.Array) -> jax.Array:
    """Rows [R, D], sorted by expert, sent to the devices of their experts (`most`: how many one device sends another at most), worked on there and sent back."""
    n, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    counts = jax.lax.all_gather(kept.sizes, axis).reshape(n, n, -1)                            # [from, to, e]
    e, sent, mine = counts.shape[-1], counts.sum(-1), counts[:, me]                            # sent [from, to], mine [from, e]
    got = send(axis, n * most, rows, sent)
    expert = jnp.searchsorted(jnp.cumsum(mine.reshape(-1)), jnp.arange(n * most), side="right")      # rows come by device, then by expert
    expert = jnp.where(expert < n * e, expert % e, e)
    order = jnp.argsort(expert)
    back = jnp.argsort(order)
    y = work(weights, picked(got, order, back), mine.sum(0), jnp.minimum(expert[order], e - 1), alone)
    return send(axis, len(rows), picked(y, back, order), sent.T)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def send(axis: tuple[str, ...], size: int, rows: jax.Array, sent: jax.Array) -> jax.Array:
    """rows [R, D], those for device 0 first, then those for device 1, … -> the rows this device gets [size, D], by sender, then zeros. sent [from, to]: how many, the same on all."""
    me, before = jax.lax.axis_index(axis), lambda x, axis: jnp.cumsum(x, axis) - x
    if platform() == "tpu":
        out = jnp.zeros((size, rows.shape[1]), rows.dtype)
        return jax.lax.ragged_all_to_all(rows, out, before(sent[me], 0), sent[me], before(sent, 0)[me], sent[:, me], axis_name=axis)
    everyone = jax.lax.all_gather(rows, axis)                                                  # elsewhere there is no such collective to rely on: all rows, then one's own
    start = before(sent[:, me], 0)
    index = jnp.arange(size)
    sender = jnp.clip(jnp.searchsorted(start, index, side="right") - 1, 0, len(start) - 1)
    found = everyone.at[sender, before(sent, 1)[sender, me] + index - start[sender]].get(mode="fill", fill_value=0)
    return jnp.where((index < sent[:, me].sum())[:, None], found, 0)


send.defvjp(lambda axis, size, rows, sent: (send(axis, size, rows, sent), (rows[:, :0], sent)), lambda axis, size, kept, g: (send(axis, len(kept[0]), g, kept[1].T), None))


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
    dy = g[order // gates.shape[1]] * looked_up(gates.reshape(-1), order)[:, None]
    return dy.astype(y.dtype), jnp.einsum("mkd,md->mk", looked_up(y, place).reshape(*gates.shape, -1).astype(jnp.float32), g), None, None


combined.defvjp(lambda y, gates, order, place: (combined(y, gates, order, place), (y, gates, order, place)), _combined_backward)
