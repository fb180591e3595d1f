"""A folder of finished runs as points of a scaling law: what each trained, on how much, how far it came; the fit, and its picture."""
from __future__ import annotations

import dataclasses as dc
import json
import pathlib
from typing import Any

import numpy as np

from llmjax import models, train
from llmjax.core import ConfigError, RunConfig
from llmjax.core.override import from_json
from llmjax.plan import figures, laws
from llmjax.plan.report import Report, short, table


@dc.dataclass(frozen=True)
class Run:
    """parameters: active ones, embeddings and head among them, as Hoffmann et al. count. loss: held out where the run evaluated, else the mean of its last tenth of logged losses."""
    folder: str
    parameters: int
    tokens: int
    loss: float
    held_out: bool
    vocab_size: int


def read(folder: str | pathlib.Path) -> tuple[list[Run], list[str]]:
    """-> (the finished runs below a folder, why others were left out). Raises ConfigError where there is no folder or no run."""
    top = pathlib.Path(folder)
    if not top.is_dir():
        raise ConfigError(f"--fit={folder}: there is no such folder")
    found, left = [], []
    for file in sorted(top.rglob("metrics.jsonl")):
        name = str(file.parent.relative_to(top)) if file.parent != top else file.parent.name
        config_file = file.parent / "config.json"
        if not config_file.exists():
            left.append(f"{name}: no config.json")
            continue
        config: RunConfig = from_json(json.loads(config_file.read_text()))
        rows = [r for r in train.read_rows(file) if isinstance(r.get("step"), int)]
        done = max((r["step"] for r in rows), default=0)
        if not done or not ((file.parent / "hf").exists() or done == config.steps):
            left.append(f"{name}: not finished (step {done} of {config.steps}); its learning rate has not come down")
            continue
        evaluated = [r["eval_loss"] for r in rows if isinstance(r.get("eval_loss"), int | float) and r["step"] == done]
        losses = [r["loss"] for r in rows if isinstance(r.get("loss"), int | float)]
        if not evaluated and not losses:
            left.append(f"{name}: no loss in metrics.jsonl")
            continue
        loss = evaluated[-1] if evaluated else float(np.mean(losses[-max(1, len(losses) // 10):]))
        found.append(Run(name, figures.parameters(models.Decoder(config.model))[1], done * config.batch_size * config.context, float(loss), bool(evaluated), config.model.vocab_size))
    if not found:
        raise ConfigError(f"--fit={folder}: no finished run in it" + (f" ({left[0]})" if left else "; a run's folder holds config.json and metrics.jsonl"))
    for what, differ in (("vocabularies", {r.vocab_size for r in found}), ("kinds of loss, held out and training", {r.held_out for r in found})):
        if len(differ) > 1:
            raise ConfigError(f"--fit={folder}: its runs have different {what} ({', '.join(map(str, sorted(differ)))}), and such losses cannot be compared; put them in folders of their own")
    return found, left


def fit(folder: str | pathlib.Path, *, bootstrap: int = 200) -> Report:
    """The Chinchilla form fitted to the runs below a folder; writes FOLDER/scaling.png."""
    found, left = read(folder)
    done = laws.fit([r.parameters for r in found], [r.tokens for r in found], [r.loss for r in found], bootstrap=bootstrap)
    picture = pathlib.Path(folder) / "scaling.png"
    plot(found, done, picture)
    most = max(6 * r.parameters * r.tokens for r in found)
    budgets = [10 ** k * most for k in (0, 1, 2)]
    optimum = []
    for c in budgets:
        n, d = done.law.optimum(c)
        near = [law.optimum(c)[0] for law in done.samples] or [n]
        low, high = (float(np.quantile(near, q)) for q in (0.05, 0.95))
        optimum.append({"flops": c, "parameters": n, "tokens": d, "loss": float(done.law.loss(n, d)), "parameters_low": low, "parameters_high": high})
    numbers: dict[str, Any] = {"runs": [dc.asdict(r) for r in found], "left_out": left, "fit": laws.told(done.law), "low": done.low, "high": done.high, "rms_log_error": done.error,
                               "optimum": optimum, "plot": str(picture)}
    own = numbers["fit"]
    rows = [("runs", f"{len(found)}: {short(min(r.parameters for r in found))} to {short(max(r.parameters for r in found))} parameters, "
             f"{short(min(r.tokens for r in found))} to {short(max(r.tokens for r in found))} tokens, loss {'held out' if found[0].held_out else 'of training'}"),
            ("L(N, D)", f"{own['e']:.4g} + {own['a']:.4g} / N^{own['alpha']:.4g} + {own['b']:.4g} / D^{own['beta']:.4g}   (log loss off by {done.error:.2%} rms)")]
    rows += [(f"  {name}", f"{own[name]:.4g}   90 %: {done.low[name]:.4g} to {done.high[name]:.4g}") for name in ("e", "a", "b", "alpha", "beta", "exponent_n", "exponent_d")]
    rows += [(f"for {short(x['flops'])} FLOPs", f"{short(x['parameters'])} parameters ({short(x['parameters_low'])} to {short(x['parameters_high'])}) on {short(x['tokens'])} tokens: "
              f"loss {x['loss']:.3f}") for x in optimum]
    rows += [("left out", text) for text in left] + [("plot", str(picture))]
    return Report(numbers, table(rows))


def plot(found: list[Run], done: laws.Fit, picture: pathlib.Path) -> None:
    """Loss over tokens for each size with the law's curves, and the compute-optimal size over the budget with its confidence band."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    tokens = np.geomspace(min(r.tokens for r in found) / 2, max(r.tokens for r in found) * 4, 80)
    for i, n in enumerate(sorted({r.parameters for r in found})):
        color = f"C{i % 10}"
        mine = [r for r in found if r.parameters == n]
        left.plot([r.tokens for r in mine], [r.loss for r in mine], "o", color=color, markersize=4, label=short(n))
        left.plot(tokens, done.law.loss(n, tokens), color=color, linewidth=1)
    left.set(xscale="log", xlabel="tokens", ylabel="loss (nats per token)", title="runs and the law")
    left.legend(title="parameters", fontsize="small")
    budgets = np.geomspace(min(6 * r.parameters * r.tokens for r in found), 1e3 * max(6 * r.parameters * r.tokens for r in found), 40)
    if done.samples:
        band = np.array([[law.optimum(c)[0] for c in budgets] for law in done.samples])
        right.fill_between(budgets, np.quantile(band, 0.05, axis=0), np.quantile(band, 0.95, axis=0), alpha=0.25, label="90 %")
    right.plot(budgets, [done.law.optimum(c)[0] for c in budgets], label="optimal parameters")
    right.set(xscale="log", yscale="log", xlabel="FLOPs", ylabel="parameters", title=f"N ~ C^{done.law.exponents[0]:.2f}")
    right.legend(fontsize="small")
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
    part = picture.with_suffix(".part")
    figure.savefig(part, dpi=120, format="png")
    part.replace(picture)
