"""Where metrics go: a progress bar, `metrics.jsonl`, TensorBoard. A logger is called with (step, metrics as plain numbers)."""
from __future__ import annotations

import json
import math
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from llmjax.core import MissingExtra

Logger = Callable[[int, dict[str, float]], None]


class JsonLines:
    """One line per logged step. Opened on a run that goes on from step `resume`, it first drops the lines that the lost steps had written."""

    def __init__(self, path: pathlib.Path, resume: int):
        kept = [row for row in read_rows(path) if row["step"] <= resume]
        part = path.with_suffix(".part")
        part.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(part, path)
        self.file = path.open("a", buffering=1)

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **{k: (v if math.isfinite(v) else str(v)) for k, v in metrics.items()}}) + "\n")

    def close(self) -> None:
        self.file.close()


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The whole rows of a metrics file; a last line that a kill cut short is left out."""
    rows = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


class Console:
    """A bar with loss, tokens/s, MFU and time left on a terminal; elsewhere one line per logged step."""

    def __init__(self, total: int, start: int, quiet: bool = False):
        from tqdm import tqdm
        self.live = sys.stderr.isatty() and not quiet
        self.total, self.quiet = total, quiet
        self.bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, disable=not self.live, file=sys.stderr)

    def tick(self) -> None:
        self.bar.update(1)

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        shown = {"loss": f"{metrics['loss']:.4f}"} if "loss" in metrics else {}
        if "tokens_per_second" in metrics:
            shown["tok/s"] = f"{metrics['tokens_per_second']:,.0f}"
        if "mfu" in metrics:
            shown["MFU"] = f"{metrics['mfu']:.1%}"
        if "eval_loss" in metrics:
            self.say(f"step {step}: eval loss {metrics['eval_loss']:.4f}, perplexity {metrics['eval_perplexity']:.2f}"
                     + (f", bits per byte {metrics['eval_bits_per_byte']:.3f}" if "eval_bits_per_byte" in metrics else ""))
        if self.live:
            self.bar.set_postfix(shown, refresh=False)
        elif shown and not self.quiet:
            left = f", {metrics['seconds_left']:.0f} s left" if "seconds_left" in metrics else ""
            print(f"step {step}/{self.total}  " + "  ".join(f"{k} {v}" for k, v in shown.items()) + left, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        if not self.quiet:
            self.bar.write(text, file=sys.stderr)

    def close(self) -> None:
        self.bar.close()


class TensorBoard:
    """Scalars under the run's folder. Raises MissingExtra without tensorboardX."""

    def __init__(self, folder: pathlib.Path):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise MissingExtra("tensorboardX", "tensorboard", "tensorboard=True") from None
        self.writer = SummaryWriter(str(folder))

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()
