"""Bytes one device sends in a train step, by the mesh axes they cross, from labels and rules: what a ring needs at least.

Of n devices that hold b bytes together an all-gather or a reduce-scatter sends (n - 1) / n · b each, an all-reduce twice that. Weights cross in the computing dtype, once in the forward and
once in the backward pass, those of a pipeline's stages once in all; gradients leave as an all-reduce on TPUs up to v6e whatever a program asks for, and scattered elsewhere.
"""
from __future__ import annotations

import math

import jax.numpy as jnp

from llmjax.core import MixtureOfExperts
from llmjax.core.mesh import bubble, mesh_axes
from llmjax.core.tree import flatten
from llmjax.models.pipeline import deal
from llmjax.plan.job import Job


def per_axis(job: Job) -> dict[str, float]:
    """{"fsdp": bytes, "tensor": …}; axes over which one thing is reduced together are named together ("data+fsdp"). Axes of size 1 are left out."""
    found: dict[str, float] = {}

    def add(axes: tuple[str, ...], size: float) -> None:
        if size:
            found["+".join(axes)] = found.get("+".join(axes), 0.0) + size
    weights(job, add)
    activations(job, add)
    return found


def weights(job: Job, add) -> None:
    """Gathering of weights, reduction of their gradients."""
    mesh, config, labels = job.mesh, job.config, flatten(job.labels)
    item = jnp.dtype(config.compute.dtype).itemsize
    rules = dict(reversed(config.layout.rules))
    together = tuple(a for a in (*mesh_axes(rules["batch"]), *mesh_axes(rules["length"])) if mesh.shape[a] > 1)
    scattered = bool(job.topology and not job.topology.is_tpu)
    for name, x in flatten(job.params).items():
        own = {a for entry in x.sharding.spec for a in mesh_axes(entry)}
        lookup = name.startswith(("embed/", "positions/", "types/")) and not config.model.tied          # rows are fetched, not tables
        stays = {axis for word in ("layer", "expert") if word in labels[name].batch for axis in mesh_axes(rules[word])}      # every device works on its own of these
        gathered = tuple(a for a in together if a in own and a not in stays)
        whole = math.prod(x.shape) * item / math.prod(mesh.shape[a] for a in own if a not in gathered)
        n = math.prod(mesh.shape[a] for a in gathered)
        piped = mesh.shape["stage"] > 1 and name.startswith("cycle/")                                   # gathered before the first tick, held to the end
        times = config.accumulate * (1 if piped or name.startswith("head/") else 2)                     # the loss makes the head's gradient in the forward pass
        if not lookup:
            add(gathered, times * (n - 1) / n * whole)
        if piped:
            add(("stage",), 2 * config.accumulate * dealt_out(mesh.shape["stage"], config.layout.interleave) * whole)
        reduced = tuple(a for a in together if a not in stays)
        n = math.prod(mesh.shape[a] for a in reduced)
        if not lookup:
            add(reduced, config.accumulate * (1 if scattered and gathered == reduced else 2) * (n - 1) / n * whole)


def dealt_out(stages: int, interleave: int) -> float:
    """The share of a stage's weights that another stage computes with, on the average."""
    rounds = deal(stages, interleave) if interleave > 1 else ()
    return sum(sender != receiver for sends in rounds for sender, (_, receiver) in enumerate(sends)) / (stages * interleave)


def activations(job: Job, add) -> None:
    """What tensor, expert, sequence and stage parallelism pass on.

    Layers before and behind a pipeline are everybody's, each device has its part of the batch; within it a stage has the layers of its own and the tokens of all stages, and idle ticks send
    like the others. Of a layer under tensor parallelism with a divided residual stream the forward pass gathers twice and scatters twice; made again by itself it does not scatter at its end; the
    backward pass gathers the outputs' gradients and scatters the inputs'.
    """
    mesh, config, model = job.mesh, job.config, job.config.model
    item, stages = jnp.dtype(config.compute.dtype).itemsize, job.mesh.shape["stage"]
    tokens = config.batch_size // job.parts * (config.context // job.over("length"))
    stream = tokens * model.dim * item
    idle = 1 / (1 - bubble(config.layout, stages))
    parts = (((*model.prefix, *model.suffix), 1.0, recomputed(config.compute.remat)), (model.cycle, model.repeats * idle, again(job)))          # layers, how often each, forward passes more
    flat = stages > 1 and config.layout.ticks == "flat"
    n = mesh.shape["tensor"]
    if n > 1:                                                                  # embedding and head once each
        add(("tensor",), (n - 1) / n * stream * (4 + sum(len(layers) * times * (8 + 4 * more - (more > 0 and not (flat and layers is model.cycle))) for layers, times, more in parts)))
    n = mesh.shape["expert"]
    if n > 1:                                                                  # to the experts and back
        chosen = sum(x.ffn.top_k * times * (more + 2) for layers, times, more in parts for x in layers if isinstance(x.ffn, MixtureOfExperts))
        add(("expert",), (n - 1) / n * stream * chosen * 2)
    n = mesh.shape["sequence"]
    if n > 1:                                                                  # keys and values once around in each forward pass, with their gradients in the backward pass
        width = sum(2 * getattr(x.mixer, "kv_heads", 0) * getattr(x.mixer, "head_dim", 0) * times * (more + 3) for layers, times, more in parts for x in layers)
        add(("sequence",), (n - 1) * tokens * width / job.over("kv_heads") * item)
    if stages > 1:                                                             # on to the next stage and back; what goes in gathered, its gradient summed, what comes out scattered, and back
        rest = job.over("residual") / job.over("length")
        add(("stage",), 2 * stages * stream / rest * idle * config.layout.interleave)
        add(("stage",), 5 * (stages - 1) * stream / rest)


def recomputed(remat: str | None) -> int:
    """How many more forward passes the backward pass makes of a layer."""
    return 0 if remat is None else 1


def again(job: Job) -> int:
    """The same of the repeated layers: over interleaved stages a tick is made again as a whole, and within it a layer once more unless the ticks are flat."""
    layout, more = job.config.layout, recomputed(job.config.compute.remat)
    if job.mesh.shape["stage"] == 1 or layout.interleave == 1:
        return more
    return 1 if layout.ticks == "flat" else 1 + more
