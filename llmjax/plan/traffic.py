"""Bytes one device sends in a train step, by the mesh axes they cross, from labels and rules: what a ring needs at least.

Of n devices that hold b bytes together an all-gather or a reduce-scatter sends (n - 1) / n · b each, an all-reduce twice that. Weights cross in the computing dtype, once in the forward and
once in the backward pass; gradients leave as an all-reduce on TPUs up to v6e whatever a program asks for, and scattered elsewhere.
"""
from __future__ import annotations

import math

import jax.numpy as jnp

from llmjax.core import MixtureOfExperts
from llmjax.core.mesh import mesh_axes
from llmjax.core.tree import flatten
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
        times = config.accumulate * (1 if name.startswith("head/") else 2)                              # the loss makes the head's gradient in the forward pass
        if not lookup:
            add(gathered, times * (n - 1) / n * whole)
        reduced = tuple(a for a in together if a not in stays)
        n = math.prod(mesh.shape[a] for a in reduced)
        if not lookup:
            add(reduced, config.accumulate * (1 if scattered and gathered == reduced else 2) * (n - 1) / n * whole)


def activations(job: Job, add) -> None:
    """What tensor, expert, sequence and stage parallelism pass on."""
    mesh, config, model = job.mesh, job.config, job.config.model
    item = jnp.dtype(config.compute.dtype).itemsize
    tokens = config.batch_size // job.parts * (config.context // job.over("length"))
    stream = tokens * model.dim * item
    again = 1 if config.compute.remat is None else 2                           # forward passes of a layer
    layers = len(model.layers) / mesh.shape["stage"]
    n = mesh.shape["tensor"]
    if n > 1:                                                                  # after the mixer and after the feed-forward, and their inputs' gradients; embedding and head once each
        add(("tensor",), 2 * (n - 1) / n * stream * (2 * layers * (again + 1) + 2))
    n = mesh.shape["expert"]
    if n > 1:                                                                  # to the experts and back
        chosen = sum(x.ffn.top_k for x in model.layers if isinstance(x.ffn, MixtureOfExperts)) / mesh.shape["stage"]
        add(("expert",), (n - 1) / n * stream * chosen * 2 * (again + 1))
    n = mesh.shape["sequence"]
    if n > 1:                                                                  # keys and values once around in each forward pass, with their gradients in the backward pass
        width = sum(2 * getattr(x.mixer, "kv_heads", 0) * getattr(x.mixer, "head_dim", 0) for x in model.layers) / job.over("kv_heads") / mesh.shape["stage"]
        add(("sequence",), (n - 1) * tokens * width * item * (again + 2))
    if mesh.shape["stage"] > 1:
        add(("stage",), 2 * stream * config.layout.interleave)
