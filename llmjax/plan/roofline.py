"""The least time a step can take on a chip: arithmetic, memory and wires each at their published speed; and what a run then costs.

`bound` has the three overlap wholly, `apart` has them one after the other: a good run lies between.
"""
from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from llmjax import train
from llmjax.core import ConfigError
from llmjax.core.mesh import bubble
from llmjax.plan import figures, memory, traffic
from llmjax.plan.chips import CHIPS, Chip, Topology
from llmjax.plan.job import Job
from llmjax.train.flops import matmul_weights


def training_days(flops: float, topology: Topology, mfu: float) -> float:
    """Days that `flops` of a model take at a model FLOPs utilisation. Raises ConfigError for an mfu outside (0, 1]."""
    if not 0 < mfu <= 1:
        raise ConfigError(f"--mfu={mfu}: a share above 0 and at most 1 is wanted")
    return flops / (topology.chips * CHIPS[topology.chip].flops * mfu) / 86400


def executed(job: Job) -> float:
    """FLOPs a token really costs: the model's, and the forward pass again where layers are recomputed ("dots" keeps products and recomputes the rest, attention's too), once more where the
    ticks of a pipeline are."""
    model, context = job.model, job.config.context
    whole = train.flops_per_token(model, context)
    mixing = whole - 6 * matmul_weights(model)
    head = 6 * job.config.model.vocab_size * job.config.model.dim
    again = {None: 0.0, "dots": mixing / 3}.get(job.config.compute.remat, (whole - head) / 3)
    repeated = job.config.model.repeats * len(job.config.model.cycle) / len(job.config.model.layers)
    ticks = (traffic.again(job) - traffic.recomputed(job.config.compute.remat)) * (whole - head) / 3 * repeated
    return whole + again + ticks


def hbm_bytes(job: Job, found: dict[str, float]) -> float:
    """Bytes of HBM a step must move: gathered weights written once (in a pipeline once a tick) and read by each of the passes, the optimiser's own reads and writes, kept activations twice,
    and the layers' own activations twice in each pass."""
    config = job.config
    item = jnp.dtype(config.compute.dtype).itemsize
    passes = 2 + traffic.again(job)
    stages, layers = job.mesh.shape["stage"], max(1, config.model.repeats) * config.accumulate
    ticks = layers / (1 - bubble(config.layout, stages))                       # a stage has fewer layers and as many more tokens; an idle tick moves as much as another
    rounds = (config.layout.microbatches or stages) if stages > 1 else 1       # it takes its weights up again for each microbatch
    gathered = memory.layer_weights(job) / stages * ticks * rounds
    working = (found["layer"] - 3 * memory.layer_weights(job)) * ticks
    head = config.model.vocab_size / job.over("vocab") * config.model.dim * item * config.accumulate
    logits = job.rows * config.accumulate * config.context / job.over("length") * config.model.vocab_size / job.over("vocab") * (4 + item)
    return 2 * passes * gathered + 4 * head + 2 * logits + 2 * found["activations"] * config.accumulate + passes * working + 2 * (found["weights"] + found["optimizer"] + found["gradients"])


def link_speed(job: Job, chip: Chip, axes: str) -> float:
    """Bytes/s a device sends over these axes: the chips' own links, or the network where an axis goes from node to node. A torus serves axes with the dimensions it has: each gets its part
    of the links, so that the sum over axes is what one after the other takes."""
    assert job.topology
    if job.topology.is_tpu or math.prod(job.mesh.shape[a] for a in axes.split("+")) <= min(chip.node, job.topology.shape[1]):
        return chip.share("link")
    return chip.network


def wire_seconds(job: Job, chip: Chip, axes: str, size: float) -> float:
    """How long a device sends `size` bytes over these axes. Where one of them goes across s slices, a ring of n devices has (s - 1) / (n - 1) of what each sends on the network between
    them (a reduction within each slice first); stages hand everything on, so the devices at a slice's end send all of it there."""
    assert job.topology
    s, across = job.topology.slices, job.config.layout.dcn
    if s == 1 or across not in axes.split("+"):
        return size / link_speed(job, chip, axes)
    n = math.prod(job.mesh.shape[a] for a in axes.split("+"))
    slow = 1.0 if across == "stage" else (s - 1) / (n - 1)
    return slow * size / chip.network + (1 - slow) * size / chip.share("link")


def step_time(job: Job, found: dict[str, float]) -> dict[str, Any]:
    """-> seconds of a step by what takes them, their bound, and how far it is from the arithmetic alone (mfu, hfu at the bound)."""
    assert job.topology
    chip = CHIPS[job.topology.chip]
    tokens = job.config.batch_size * job.config.context / job.devices
    peak = chip.share("flops") * (0.5 if job.config.compute.dtype == "float32" else 1.0)
    sent = traffic.per_axis(job)
    seconds = {"compute": tokens * executed(job) / peak, "memory": hbm_bytes(job, found) / chip.share("bandwidth"),
               "network": sum(wire_seconds(job, chip, axes, size) for axes, size in sent.items())}
    seconds["compute"] /= 1 - bubble(job.config.layout, job.mesh.shape["stage"])
    bound = max(seconds.values())
    useful = tokens * train.flops_per_token(job.model, job.config.context) / peak
    return {**seconds, "bound": bound, "apart": sum(seconds.values()), "limited_by": max(seconds, key=lambda k: seconds[k]), "mfu": useful / bound, "sent_bytes": sent}


def cost(job: Job, times: dict[str, Any], *, price: float | None, mfu: float | None) -> dict[str, Any]:
    """-> what the run takes: seconds a step, tokens a second, and where the number of steps is known days, chip-hours and dollars."""
    assert job.topology
    chip = CHIPS[job.topology.chip]
    if mfu is not None and not 0 < mfu <= 1:
        raise ConfigError(f"--mfu={mfu}: a share above 0 and at most 1 is wanted")
    if price is not None and price <= 0:
        raise ConfigError(f"--price={price}: US dollars a chip-hour, above 0")
    seconds = times["bound"] if mfu is None else times["bound"] * times["mfu"] / mfu
    price = chip.price if price is None else price
    tokens = job.config.batch_size * job.config.context
    found = {"mfu": times["mfu"] if mfu is None else mfu, "step_seconds": seconds, "tokens_per_second": tokens / seconds, "price_per_chip_hour": price}
    if job.steps:
        hours = job.steps * seconds / 3600
        found |= {"steps": job.steps, "tokens": job.steps * tokens, "flops": job.steps * tokens * train.flops_per_token(job.model, job.config.context), "days": hours / 24,
                  "chip_hours": hours * job.topology.chips, "dollars": None if price is None else hours * job.topology.chips * price}
        found["chinchilla_share"] = found["tokens"] / (figures.TOKENS_PER_PARAMETER * figures.parameters(job.model)[1])
    return found
