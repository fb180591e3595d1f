"""The only file that knows Flax: what a module is, how it asks for a weight, how layers are scanned and rematerialised.

A module is a frozen dataclass with `__call__`; parameters live outside, in nested dicts. Replacing Linen means replacing this file.
"""
from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from llmjax.core.errors import CheckpointError
from llmjax.core.labels import Label, parse

Module = nn.Module
compact = nn.compact
initializers = nn.initializers


class Labeled(struct.PyTreeNode, nn.meta.AxisMetadata):
    """A freshly made parameter together with its label; `unbox` leaves the array."""
    value: Any
    label: Label = struct.field(pytree_node=False)

    def unbox(self):
        return self.value

    def replace_boxed(self, value):
        return self.replace(value=value)

    def add_axis(self, index, params):
        return self.replace(label=self.label.stacked())

    def remove_axis(self, index, params):
        return self.replace(label=Label(self.label.batch[1:], self.label.inputs, self.label.outputs))


def weight(module: Module, name: str, label: str, shape: tuple[int, ...], init=None) -> Any:
    """The parameter `name` of a module: what the caller passed (an array or an array leaf), or a new one when the model is being initialised.

    label: see core/labels.py. init: fan-in scaled normal for matrices unless given. Raises CheckpointError when the shape is not the model's.
    """
    if module.has_variable("params", name):
        value = module.get_variable("params", name)
        if tuple(value.shape) != tuple(shape):
            raise CheckpointError(f"parameter {'/'.join((*module.path, name))} has shape {tuple(value.shape)}, the model wants {tuple(shape)}")
        return value
    parsed = parse(label)
    if init is None:
        init = initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=parsed.dims("inputs"), out_axis=parsed.dims("outputs"), batch_axis=parsed.dims("batch"))
    return module.param(name, lambda key: Labeled(init(key, shape, module.compute.param_dtype), parsed))


def vector(module: Module, name: str, label: str, shape: tuple[int, ...], value: float = 0.0) -> jax.Array:
    """A bias or a scale: constant at first."""
    return weight(module, name, label, shape, initializers.constant(value))


def scan(cell: type[Module], length: int) -> Any:
    """The cell applied `length` times with parameters (and what it sows into `aux`) stacked on a new first axis. cell(x, per-layer cache, context) -> (x, cache)."""
    return nn.scan(cell, variable_axes={"params": 0, "aux": 0}, split_rngs={"params": True}, length=length, in_axes=(0, nn.broadcast), metadata_params={})


POLICIES = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


def rematerialised(cell: type[Module], remat: str | None, scanned: bool) -> Any:
    """The cell with its activations recomputed in the backward pass as `Compute.remat` says."""
    if remat is None:
        return cell
    return nn.remat(cell, prevent_cse=not scanned, policy=POLICIES[remat])


@functools.lru_cache(maxsize=64)
def boxed_params(model: Module) -> Any:
    """The tree of Labeled(ShapeDtypeStruct) a model is initialised to; nothing is computed."""
    tokens = jnp.zeros((1, 8), jnp.int32)
    return jax.eval_shape(lambda key: model.init(key, tokens), jax.random.key(0))["params"]


def is_labeled(x: Any) -> bool:
    return isinstance(x, Labeled)


def abstract_params(model: Module) -> Any:
    """The parameter tree as jax.ShapeDtypeStruct."""
    return jax.tree.map(lambda b: b.value, boxed_params(model), is_leaf=is_labeled)


def labels(model: Module) -> Any:
    """The parameter tree's labels (core.labels.Label in each weight's place)."""
    return jax.tree.map(lambda b: b.label, boxed_params(model), is_leaf=is_labeled)


def init_params(model: Module, key: jax.Array, shardings: Any = None) -> Any:
    """Fresh parameters as nested dicts of arrays, made in one compiled program, straight in their sharded place when `shardings` (a tree of NamedSharding) is given."""
    def make(key):
        return nn.unbox(model.init(key, jnp.zeros((1, 8), jnp.int32))["params"])
    return jax.jit(make, out_shardings=shardings)(key)
