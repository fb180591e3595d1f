"""Optimisers from their configurations; the labels decide what decays and what Muon takes."""
from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from typing import Any

import jax
import optax
from optax import contrib

from llmjax.core import Adafactor, AdamW, Constant, Label, Linear, Lion, Muon, WarmupCosine, WarmupStableDecay
from llmjax.core.run_config import Optimizer, Schedule, in_steps
from llmjax.train import eight_bit

LOOKUPS = {"vocab", "position"}        # axes of tables and heads, which Muon leaves to Adam


def make_schedule(schedule: Schedule, peak: float, total: int, steps_per_epoch: int | None = None) -> optax.Schedule:
    """step -> learning rate; step 0 of a warm-up of n steps already takes peak / n."""
    warmup = in_steps(schedule.warmup, total, steps_per_epoch, "schedule.warmup")
    match schedule:
        case Constant():
            after, cut = optax.constant_schedule(peak), None
        case WarmupCosine():
            after, cut = optax.cosine_decay_schedule(peak, max(total - warmup, 1), schedule.final), None
        case Linear():
            after, cut = optax.linear_schedule(peak, peak * schedule.final, max(total - warmup, 1)), None
        case WarmupStableDecay():
            decay = in_steps(schedule.decay, total, steps_per_epoch, "schedule.decay")
            after, cut = optax.constant_schedule(peak), (total - decay, optax.linear_schedule(peak, peak * schedule.final, max(decay, 1)))
    parts, borders = [after], []
    if warmup:
        parts, borders = [optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1)), after], [warmup]
    if cut:
        parts, borders = [*parts, cut[1]], [*borders, max(cut[0], warmup)]
    return optax.join_schedules(parts, borders) if borders else after


def decays(labels: Any) -> Any:
    """True for each weight that decays: matrices. Scales, biases and other vectors do not."""
    return jax.tree.map(lambda label: label.is_matrix, labels, is_leaf=lambda x: isinstance(x, Label))


def muon(config: Muon, learning_rate: Callable | float, labels: Any) -> optax.GradientTransformation:
    """Muon where a label is a hidden matrix, AdamW elsewhere, with decay on tables and heads and none on vectors."""
    def is_label(x: Any) -> bool:
        return isinstance(x, Label)

    def group(label: Label) -> str:
        return "vector" if not label.is_matrix else "table" if LOOKUPS & set(label.axes) else "hidden"

    def dimensions(params: Any) -> Any:
        def one(label: Label, p: Any):
            return p if isinstance(p, optax.MaskedNode) else contrib.MuonDimensionNumbers(reduction_axis=label.dims("inputs"), output_axis=label.dims("outputs"))
        return jax.tree.map(one, labels, params, is_leaf=is_label)
    adam, ratio = config.adam, config.adam.learning_rate / config.learning_rate
    rate = (lambda step: learning_rate(step) * ratio) if callable(learning_rate) else learning_rate * ratio
    return optax.partition({
        "hidden": contrib.muon(learning_rate, ns_steps=config.iterations, beta=config.momentum, weight_decay=config.weight_decay, muon_weight_dimension_numbers=dimensions),
        "table": adamw(adam, rate, None),
        "vector": adamw(dc.replace(adam, weight_decay=0.0), rate, None),
    }, jax.tree.map(group, labels, is_leaf=is_label))


def adamw(config: AdamW, learning_rate: Callable | float, mask: Any) -> optax.GradientTransformation:
    """AdamW with its moments in float32 or in 8 bits."""
    if config.moments == "float32":
        return optax.adamw(learning_rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=mask)
    return optax.chain(eight_bit.scale_by_adam(config.b1, config.b2, config.eps), optax.add_decayed_weights(config.weight_decay, mask), optax.scale_by_learning_rate(learning_rate))


def make_optimizer(config: Optimizer, learning_rate: Callable | float, labels: Any) -> optax.GradientTransformation:
    """An optax transformation: clipping by the global norm, then the update rule with decay on matrices alone."""
    mask = decays(labels)
    match config:
        case AdamW():
            rule = adamw(config, learning_rate, mask)
        case Lion():
            rule = optax.lion(learning_rate, config.b1, config.b2, weight_decay=config.weight_decay, mask=mask)
        case Adafactor():
            rule = optax.adafactor(learning_rate, decay_rate=config.decay_rate, multiply_by_parameter_scale=False, weight_decay_rate=config.weight_decay or None, weight_decay_mask=mask)
        case Muon():
            rule = muon(config, learning_rate, labels)
    return rule if config.clip is None else optax.chain(optax.clip_by_global_norm(config.clip), rule)
