"""What to change: each knob's effect on a run that does not fit, and the Pareto front of batch × remat × layout."""
from __future__ import annotations

import dataclasses as dc
import itertools
from collections.abc import Iterator
from typing import Any

from llmjax.core import ConfigError, MixtureOfExperts, RunConfig, ShardingError
from llmjax.plan import chips, memory, roofline
from llmjax.plan.chips import CHIPS, Topology
from llmjax.plan.job import Job, make

REMATS = (None, "dots", "full")        # "offload" costs as much arithmetic as "full"; what its transfers cost is not modelled, so the front leaves it out
HEADROOM = 0.95                        # of a device's memory: the runtime and fragmentation want the rest


def room(topology: Topology) -> float:
    """Bytes of a device a program may plan with."""
    return HEADROOM * CHIPS[topology.chip].share("hbm")


def changed(config: RunConfig, layout: dict[str, Any] | None = None, remat: Any = ..., **fields: Any) -> RunConfig:
    new = dc.replace(config, **fields)
    if layout is not None:
        new = dc.replace(new, layout=dc.replace(new.layout, **layout))
    return new if remat is ... else dc.replace(new, compute=dc.replace(new.compute, remat=remat))


def knobs(job: Job) -> Iterator[tuple[str, RunConfig]]:
    """(what to type, the configuration it makes): one step of each knob that can save memory."""
    config, sizes = job.config, dict(job.mesh.shape)
    order = (*REMATS, "offload")
    for remat in order[order.index(config.compute.remat) + 1:]:
        if remat:
            yield f"--config.compute.remat={remat}", changed(config, remat=remat)
    if config.batch_size // 2 >= job.parts and config.batch_size % 2 == 0:
        yield f"--config.batch_size={config.batch_size // 2}", changed(config, batch_size=config.batch_size // 2)
        yield f"--config.accumulate={2 * config.accumulate}", changed(config, accumulate=2 * config.accumulate)
    if config.context > 256:
        yield f"--config.context={config.context // 2}", changed(config, context=config.context // 2)
    for take, give in (("data", "fsdp"), ("data", "tensor"), ("fsdp", "tensor")):
        if sizes[take] > 1 and sizes[take] % 2 == 0:
            new = {take: sizes[take] // 2, give: sizes[give] * 2}
            yield " ".join(f"--config.layout.{k}={v}" for k, v in new.items()), changed(config, new)
    if job.topology is not None and job.topology.is_tpu:
        bigger = next((t for s in chips.shapes(job.topology.chip) if (t := dc.replace(job.topology, shape=s)).chips == 2 * job.topology.chips), None)
        if bigger:
            yield f"--topology={bigger.name} --config.layout.fsdp={2 * sizes['fsdp']}", changed(config, {"fsdp": 2 * sizes["fsdp"]})


def advice(job: Job, total: float) -> list[dict[str, Any]]:
    """What each knob would make of the memory of a device, what saves most first: {"change", "total", "saves"}."""
    found = []
    for text, config in knobs(job):
        topology = chips.topology(text.split()[0].removeprefix("--topology=")) if text.startswith("--topology=") else job.topology
        try:
            there = memory.estimate(make(config, topology))["total"]
        except (ConfigError, ShardingError):
            continue                   # a head count or a batch that does not divide: not a way out
        if there < total:
            found.append({"change": text, "total": there, "saves": total - there})
    return sorted(found, key=lambda row: row["total"])


def layouts(job: Job) -> Iterator[dict[str, int]]:
    """Products of data, fsdp, tensor and expert over the devices there are; sequence and stage stay as they are."""
    fixed = job.mesh.shape["sequence"] * job.mesh.shape["stage"]
    free = job.devices // fixed
    experts = {x.ffn.experts for x in job.config.model.layers if isinstance(x.ffn, MixtureOfExperts)}
    powers = [2 ** i for i in range(free.bit_length()) if free % 2 ** i == 0]
    for tensor, expert in itertools.product([p for p in powers if p <= 16], [p for p in powers if p == 1 or (experts and all(e % p == 0 for e in experts))]):
        if free % (tensor * expert) == 0:
            rest = free // tensor // expert
            for fsdp in {rest, 1, *[p for p in powers if rest % p == 0 and p >= rest // 4]}:
                yield dict(data=rest // fsdp, fsdp=fsdp, tensor=tensor, expert=expert)


def front(job: Job, *, price: float | None) -> list[dict[str, Any]]:
    """The runs that fit and that no other beats in both tokens a second and memory, the fastest first. The number of tokens in a step stays between a quarter and four times the configured
    one, the model, the context and the chips stay."""
    assert job.topology
    limit, rows = room(job.topology), []
    for layout, remat, scale in itertools.product(layouts(job), REMATS, (0.25, 0.5, 1, 2, 4)):
        batch = int(job.config.batch_size * scale)
        if batch < 1:
            continue
        try:
            other = make(changed(job.config, layout, remat, batch_size=batch), job.topology)
            found = memory.estimate(other)
        except (ConfigError, ShardingError):
            continue
        if found["total"] <= limit:
            times = roofline.step_time(other, found)
            told = roofline.cost(other, times, price=price, mfu=None)
            rows.append({"layout": {k: v for k, v in layout.items() if v > 1}, "remat": remat, "batch_size": batch, "bytes": found["total"], "step_seconds": times["apart"],
                         "tokens_per_second": batch * job.config.context / times["apart"], "limited_by": times["limited_by"],
                         "dollars_per_billion_tokens": None if told["price_per_chip_hour"] is None else
                         1e9 / (batch * job.config.context / times["apart"]) / 3600 * job.topology.chips * told["price_per_chip_hour"]})
    rows.sort(key=lambda row: (-row["tokens_per_second"], row["bytes"]))
    best: list[dict[str, Any]] = []
    for row in rows:
        if not best or row["bytes"] < best[-1]["bytes"] * 0.98:
            best.append(row)
    return best
