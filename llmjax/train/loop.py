"""The one loop: steps, logging, evaluation, checkpoints, the guard, and a clean end on SIGTERM. It knows no model, no objective and no data format."""
from __future__ import annotations

import contextlib
import dataclasses as dc
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from llmjax.core import CheckpointError
from llmjax.train.guard import TrainingStopped, Watch
from llmjax.train.loggers import Console, Logger
from llmjax.train.state import State


class Batches(Protocol):
    """An endless iterator of batches whose place can be kept: a Grain iterator."""
    def __next__(self) -> dict[str, np.ndarray]: ...
    def get_state(self) -> Any: ...


class CheckpointStore(Protocol):
    def save(self, step: int, state: Any, extra: dict | None = None, wait: bool = False) -> None: ...


@dc.dataclass(frozen=True)
class Loop:
    """What a run does and how often; steps are counted from 1. An interval of None is never. `evaluate(params) -> metrics`; `place` puts a batch on the devices.
    flops_per_token and peak_flops (FLOP/s of all devices) make the MFU; tokens_per_step counts every position of a batch, padding too."""
    step: Callable[..., tuple[State, dict[str, jax.Array]]]
    batches: Batches
    store: CheckpointStore
    total: int
    log_every: int
    eval_every: int | None
    checkpoint_every: int | None
    evaluate: Callable[[Any], dict[str, float]] | None
    loggers: tuple[Logger, ...]
    console: Console
    watch: Watch
    place: Callable[[dict[str, np.ndarray]], dict[str, jax.Array]]
    tokens_per_step: int
    flops_per_token: float
    peak_flops: float
    learning_rate: Callable[[int], float]
    frozen: Any = None
    replicas: CheckpointStore | None = None      # where copies go between checkpoints, every `replicate_every` steps
    replicate_every: int = 1
    enter: Callable[[int | None], None] = lambda step: None      # told which step begins; None: something that may take long


class Interrupted:
    """While it is entered, SIGTERM and Ctrl-C set `now` instead of ending the process; a second Ctrl-C ends it.

    Of several processes one may be told to stop: jax's coordination service, which has taken over SIGTERM there, carries it to the others and finds a step that none is past.
    """

    def __init__(self):
        self.now: str | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Interrupted:
        if threading.current_thread() is threading.main_thread():
            self.before = {sig: signal.signal(sig, self.note) for sig in ((signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGTERM, signal.SIGINT))}
        return self

    def note(self, sig: int, _frame: Any) -> None:
        if self.now and sig == signal.SIGINT:
            raise KeyboardInterrupt
        self.now = signal.Signals(sig).name
        if jax.process_count() > 1:
            signal.raise_signal(signal.SIGTERM)

    def stops(self, step: int) -> bool:
        """Whether to stop after `step` steps: to be asked once after each, by all processes, which get the same answer."""
        if jax.process_count() == 1:
            return self.now is not None
        if multihost_utils.reached_preemption_sync_point(step):
            self.now = self.now or signal.SIGTERM.name
            return True
        return False

    def __exit__(self, *_: Any) -> None:
        for sig, handler in self.before.items():
            signal.signal(sig, handler)


