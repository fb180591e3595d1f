"""Bytes a device holds at a train step's worst moment, by kind, from labels, rules and shapes alone.

What lies still (weights, optimiser, gradients, batch) is read off the shardings. What the backward pass keeps is read off the gradient's own program: the arrays that `jax.vjp` of one
device's share of the model hands from the forward to the backward pass, whatever the remat policy. What moves is the largest of the moments there are: the loss over one chunk of logits,
one layer's backward pass, one tick's of a pipeline. Compilers pad, fuse and overlap: `llmjax plan --compile` says how far off this is.
"""
from __future__ import annotations

import dataclasses as dc
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from llmjax import models
from llmjax.core import Compute, MixtureOfExperts, ModelConfig
from llmjax.core.mesh import MESH_AXES, ticks
from llmjax.core.tree import flatten
from llmjax.kernels.cross_entropy import CHUNK
from llmjax.plan.figures import cache_bytes
from llmjax.plan.job import Job
from llmjax.train.state import HOST

KINDS = ("weights", "optimizer", "gradients", "batch", "activations", "stage", "layer", "logits", "tick")


def held(tree: Any, host: bool = False) -> int:
    """Bytes one device holds of a tree of shapes with shardings; host: those that wait in the host's memory instead."""
    total = 0
    for x in jax.tree.leaves(tree):
        if (getattr(getattr(x, "sharding", None), "memory_kind", None) == HOST) is not host:
            continue
        shape = x.sharding.shard_shape(x.shape) if getattr(x, "sharding", None) is not None else x.shape
        total += math.prod(shape) * (x.dtype.itemsize if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else 8)
    return total


