"""What `llmjax plan` prints: the same numbers for people and, with --json, for programs."""
from __future__ import annotations

import dataclasses as dc
import pathlib
from typing import Any

from llmjax import train
from llmjax.core import ConfigError, ModelConfig, RunConfig
from llmjax.plan import chips, figures, memory, roofline, search, traffic
from llmjax.plan import compile as compiler
from llmjax.plan.job import Job, make

MEANS = {"weights": "weights", "optimizer": "optimiser", "gradients": "gradients", "batch": "batch", "activations": "kept activations", "stage": "a stage's weights", "layer": "one layer's pass",
         "logits": "one chunk of logits", "tick": "one tick's pass", "total": "at the worst moment", "host": "(in the host's memory)", "cache": "(cache, to decode it)"}


@dc.dataclass(frozen=True)
class Report:
    """numbers: what --json prints. text: a table for people."""
    numbers: dict[str, Any]
    text: str


def short(x: float, unit: str = "") -> str:
    """1.34e9 -> "1.34 G"."""
    for size, letter in ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x / size:.3g} {letter}{unit}" if abs(x / size) < 999.5 else f"{x / size:.0f} {letter}{unit}"
    return f"{x:.3g} {unit}".rstrip()


def table(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def model_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    kinds = found["memory_bytes"]
    return [
        ("parameters", f"{short(found['parameters_total'])}" + (f", active {short(found['parameters_active'])}" if found["parameters_active"] != found["parameters_total"] else "")),
        ("FLOPs a token, 6 N", short(found["flops_per_token_6n"])),
        (f"exact, {found['context']:,} tokens", f"{short(found['flops_per_token'])} causal, {short(found['flops_per_token_full_attention'])} with full attention"),
        ("cache a token", f"{short(found['kv_cache_bytes_per_token'], 'B')} (bfloat16); {short(found['kv_cache_bytes'], 'B')} for {found['context']:,} tokens"),
        *([("this cache", f"{short(found['cache_kind_bytes'], 'B')} for one row of {found['context']:,} tokens as {found['cache_kind']}")] if "cache_kind" in found else []),
        ("Chinchilla", f"{short(found['chinchilla_tokens'])} tokens, {short(found['chinchilla_flops'])} FLOPs"),
        ("weights", ", ".join(f"{kind} {short(kinds[kind], 'B')}" for kind in figures.BITS)),
        ("to train with Adam", f"{short(kinds['training_adam'], 'B')} and activations"),
    ]


def of_model(name: str, config: ModelConfig, context: int | None = None, cache: str | None = None) -> Report:
    found = figures.of_model(config, context, cache)
    return Report(found, f"{name}\n" + table(model_rows(found)))


def of_run(config: RunConfig, topology: str | None = None, *, price: float | None = None, mfu: float | None = None, search_front: bool = False) -> tuple[Report, Job, dict[str, float]]:
    """-> (the report, the job, its memory). Raises ConfigError, ShardingError."""
    where = chips.topology(topology) if topology else None
    job = make(config, where)
    config = job.config
    found, sent = memory.estimate(job), traffic.per_axis(job)
    model = figures.of_model(config.model, config.context)
    axes = {k: v for k, v in job.mesh.shape.items() if v > 1}
    numbers: dict[str, Any] = {
        "devices": job.devices, "layout": axes, "batch_size": config.batch_size, "context": config.context, "remat": config.compute.remat,
        "memory_per_device_bytes": found, "sent_per_step_bytes": sent, "flops_per_step": config.batch_size * config.context * train.flops_per_token(job.model, config.context),
        **{k: v for k, v in model.items() if k != "context"}}
    rows = model_rows(model)
    rows += [("", ""), ("layout", " × ".join(f"{k}={v}" for k, v in axes.items()) or "one device"),
             ("a step", f"{config.batch_size} × {config.context} tokens" + (f" in {config.accumulate} parts" if config.accumulate > 1 else "") + f", {short(numbers['flops_per_step'])} FLOPs; "
              f"remat {config.compute.remat or 'none'}, {config.compute.dtype}")]
    rows += [("", ""), ("bytes a device", "")] + [(f"  {MEANS[k]}", short(found[k], "B")) for k in MEANS if found[k]]
    rows += [("sent a step", ", ".join(f"{axis} {short(size, 'B')}" for axis, size in sent.items()) or "nothing")]
    if where is not None:
        numbers, rows = on_chips(job, found, numbers, rows, price, mfu)
    if search_front:
        assert where is not None
        numbers["front"] = search.front(job, price=price)
        rows += [("", ""), ("Pareto front", "time (nothing overlapped) against memory")] + [front_row(row) for row in numbers["front"]]
        if not numbers["front"]:
            rows.append(("", "nothing fits on these chips"))
    return Report(numbers, table(rows)), job, found


def on_chips(job: Job, found: dict[str, float], numbers: dict[str, Any], rows: list[tuple[str, str]], price: float | None, mfu: float | None) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The part of a report that knows the chips: does it fit, how long, how much."""
    assert job.topology
    chip, limit = chips.CHIPS[job.topology.chip], search.room(job.topology)
    times = roofline.step_time(job, found)
    told = roofline.cost(job, times, price=price, mfu=mfu)
    fits = found["total"] <= limit
    numbers |= {"topology": job.topology.name, "chips": job.topology.chips, "hbm_bytes": chip.share("hbm"), "fits": fits, "roofline": times, **told}
    rows += [("", ""), (job.topology.name, f"{job.topology.chips} chips, {short(chip.share('hbm'), 'B')} a device: " + ("fits" if fits else "does NOT fit")
                        + f" ({found['total'] / chip.share('hbm'):.0%} of it; {1 - search.HEADROOM:.0%} is left to the runtime)")]
    if not fits:
        numbers["advice"] = search.advice(job, found["total"])
        rows += [("  what saves most" if not i else "", f"{row['change']}  -> {short(row['total'], 'B')}" + (", fits" if row["total"] <= limit else ""))
                 for i, row in enumerate(numbers["advice"][:4])]
    rows += [("seconds a step", f"{times['bound']:.3g} at least (limited by {times['limited_by']}): compute {times['compute']:.3g}, memory {times['memory']:.3g}, network {times['network']:.3g}; "
                                f"{times['apart']:.3g} with nothing overlapped"),
             ("expected", f"{told['step_seconds']:.3g} s a step at an MFU of {told['mfu']:.0%}" + ("" if mfu else " (the roofline's: no run does better; --mfu=0.5 asks what is usual)")
              + f", {short(told['tokens_per_second'])} tokens/s")]
    if job.steps:
        rows.append(("the run", f"{job.steps:,} steps, {short(told['tokens'])} tokens ({told['chinchilla_share']:.2g} of Chinchilla's), {short(told['flops'])} FLOPs: {told['days']:.3g} days, "
                     f"{told['chip_hours']:,.0f} chip-hours" + (f", ${told['dollars']:,.0f} at ${told['price_per_chip_hour']:g}" if told["dollars"] else ", no list price: give --price")))
    return numbers, rows


def front_row(row: dict[str, Any]) -> tuple[str, str]:
    laid = " ".join(f"{k}={v}" for k, v in row["layout"].items()) or "one device"
    price = row["dollars_per_billion_tokens"]
    return (f"  {short(row['tokens_per_second'])} tok/s", f"{short(row['bytes'], 'B').ljust(8)} batch {row['batch_size']}, remat {row['remat'] or 'none'}, {laid} ({row['limited_by']})"
            + (f", ${price:,.2f} a billion tokens" if price else ""))


def compiled(report: Report, job: Job, found: dict[str, float], dump: str | pathlib.Path | None = None) -> Report:
    """The report with what the TPU compiler says of the same step, and how near our own estimate was."""
    if job.topology is None:
        raise ConfigError("--compile: for which chips? give --topology, as v5e:16x16")
    said = compiler.run(job.config, job.topology, dump)
    sent = report.numbers["sent_per_step_bytes"]
    seconds = said["memory"]["compile_seconds"]
    off = {"hbm": found["total"] / said["hbm_bytes"] - 1, "sent": (sum(sent.values()) / said["sent_bytes"] - 1) if said["sent_bytes"] else 0.0}
    limit = chips.CHIPS[job.topology.chip].share("hbm")
    rows = [("", ""), ("the TPU compiler", f"{seconds:,.0f} s of compiling" + (f"; kept in {dump}" if dump else "")),
            ("bytes a device", f"{short(said['hbm_bytes'], 'B')} (arguments, temporaries, outputs), {short(said['peak_bytes'] or 0, 'B')} at the peak, of {short(limit, 'B')}; "
             f"our estimate {short(found['total'], 'B')} ({off['hbm']:+.0%})"),
            ("sent a step", f"{short(said['sent_bytes'], 'B')}; our estimate {short(sum(sent.values()), 'B')} ({off['sent']:+.0%})")]
    rows += [(f"  {kind}", f"{c['count']:,} × {short(c['bytes'], 'B')}") for kind, c in said["collectives"].items()]
    rows += [("cycles", f"{short(said['estimated_cycles'])} estimated, kernels ({sum(said['kernels'].values()):,} calls) and collectives left out")]
    if said["loops_counted_once"]:
        rows.append(("", f"loops of unknown length, counted once: {', '.join(said['loops_counted_once'])}"))
    return Report({**report.numbers, "compiled": {**said, "estimate_error": off}}, report.text + "\n" + table(rows))