def run(loop: Loop, state: State) -> tuple[State, bool]:
    """From state.step to loop.total. -> (state, whether the run came to its end); False: a signal asked to stop, and everything is saved.

    A step's metrics are read while the next one runs. Raises TrainingStopped where the guard ends the run (no checkpoint is written then: the last one is whole).
    """
    done = int(state.step)
    waiting: tuple[int, dict[str, jax.Array]] | None = None
    clock = Clock(loop)

    def settle() -> None:
        nonlocal waiting
        if waiting is not None:
            step, metrics = waiting
            waiting = None
            report(loop, clock, step, {k: float(v) for k, v in metrics.items()})

    stopped = False
    with Interrupted() as interrupted:
        batch, place = loop.place(next(loop.batches)) if done < loop.total else None, None
        while done < loop.total and not (stopped := interrupted.stops(done)):
            loop.enter(done + 1)
            limit: Any = loop.watch.limit()
            if limit is not None:
                settle()
                limit = np.float32(loop.watch.limit())
            place = loop.batches.get_state()
            state, metrics = loop.step(state, batch, loop.frozen, limit)
            done += 1
            settle()
            waiting = done, metrics
            evaluating = loop.evaluate is not None and (done == loop.total or (loop.eval_every and done % loop.eval_every == 0))
            saving = done == loop.total or (loop.checkpoint_every and done % loop.checkpoint_every == 0)
            copying = loop.replicas is not None and not saving and done % loop.replicate_every == 0
            if saving or evaluating or copying:
                settle()
                loop.enter(None)
            if saving or copying:
                save(loop, done, state, place, copying)
            if evaluating:
                with clock.paused():
                    found = {f"eval_{k}": v for k, v in loop.evaluate(state.params).items()}      # type: ignore[misc]
                for log in loop.loggers:
                    log(done, found)
            if done < loop.total:
                batch = loop.place(next(loop.batches))
        settle()
        loop.enter(None)
        if stopped:
            save(loop, done, state, place)
            where = f"saved at step {done} of {loop.total}" if place is not None else "stopped before a step was done"
            loop.console.say(f"{interrupted.now}: {where}; start the same command again to go on")
    return state, done >= loop.total


def save(loop: Loop, done: int, state: State, place: Any, copying: bool = False) -> None:
    """`place` is the loader's state after the batch of step `done` was taken; None: nothing was done since the last checkpoint. copying: to this host's own disk."""
    if place is None:
        return
    try:
        store = loop.replicas if copying else loop.store
        assert store is not None
        store.save(done, state, {"loader": place, "watch": loop.watch.state()})
    except CheckpointError as error:
        if jax.process_count() > 1 and not copying:    # the others have this checkpoint, or wait for it
            raise
        loop.console.say(f"step {done}: {error}; training goes on")


class Clock:
    """Tokens per second and time left, over what was done since the last look; evaluation does not count."""

    def __init__(self, loop: Loop):
        self.last: int | None = None
        self.loop, self.since, self.apart = loop, time.perf_counter(), 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.apart += time.perf_counter() - began

    def look(self, step: int) -> dict[str, float]:
        """Speed over the steps since the last call, the first step of a process (which compiles) left out."""
        now = time.perf_counter()
        spent, steps = now - self.since - self.apart, step - (self.last or step)
        self.since, self.apart, self.last = now, 0.0, step
        if steps <= 0 or spent <= 0:
            return {}
        rate = steps * self.loop.tokens_per_step / spent
        return {"tokens_per_second": rate, "mfu": rate * self.loop.flops_per_token / self.loop.peak_flops, "seconds_left": (self.loop.total - step) * spent / steps}


def report(loop: Loop, clock: Clock, step: int, metrics: dict[str, float]) -> None:
    """Asks the guard, then logs."""
    loop.console.tick()
    if clock.last is None:
        clock.look(step)
    try:
        told = loop.watch.look(step, metrics["loss"], bool(metrics.get("skipped")) or not math.isfinite(metrics["grad_norm"]))
    except TrainingStopped:
        for log in loop.loggers:
            log(step, metrics)
        raise
    if told:
        loop.console.say(told)
    if step == 1 or step % loop.log_every == 0 or step == loop.total:
        metrics = {**metrics, "learning_rate": float(loop.learning_rate(step - 1)), **clock.look(step), **memory()}
        for log in loop.loggers:
            log(step, metrics)


def memory() -> dict[str, float]:
    """The most memory a device of this process has had in use, in bytes, where the backend tells; on a CPU the process's own peak."""
    found = [s["peak_bytes_in_use"] for d in jax.local_devices() if (s := d.memory_stats()) and "peak_bytes_in_use" in s]
    if found:
        return {"memory_peak_bytes": float(max(found))}
    try:
        import resource
    except ImportError:                # not on Windows
        return {}
    return {"memory_peak_bytes": float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)}

