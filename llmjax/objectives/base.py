"""What an objective is: a frozen dataclass that can be called, says which batch keys it reads and which other models it needs, and answers with sums.

    loss, metrics = objective(apply, params, batch, frozen, key)

`loss` and every metric are `Mean`s: a total and a count. The train step adds totals and counts over micro-batches and divides once, so that accumulation equals the large
batch whatever the weights. The gradient is that of loss.total / (the whole batch's count).
"""
from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass


@register_dataclass
@dc.dataclass(frozen=True)
class Mean:
    """total / count, kept apart so that it can be summed over parts. Both are float32 scalars."""
    total: jax.Array
    count: jax.Array

    def value(self) -> jax.Array:
        return self.total / jnp.maximum(self.count, 1e-9)

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)


class Objective(Protocol):
    """reads: keys of the batch. needs: names of other models in `frozen` (a reference, a teacher)."""
    reads: tuple[str, ...]
    needs: tuple[str, ...]

    def __call__(self, apply: Callable, params: Any, batch: dict[str, jax.Array], frozen: Any, key: jax.Array) -> tuple[Mean, dict[str, Mean]]: ...
