"""The decode step of a model on TPUs that are not there: its weights in the form decoding wants and its cache, as shapes laid over the chips of a topology, tensor parallel.

Used by benchmarks/tpu_decode.py; `compile.ENVIRONMENT` has to be set before libtpu is asked for anything.
"""
from __future__ import annotations

import dataclasses as dc
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from llmjax import decode, models, quantization
from llmjax.core import Compute, ModelConfig, make_mesh, unrolled
from llmjax.core.labels import Label
from llmjax.core.leaves import Int8
from llmjax.core.mesh import RULES, partition
from llmjax.core.tree import map_named
from llmjax.plan.chips import Topology
from llmjax.plan.compile import devices


@dc.dataclass(frozen=True)
class Spread:
    """A model and its weights, shapes with shardings, on a mesh of devices that need not exist."""
    mesh: Mesh
    model: models.Decoder
    params: Any


def spread(config: ModelConfig, where: Topology, *, dtype: Any = "bfloat16", quantize: str | None = None) -> Spread:
    """What `load(mesh=make_mesh(tensor=…), quantize=…)` and `decode.prepare` make of a model on all chips of `where`: every layer apart, matrices over the axis `tensor`. Raises ShardingError
    where heads or widths do not divide."""
    mesh = make_mesh(data=1, tensor=where.devices, devices=devices(where))
    model = models.Decoder(unrolled(config), Compute(dtype=dtype, param_dtype=dtype))
    labels, params = models.labels(model), models.abstract_params(model)
    if quantize is not None:
        params = jax.eval_shape(lambda p: quantization.quantize(labels, p, quantize), params)

    def laid(name: str, x: Any, axes: tuple[str, ...]) -> Any:
        known = [axis if size > 1 else None for axis, size in zip(axes, x.shape)]              # a scale has size 1 where it stands for a whole column
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, partition(known, x.shape, mesh, RULES, name)))

    def one(name: str, label: Label, w: Any) -> Any:
        return Int8(laid(name, w.q, label.axes), laid(name, w.scale, label.axes)) if isinstance(w, Int8) else laid(name, w, label.axes)
    return Spread(mesh, model, map_named(one, labels, params))


def laid_cache(cache: Any, mesh: Mesh) -> Any:
    """A cache (or what holds one) as shapes where `decode.cache_shardings` lays it."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), cache, decode.cache_shardings(cache, mesh))


def lower(made: Spread, rows: int, length: int, kind: str = "contiguous") -> Any:
    """`decode.decode_step`, a token for each of `rows` rows over a used cache of `length` positions of this kind (decode.make_cache), lowered (jax.stages.Lowered). The cache is given away."""
    cache = jax.eval_shape(lambda: decode.make_cache(made.model, rows, length, kind))
    cache = laid_cache(dc.replace(cache, empty=False), made.mesh)
    row = jax.ShapeDtypeStruct((rows,), jnp.int32)
    with jax.set_mesh(made.mesh):
        step = jax.jit(functools.partial(decode.decode_step, made.model), donate_argnums=4)
        return step.lower(made.params, row, row, jax.ShapeDtypeStruct((rows,), jnp.bool_), cache)
