"""A run's curves as pictures."""
from __future__ import annotations

import pathlib

from llmjax.train.loggers import read_rows


def plot_losses(metrics: pathlib.Path, picture: pathlib.Path) -> None:
    """Training and held-out loss over steps, from a metrics.jsonl, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    rows = read_rows(metrics)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for key, label, style in (("loss", "training", dict(linewidth=1)), ("eval_loss", "held out", dict(marker="o", markersize=4))):
        points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
        if points:
            axes.plot(*zip(*points), label=label, **style)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    picture.parent.mkdir(parents=True, exist_ok=True)
    part = picture.with_suffix(".part")
    figure.savefig(part, dpi=120, format="png")
    part.replace(picture)