def local(config: ModelConfig, job: Job) -> ModelConfig:
    """One device's share of the model as a model: its heads, its part of the hidden widths."""
    heads, kv, hidden = job.over("heads"), job.over("kv_heads"), job.over("mlp")

    def mixer(m):
        kept = {f.name for f in dc.fields(m)}
        return dc.replace(m, **{name: max(1, getattr(m, name) // by) for name, by in (("heads", heads), ("kv_heads", kv), ("key_heads", heads)) if name in kept})

    def layer(x):
        ffn = dc.replace(x.ffn, hidden=max(1, x.ffn.hidden // hidden), **({"shared": max(1, x.ffn.shared // hidden)} if isinstance(x.ffn, MixtureOfExperts) and x.ffn.shared else {}))
        return dc.replace(x, mixer=mixer(x.mixer), ffn=ffn)
    prefix, cycle, suffix = (tuple(layer(x) for x in part) for part in (config.prefix, config.cycle, config.suffix))
    return dc.replace(config, prefix=prefix, cycle=cycle, suffix=suffix)


def one_device(platform: str) -> AbstractMesh:
    """A mesh of one device of a platform, so that a program is traced as that platform runs it."""
    return AbstractMesh((1,) * len(MESH_AXES), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), abstract_device=AbstractDevice(platform, 1, platform))


@functools.lru_cache(maxsize=256)
def residuals(config: ModelConfig, compute: Compute, rows: int, length: int, platform: str, parts: int = 1) -> tuple[int, int, int]:
    """What the backward pass of [rows, length] tokens keeps of everything before the head. -> (bytes of activations, of weights in another dtype than they are stored in, and of activations
    in the host's memory). parts: over how many devices the residual stream is divided once more, where it is all that is kept."""
    model = models.Decoder(config, compute)
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def backward(params, tokens, segments):
        apply = lambda params: model.apply({"params": params}, tokens, None, segments, method="features")[0]
        return jax.tree.leaves(jax.vjp(apply, params)[1])
    with jax.sharding.use_abstract_mesh(one_device(platform)):
        closed = jax.make_jaxpr(backward)(models.abstract_params(model), tokens, tokens)
    jaxpr = closed.jaxpr
    given = {id(v) for v in jaxpr.invars}
    made = {id(v): e for e in jaxpr.eqns for v in e.outvars}
    weights = activations = host = 0
    for v in {id(v): v for v in jaxpr.outvars if id(v) not in given and not hasattr(v, "val")}.values():
        size = math.prod(v.aval.shape) * (v.aval.dtype.itemsize if hasattr(v.aval.dtype, "itemsize") else 8)
        if v.aval.shape[-3:] == (rows, length, config.dim) and compute.remat in ("full", "offload"):
            size //= parts
        cast = id(v) in made and made[id(v)].primitive.name == "convert_element_type" and all(id(u) in given for u in made[id(v)].invars)
        if getattr(v.aval, "memory_space", None) == jax.memory.Space.Host:
            host += size
        elif cast:
            weights += size
        else:
            activations += size
    return activations, weights, host


def layers_alone(config: ModelConfig) -> ModelConfig:
    """One trip of the repeated layers (of a model without them, its widest layer), for what one backward pass of a layer works on."""
    unit = config.cycle or config.prefix[:1] or config.suffix[:1]
    return dc.replace(config, prefix=(), cycle=unit, repeats=1, suffix=())


def layer_weights(job: Job) -> int:
    """Bytes of one trip's weights as they are multiplied: gathered over fsdp, divided over tensor and expert, in the computing dtype."""
    repeats, total = max(1, job.config.model.repeats), 0
    labels = flatten(job.labels)
    for name, x in flatten(job.params).items():
        if not name.startswith("cycle/") and (job.config.model.cycle or not name.startswith(("prefix_0/", "suffix_0/"))):
            continue
        kept = math.prod(job.over(axis) for axis in labels[name].axes if axis not in ("embed", "source", "layer"))
        total += math.prod(x.shape) // kept // (repeats if name.startswith("cycle/") else 1)
    return total * jnp.dtype(job.config.compute.dtype).itemsize


def piped(job: Job, share: ModelConfig, length: int, platform: str) -> dict[str, float]:
    """What a pipeline holds: of GPipe every tick keeps its layers' inputs, an interleaved one its chunk's input alone; a stage's weights are whole over fsdp from the first tick to the last
    of the backward pass, in the computing dtype. -> "activations" and "host" of all layers, "stage": those weights, "tick": their gradients, those of what goes in and comes out, and one tick's
    backward pass."""
    compute, layout, (n, v) = job.config.compute, job.config.layout, (job.mesh.shape["stage"], job.config.layout.interleave)
    divided, rows = job.over("residual") // job.over("length"), job.rows * n
    a_time, chunk = rows / (layout.microbatches or n), share.repeats / (n * v)

    def trips(count: int, compute: Compute) -> tuple[int, int]:
        kept, _, host = residuals(dc.replace(share, repeats=count), compute, 1, length, platform, divided)
        return kept, host
    (one, one_host), (two, two_host) = trips(1, compute), trips(2, compute)
    bare = dc.replace(compute, remat=None)
    kept, kept_host, whole = two - one, two_host - one_host, trips(2, bare)[0] - trips(1, bare)[0]           # of one trip, for a row
    stream = length * share.dim * jnp.dtype(compute.dtype).itemsize / divided
    outside, outside_host = (one - kept) * job.rows, (one_host - kept_host) * job.rows
    stage = layer_weights(job) * share.repeats / n
    if v == 1:
        held, held_host, tick = ticks(layout, n) * chunk * kept, ticks(layout, n) * chunk * kept_host, whole
    else:
        held, held_host, tick = ticks(layout, n) * stream, 0.0, chunk * whole if layout.ticks == "flat" else chunk * kept + whole
    return {"activations": outside + held * a_time + rows * stream, "host": outside_host + held_host * a_time, "stage": stage, "tick": stage + tick * a_time + 2 * rows * stream}


def estimate(job: Job) -> dict[str, float]:
    """-> bytes per device by kind (KINDS; "stage" and "tick" are of pipelines), "total" of them at the worst moment, and beside it "host" (what is offloaded to the host's memory) and "cache": keys
    and values of the whole batch at its full length, for decoding."""
    config, compute = job.config, job.config.compute
    platform = "tpu"                   # a GPU's attention keeps the same arrays, and its kernel cannot be traced without one
    share, length = local(config.model, job), config.context // job.over("length")
    item = jnp.dtype(compute.dtype).itemsize
    if job.mesh.shape["stage"] > 1 and share.cycle:
        kept = piped(job, share, length, platform)
    else:
        all_kept, _, all_host = residuals(share, compute, 1, length, platform, job.over("residual") // job.over("length"))
        kept = {"activations": all_kept * job.rows, "host": all_host * job.rows, "stage": 0.0, "tick": 0.0}
    working, _, _ = residuals(layers_alone(share), dc.replace(compute, remat=None), 1, length, platform)
    V, D = config.model.vocab_size // job.over("vocab"), config.model.dim
    chunk = min(getattr(config.objective, "chunk", None) or max(1, CHUNK // job.rows), length)
    state = job.state()
    weights = held(job.params)
    found: dict[str, float] = {
        "weights": weights, "optimizer": held(state.opt_state), "gradients": weights * (2 if config.accumulate > 1 else 1), "batch": held(job.batch(job.mesh)),
        "activations": kept["activations"], "stage": kept["stage"],
        "layer": working * job.rows + 3 * layer_weights(job),                # two layers' weights, one in use and one on its way, and one layer's gradient before it is divided
        "logits": 2 * item * V * D + (4 + item) * job.rows * chunk * V + item * job.rows * length * D,
    }
    found |= {"tick": kept["tick"], "host": kept["host"] + held(state.opt_state, host=True)}
    apart = not found["tick"] or config.model.prefix or config.model.suffix            # layers that no stage has
    total = sum(found[kind] for kind in KINDS[:6]) + max(found["layer"] if apart else 0.0, found["logits"], found["tick"])
    spread = job.over("kv_heads") if all(getattr(x.mixer, "kv_heads", 1) > 1 for x in config.model.layers) else 1
    return {**found, "total": total, "cache": cache_bytes(config.model, max(1, config.batch_size // job.parts), config.context, compute.dtype) / spread}
