"""The train state: only what learns. Frozen weights, a reference, a teacher are passed beside it and never donated."""
from __future__ import annotations

import dataclasses as dc
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from jax.tree_util import register_dataclass

HOST = "pinned_host"


@register_dataclass
@dc.dataclass(frozen=True)
class State:
    """step: int32 scalar, steps done. params: what learns. opt_state: the optimiser's. key: the run's random key; step n uses its n-th fold."""
    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array


def init(params: Any, optimizer: optax.GradientTransformation, key: jax.Array, *, offload: bool = False) -> State:
    """A state at step 0. It takes `params` over: the first step donates their buffers. On a mesh the optimiser's arrays lie as the parameters they belong to.

    offload: the optimiser's arrays wait in the host's memory; each step brings them to the device and back.
    """
    like = abstract(params, optimizer, key, offload=offload)
    places = jax.tree.map(lambda x: x.sharding, like) if mesh_of(params) is not None else None
    opt_state = jax.jit(optimizer.init, out_shardings=jax.tree.map(lambda x: x.sharding, like.opt_state) if places is not None or offload else None)(params)
    step = jnp.zeros((), jnp.int32)
    if places is not None:             # compiled: device_put does not reach the devices of other processes
        step, key = jax.jit(lambda *x: x, out_shardings=(places.step, places.key))(step, key)
    return State(step, params, opt_state, key)


def abstract(params: Any, optimizer: optax.GradientTransformation, key: jax.Array, *, offload: bool = False) -> State:
    """The state `init` would make, as jax.ShapeDtypeStruct with shardings; params may be abstract too."""
    mesh = mesh_of(params)
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    shapes = jax.eval_shape(optimizer.init, params)
    if mesh is not None:
        near = optax.tree_utils.tree_map_params(optimizer, lambda _, p: p.sharding, shapes, params, transform_non_params=lambda _: whole)
        shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s if fits(s, x.shape) else whole), shapes, near)
    if offload:
        here = SingleDeviceSharding(jax.devices()[0])
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=(x.sharding or here).with_memory_kind(HOST if x.ndim else "device")), shapes)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), params)
    return State(jax.ShapeDtypeStruct((), jnp.int32, sharding=whole), like, shapes, jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole))      # type: ignore[arg-type]


def waiting(tree: Any) -> Any | None:
    """The places of a tree's arrays if some wait in the host's memory, else None."""
    places = jax.tree.map(lambda x: getattr(x, "sharding", None), tree)
    return places if any(s is not None and s.memory_kind == HOST for s in jax.tree.leaves(places)) else None


def fetched(tree: Any, places: Any) -> Any:
    """Within a program: the arrays on the device."""
    return jax.tree.map(lambda x, s: jax.device_put(x, s.with_memory_kind("device")) if s.memory_kind == HOST else x, tree, places)


def fits(sharding: NamedSharding, shape: tuple[int, ...]) -> bool:
    """Whether a parameter's sharding divides an array made from it (a factored moment has fewer dimensions, a placeholder is [1])."""
    if len(sharding.spec) > len(shape):
        return False
    try:
        sharding.shard_shape(shape)
    except ValueError:
        return False
    return True


def mesh_of(tree: Any) -> Any | None:
    """The mesh of several devices that a tree's arrays lie on, or None."""
    for x in jax.tree.leaves(tree):
        sharding = getattr(x, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            return sharding.mesh
    return None
