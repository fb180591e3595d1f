"""The only file that knows Flax: what a module is, how it asks for a weight, how layers are scanned and rematerialised.

A module is a frozen dataclass with `__call__`; parameters live outside, in nested dicts. Replacing Linen means replacing this file.
"""
from __future__ import annotations

import dataclasses as dc
import functools
import math
import zlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from llmjax.core.errors import CheckpointError
from llmjax.core.labels import Label, parse
from llmjax.core.tree import path_name
from llmjax.kernels.attention.ring import KEPT

Module = nn.Module
compact = nn.compact


@dc.dataclass(frozen=True)
class Start:
    """What a parameter is before training: normal with `std`, or `constant` where std is None."""
    std: float | None
    constant: float = 0.0

    def draw(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        if self.std is None:
            return jnp.full(shape, self.constant, dtype)
        count = math.prod(shape)
        if isinstance(key, jax.core.Tracer) or count > 1 << 22:
            return (self.std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
        return (self.std * normals(key, max(4096, 1 << (count - 1).bit_length()))[:count]).reshape(shape).astype(dtype)


@dc.dataclass(frozen=True)
class LogUniform:
    """The logarithm of a number drawn evenly between `low` and `high`: how the decays of recurrent layers start."""
    low: float
    high: float

    def draw(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jnp.log(jax.random.uniform(key, shape, jnp.float32, self.low, self.high)).astype(dtype)


@functools.partial(jax.jit, static_argnums=1)
def normals(key: jax.Array, count: int) -> jax.Array:
    """A power of two of numbers at a time: a random program takes long to compile, and the n-th number does not depend on how many there are."""
    return jax.random.normal(key, (count,), jnp.float32)


class Labeled(struct.PyTreeNode, nn.meta.AxisMetadata):
    """A freshly made parameter together with its label; `unbox` leaves the array."""
    value: Any
    label: Label = struct.field(pytree_node=False)
    start: Start | LogUniform = struct.field(pytree_node=False)

    def unbox(self):
        return self.value

    def replace_boxed(self, value):
        return self.replace(value=value)

    def add_axis(self, index, params):
        return self.replace(label=self.label.stacked())

    def remove_axis(self, index, params):
        return self.replace(label=Label(self.label.batch[1:], self.label.inputs, self.label.outputs))


def weight(module: Module, name: str, label: str, shape: tuple[int, ...], start: Start | LogUniform | None = None) -> Any:
    """The parameter `name` of a module: what the caller passed (an array or an array leaf), or a new one when the model is being initialised.

    label: see core/labels.py. start: normal with variance 1 / fan-in unless given. Raises CheckpointError when the shape is not the model's.
    """
    if module.has_variable("params", name):
        value = nn.meta.unbox(module.get_variable("params", name))
        if tuple(value.shape) != tuple(shape):
            raise CheckpointError(f"parameter {'/'.join((*module.path, name))} has shape {tuple(value.shape)}, the model wants {tuple(shape)}")
        return value
    parsed = parse(label)
    begin = start or Start(math.prod(shape[i] for i in parsed.dims("inputs")) ** -0.5)
    return module.param(name, lambda key: Labeled(begin.draw(key, shape, module.compute.param_dtype), parsed, begin))


def vector(module: Module, name: str, label: str, shape: tuple[int, ...], value: float = 0.0) -> jax.Array:
    """A bias or a scale: constant at first."""
    return weight(module, name, label, shape, Start(None, value))


def along(x: jax.Array, like: jax.Array) -> jax.Array:
    """A vector or a small array with leading dimensions of size 1, so that it broadcasts against the last dimensions of `like`, in float32 if `like` is, else in its dtype."""
    return x.reshape((1,) * (like.ndim - x.ndim) + x.shape).astype(like.dtype)


def scan(cell: type[Module], length: int) -> Any:
    """The cell applied `length` times with parameters (and what it sows into `aux`) stacked on a new first axis. cell(x, per-layer cache, context) -> (x, cache)."""
    return nn.scan(cell, variable_axes={"params": 0, "aux": 0}, split_rngs={"params": True}, length=length, in_axes=(0, nn.broadcast), metadata_params={})


LAYER_INPUT = "layer_input"            # how `checkpoint_name` calls what goes into a layer
POLICIES = {"offload": jax.checkpoint_policies.save_and_offload_only_these_names(names_which_can_be_saved=list(KEPT), names_which_can_be_offloaded=[LAYER_INPUT],
                                                                                 offload_src="device", offload_dst="pinned_host"),
            "full": jax.checkpoint_policies.save_only_these_names(*KEPT),
            "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


def rematerialised(cell: type[Module], remat: str | None, scanned: bool) -> Any:
    """The cell with its activations recomputed in the backward pass as `Compute.remat` says."""
    if remat is None:
        return cell
    return nn.remat(cell, prevent_cse=not scanned, policy=POLICIES[remat])


@functools.lru_cache(maxsize=64)
def boxed_params(model: Module) -> Any:
    """The tree of Labeled(ShapeDtypeStruct) a model is initialised to; nothing is computed."""
    return jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct((1, 8), jnp.int32))["params"]


def is_labeled(x: Any) -> bool:
    return isinstance(x, Labeled)


def abstract_params(model: Module) -> Any:
    """The parameter tree as jax.ShapeDtypeStruct."""
    return jax.tree.map(lambda b: b.value, boxed_params(model), is_leaf=is_labeled)


def labels(model: Module) -> Any:
    """The parameter tree's labels (core.labels.Label in each weight's place)."""
    return jax.tree.map(lambda b: b.label, boxed_params(model), is_leaf=is_labeled)


def stacked_labels(module: Module, *args: Any) -> Any:
    """The labels of the parameters that `module` makes when it is called with `args`, of many of it stacked."""
    boxed = jax.eval_shape(lambda: module.init(jax.random.key(0), *args))["params"]
    return jax.tree.map(lambda b: b.label.stacked(), boxed, is_leaf=is_labeled)


def init_params(model: Module, key: jax.Array, shardings: Any = None) -> Any:
    """Fresh parameters as nested dicts of arrays, each drawn straight in its sharded place when `shardings` (a tree of NamedSharding) is given. A parameter's numbers depend on
    its name and the key alone, not on the mesh."""
    def one(path, box, sharding=None):
        x, mine = box.value, jax.random.fold_in(key, zlib.crc32(path_name(path).encode()))
        return jax.jit(lambda k: box.start.draw(k, x.shape, x.dtype), out_shardings=sharding)(mine) if sharding is not None else box.start.draw(mine, x.shape, x.dtype)
    return jax.tree_util.tree_map_with_path(one, boxed_params(model), *([] if shardings is None else [shardings]), is_leaf=is_labeled)


def jit_by_model(**options: Any) -> Callable[[Callable], Callable]:
    """jax.jit for a function whose first argument is a module. The programs of the last 16 modules are kept: each program holds some hundred memory maps, of which a Linux process may
    have 65,530, and jax itself would keep all of them for good. options: jax.jit's."""
    def wrap(function: Callable) -> Callable:
        @functools.lru_cache(maxsize=16)
        def program(model: Module) -> Callable:
            return jax.jit(functools.partial(function, model), **options)

        @functools.wraps(function)
        def call(model: Module, *args: Any, **kwargs: Any) -> Any:
            return program(model)(*args, **kwargs)
        return call
    return wrap


@jit_by_model(static_argnums=(0, 1))
def compiled(module: Module, method: Any, mutable: Any, variables: Any, args: tuple, kwargs: dict) -> Any:
    return nn.Module.apply(module, variables, *args, method=method, mutable=mutable, **kwargs)


class Model(Module):
    """A whole model: `apply` outside of any transformation runs compiled, so that trying things in a notebook costs what the compiled program costs."""

    def apply(self, variables: Any, *args: Any, method: Any = None, mutable: Any = False, **kwargs: Any) -> Any:
        """Flax's `apply`. See the model's `__call__`."""
        mutable = tuple(mutable) if isinstance(mutable, list) else mutable
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((variables, args, kwargs))):
            return nn.Module.apply(self, variables, *args, method=method, mutable=mutable, **kwargs)
        return compiled(self, method, mutable, variables, args, kwargs)
