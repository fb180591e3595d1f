"""The one train step, for every objective: gradient of a sum, divided once, one optimiser update; compiled, the state donated."""
from __future__ import annotations

import contextlib
import dataclasses as dc
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llmjax.core import ConfigError, DataError, nearest
from llmjax.core.platform import compiler_options
from llmjax.core.tree import merge
from llmjax.objectives import Mean, Objective
from llmjax.train.state import State, fetched, mesh_of, waiting

Metrics = dict[str, jax.Array]


def gradients(apply: Callable, objective: Objective, params: Any, batch: dict, frozen: Any, key: jax.Array, accumulate: int = 1) -> tuple[Any, Mean, dict[str, Mean]]:
    """-> (gradient of loss.total / loss.count over the whole batch, loss, metrics). With `accumulate` > 1 the rows are taken in that many parts, one after the other;
    totals, counts and gradients (float32) are added up and divided once: the large batch's result, whatever the weights."""
    base = frozen.get("base") if isinstance(frozen, dict) else None

    def total(params, part, key):
        whole = params if base is None else merge(params, base)
        loss, metrics = objective(apply, whole, part, frozen, key)
        return loss.total, (loss, metrics)

    grad = jax.grad(total, has_aux=True)
    if accumulate == 1:
        sums, (loss, metrics) = grad(params, batch, key)
    else:
        parts = jax.tree.map(lambda x: x.reshape(accumulate, x.shape[0] // accumulate, *x.shape[1:]), batch)

        def add(carry, part):
            new, said = grad(params, part[0], part[1])
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), carry, (new, said)), None
        shapes = jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], parts), key)
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), shapes)
        (sums, (loss, metrics)), _ = jax.lax.scan(add, zero, (parts, jax.random.split(key, accumulate)))
    scale = 1.0 / jnp.maximum(loss.count, 1e-9)
    return jax.tree.map(lambda g, p: (g * scale).astype(p.dtype), sums, params), loss, metrics


def make_step(apply: Callable, objective: Objective, optimizer: optax.GradientTransformation, *, accumulate: int = 1, skip: bool = False) -> Callable[..., tuple[State, Metrics]]:
    """-> step(state, batch, frozen=None, limit=None) -> (state, metrics): compiled; the state's buffers are donated, `frozen` never.

    apply: a model's `apply`. batch: dict of [B, T] arrays with the keys `objective.reads`; B a multiple of `accumulate`. frozen: None, or a dict with "base" (the weights that do
    not learn, None where `state.params` has them) and the models `objective.needs` names. skip: a step whose loss or gradient is not finite, or whose loss is above `limit`
    (a scalar), changes nothing but the step's number. metrics: float32 scalars: loss, grad_norm, tokens (what carries weight), those of the objective, and `skipped`.
    Raises DataError for a batch that lacks a key or does not divide, ConfigError where `frozen` lacks a model.
    """
    def step(state: State, batch: dict, frozen: Any, limit: jax.Array | None, places: Any = None) -> tuple[State, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        grads, loss, said = gradients(apply, objective, state.params, batch, frozen, key, accumulate)
        norm = optax.global_norm(grads)
        if places is not None:         # the moments wait in the host's memory until here
            state = dc.replace(state, opt_state=fetched(state.opt_state, places.opt_state))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new = dc.replace(state, step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state)
        metrics = {"loss": loss.value(), **{name: x.value() for name, x in said.items()}, "grad_norm": norm, "tokens": loss.count}
        if len(said) > 1:
            metrics["total_loss"] = loss.value()
        if skip:
            good = jnp.isfinite(loss.total) & jnp.isfinite(norm)
            if limit is not None:
                good &= metrics["loss"] <= limit
            kept = dc.replace(state, step=new.step)
            new = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, kept)
            metrics["skipped"] = 1.0 - good.astype(jnp.float32)
        return new, metrics

    compiled: dict[Any, Any] = {}      # one program per batch shape

    def program(state: State, batch: dict, frozen: Any = None, limit: Any = None) -> Any:
        """The jitted step for these arguments, arrays or shapes; under their mesh."""
        offloaded = waiting(state)
        places = None if mesh_of(state.params) is None and offloaded is None else (jax.tree.map(lambda x: x.sharding, state), None)
        make = functools.partial(jax.jit, functools.partial(step, places=offloaded), donate_argnums=0, out_shardings=places)
        return make(compiler_options=compiler_options(make().trace(state, batch, frozen, limit)))

    def run(state: State, batch: dict, frozen: Any = None, limit: Any = None) -> tuple[State, Metrics]:
        check(objective, batch, frozen, accumulate)
        mesh = mesh_of(state.params)
        shapes = tuple((name, batch[name].shape) for name in sorted(batch))
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            if shapes not in compiled:
                compiled[shapes] = program(state, batch, frozen, limit)
            return compiled[shapes](state, batch, frozen, limit)
    run.function = step                # type: ignore[attr-defined]     # uncompiled, for those who compile it themselves
    run.program = program              # type: ignore[attr-defined]     # to lower and compile for devices that are not there
    return run


def check(objective: Objective, batch: dict, frozen: Any, accumulate: int) -> None:
    for name in objective.reads:
        if name not in batch:
            raise DataError(f"{type(objective).__name__} reads batch[{name!r}], which is not there" + nearest(name, batch))
    rows = next(iter(batch.values())).shape[0]
    if rows % accumulate:
        raise DataError(f"a batch of {rows} rows cannot be taken in accumulate={accumulate} equal parts")
    for name in objective.needs:
        if not isinstance(frozen, dict) or name not in frozen:
            raise ConfigError(f"{type(objective).__name__} needs frozen[{name!r}]")
