"""Watches the loss: not a number, or a jump, stops the run or is skipped, as `Guard` says; either way it is said."""
from __future__ import annotations

import math

from llmjax.core import Guard


class TrainingStopped(ValueError):
    """The guard ended a run; the message says why and which checkpoint is whole."""


class Watch:
    """Running mean and variance of the loss (exponential, horizon 100 logged steps; nothing is judged in the first 20). Its state is saved with the run."""

    def __init__(self, guard: Guard, mean: float = 0.0, variance: float = 0.0, seen: int = 0, streak: int = 0):
        self.guard, self.mean, self.variance, self.seen, self.streak = guard, mean, variance, seen, streak

    def limit(self) -> float | None:
        """The highest loss that is no spike; None where spikes are not watched for."""
        if self.guard.spike is None:
            return None
        return math.inf if self.seen < 20 else self.mean + self.guard.spike * math.sqrt(self.variance + 1e-12)

    def look(self, step: int, loss: float, skipped: bool) -> str | None:
        """What to tell the user about this step, or None. Raises TrainingStopped."""
        limit = self.limit()
        bad = "is not a finite number" if not math.isfinite(loss) else f"is above {limit:.4f}, {self.guard.spike:g} standard deviations over its mean" if limit is not None and loss > limit else None
        if bad is None and not skipped:
            self.streak, self.seen = 0, self.seen + 1
            rate = max(0.01, 1 / self.seen)
            delta = loss - self.mean
            self.mean += rate * delta
            self.variance = (1 - rate) * (self.variance + rate * delta * delta)
            return None
        reason = f"loss {loss:.4g} {bad}" if bad else "the gradient is not finite"
        if self.guard.policy == "stop":
            raise TrainingStopped(f"step {step}: {reason}; stopped. Lower the learning rate, clip harder, or let such steps pass with guard.policy=skip")
        self.streak += 1
        if self.streak >= self.guard.patience:
            raise TrainingStopped(f"step {step}: {reason}, the {self.streak}th such step in a row (guard.patience={self.guard.patience}); stopped")
        return f"step {step}: {reason}; skipped"

    def state(self) -> dict:
        return dict(mean=self.mean, variance=self.variance, seen=self.seen, streak=self.streak)
