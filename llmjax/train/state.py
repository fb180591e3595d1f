"""The train state: only what learns. Frozen weights, a reference, a teacher are passed beside it and never donated."""
from __future__ import annotations

import dataclasses as dc
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import register_dataclass


@register_dataclass
@dc.dataclass(frozen=True)
class State:
    """step: int32 scalar, steps done. params: what learns. opt_state: the optimiser's. key: the run's random key; step n uses its n-th fold."""
    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array


def init(params: Any, optimizer: optax.GradientTransformation, key: jax.Array) -> State:
    """A state at step 0. It takes `params` over: the first step donates their buffers. On a mesh the optimiser's arrays lie as the parameters they belong to."""
    mesh = mesh_of(params)
    if mesh is None:
        return State(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params), key)
    whole = NamedSharding(mesh, PartitionSpec())
    shape = jax.eval_shape(optimizer.init, params)
    like = optax.tree_utils.tree_map_params(optimizer, lambda _, p: p.sharding, shape, params, transform_non_params=lambda _: whole)
    like = jax.tree.map(lambda s, x: s if len(x.shape) >= len(s.spec) else whole, like, shape)      # factored moments have fewer dimensions
    opt_state = jax.jit(optimizer.init, out_shardings=like)(params)
    return State(jax.device_put(jnp.zeros((), jnp.int32), whole), params, opt_state, jax.device_put(key, whole))


def mesh_of(tree: Any) -> Any | None:
    """The mesh of several devices that a tree's arrays lie on, or None."""
    for x in jax.tree.leaves(tree):
        sharding = getattr(x, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            return sharding.mesh
    return None
