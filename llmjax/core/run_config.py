"""How a run is made: computing choices, optimiser, schedule and the run itself. The only home of their defaults.

`RunConfig.data` is a dataclass of the data room and `objective` one of the objectives room; both are held without being known here.
Durations are steps (500), a share of the run ("3%") or passes over the data ("2ep").
"""
from __future__ import annotations

import dataclasses as dc
import re
from typing import Any, Literal

from llmjax.core.errors import ConfigError
from llmjax.core.mesh import Layout
from llmjax.core.model_config import ModelConfig
from llmjax.core.override import check_fields

Duration = int | str
DType = Literal["float32", "bfloat16", "float16"]


@dc.dataclass(frozen=True)
class Compute:
    """How a model is computed; but for `capacity` the answer does not depend on it beyond rounding.

    remat: which activations the backward pass recomputes: None (keeps all), "full" (keeps a layer's input), "offload" (keeps it in the host's memory), "dots" (keeps matrix products'
    results).
    """
    dtype: DType = "bfloat16"
    param_dtype: DType = "float32"
    attention: Literal["auto", "reference", "blockwise", "cudnn", "splash"] = "auto"
    sequence: Literal["auto", "ring", "ulysses"] = "auto"      # how attention goes over a row that layout.sequence divides
    experts: Literal["auto", "blocks", "ragged", "loop"] = "auto"      # the grouped product of a mixture of experts
    dispatch: Literal["auto", "gather", "exchange"] = "auto"           # how its tokens reach experts on other devices (models/dispatch.py)
    capacity: float | None = None      # rows an expert takes of a device's tokens, over its even share; what is over is dropped. None: nothing is
    remat: Literal["full", "offload", "dots"] | None = None
    scan: bool = True                  # weights of repeated layers stacked and scanned: small programs; False: every layer apart
    unroll: bool | None = None         # run the scan as straight code where there is no cache; None: on a CPU alone, where that is a quarter faster and compiles longer

    def __post_init__(self):
        check_fields(self)


@dc.dataclass(frozen=True)
class AdamW:
    """Adam with decoupled decay (Loshchilov & Hutter 2019). Decay falls on matrices alone (labels with an arrow)."""
    learning_rate: float = 3e-4
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float | None = 1.0           # global gradient norm
    moments: Literal["float32", "int8"] = "float32"       # how both moments are kept between steps; int8: block-wise dynamic codes (Dettmers et al. 2022)

    def __post_init__(self):
        check_fields(self)


@dc.dataclass(frozen=True)
class Adafactor:
    """Factored second moments (Shazeer & Stern 2018)."""
    learning_rate: float = 1e-3
    decay_rate: float = 0.8
    weight_decay: float = 0.0
    clip: float | None = 1.0


@dc.dataclass(frozen=True)
class Lion:
    """Sign of an interpolated momentum (Chen et al. 2023)."""
    learning_rate: float = 1e-4
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.3
    clip: float | None = 1.0


@dc.dataclass(frozen=True)
class Muon:
    """Momentum orthogonalised by Newton–Schulz (Jordan et al. 2024) on hidden matrices, AdamW on embeddings, head and vectors; the labels decide."""
    learning_rate: float = 2e-2
    momentum: float = 0.95
    iterations: int = 5
    weight_decay: float = 0.0
    adam: AdamW = AdamW()
    clip: float | None = 1.0


Optimizer = AdamW | Adafactor | Lion | Muon


@dc.dataclass(frozen=True)
class WarmupCosine:
    """Linear from 0 over `warmup`, then half a cosine down to `final` times the peak."""
    warmup: Duration = "3%"
    final: float = 0.1


@dc.dataclass(frozen=True)
class WarmupStableDecay:
    """Linear up over `warmup`, constant, then linear down to `final` times the peak over the last `decay` (Hu et al. 2024, MiniCPM)."""
    warmup: Duration = "3%"
    decay: Duration = "20%"
    final: float = 0.0


@dc.dataclass(frozen=True)
class Linear:
    """Linear up over `warmup`, then linear down to `final` times the peak at the end."""
    warmup: Duration = "3%"
    final: float = 0.0


@dc.dataclass(frozen=True)
class Constant:
    """Linear up over `warmup`, then constant."""
    warmup: Duration = 0


Schedule = WarmupCosine | WarmupStableDecay | Linear | Constant


@dc.dataclass(frozen=True)
class Guard:
    """What a loss that is not a number, or one that jumps, does to a run: the step is skipped (the update is dropped, the run goes on) or the run stops with its last
    checkpoint kept. A spike is a loss more than `spike` standard deviations above its running mean; None watches for non-finite numbers alone."""
    policy: Literal["stop", "skip"] = "stop"
    spike: float | None = None
    patience: int = 10                 # skipped steps in a row that stop the run all the same

    def __post_init__(self):
        check_fields(self)


@dc.dataclass(frozen=True)
class Distributed:
    """How long, in seconds, the processes of a run wait for each other before one line says which is missing. One process waits for nobody."""
    start_timeout: float = 300.0       # for all to come when the run starts
    heartbeat_timeout: float = 100.0   # without a sign of life of a process (jax's own is the same)
    step_timeout: float | None = 1800.0        # in one step, evaluation and checkpoints apart; None: no limit

    def __post_init__(self):
        check_fields(self)
        for field in dc.fields(self):
            value = getattr(self, field.name)
            if value is not None and not value > 0:
                raise ConfigError(f"distributed.{field.name}={value!r}: seconds above 0 are wanted")


@dc.dataclass(frozen=True)
class Replicas:
    """Copies of the train state on each host's own disk, between checkpoints (checkpoint/replicas.py). folder: there; "{process}" in it is the process's number. A restart goes on from the newest
    copy or checkpoint, whichever is newer."""
    folder: str
    every: Duration = 100

    def __post_init__(self):
        check_fields(self)
        if not self.folder:
            raise ConfigError("replicas.folder='': a folder on the hosts' own disks is wanted")


@dc.dataclass(frozen=True)
class RunConfig:
    """One training run. `data`, `objective`: see the module's docstring. `context` and `batch_size` are tokens per row and rows per step over all devices."""
    model: ModelConfig
    data: Any
    objective: Any
    optimizer: Optimizer = AdamW()
    schedule: Schedule = WarmupCosine()
    layout: Layout = Layout()
    compute: Compute = Compute()
    guard: Guard = Guard()
    steps: Duration = 1000
    batch_size: int = 32
    accumulate: int = 1
    context: int = 1024
    seed: int = 0
    log_every: Duration = 10
    eval_every: Duration | None = "25%"
    checkpoint_every: Duration | None = "25%"
    keep: int = 3                      # how many checkpoints stay
    replicas: Replicas | None = None   # copies on the hosts' own disks
    offload_optimizer: bool = False    # the optimiser's state waits in the host's memory between its uses
    tensorboard: bool = False
    sample: str | None = None          # a prompt to continue when the run ends
    distributed: Distributed = Distributed()

    def __post_init__(self):
        for name in ("batch_size", "accumulate", "context", "keep"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r}: a whole number from 1 is wanted")
        if self.batch_size % self.accumulate:
            raise ConfigError(f"batch_size={self.batch_size} is not a multiple of accumulate={self.accumulate}")
        if self.context > self.model.context:
            raise ConfigError(f"context={self.context} is longer than the model's own, model.context={self.model.context}")
        for name in ("steps", "log_every", "eval_every", "checkpoint_every"):
            check_duration(getattr(self, name), name)
        if self.replicas is not None:
            check_duration(self.replicas.every, "replicas.every")
        if isinstance(self.steps, str) and self.steps.endswith("%"):
            raise ConfigError(f"steps={self.steps!r}: a share of the run needs the run's length; use steps or epochs such as '2ep'")


def check_duration(value: Duration | None, name: str) -> None:
    ok = value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0) or (isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?(%|ep)", value))
    if not ok:
        raise ConfigError(f"{name}={value!r}: a duration is a number of steps (500), a share of the run ('3%') or epochs ('2ep')")


def in_steps(value: Duration, total: int | None, steps_per_epoch: int | None, name: str) -> int:
    """A duration as a whole number of steps (at least 1 for a positive share). Raises ConfigError where its unit is not known here."""
    check_duration(value, name)
    if isinstance(value, int):
        return value
    number, share = (float(value[:-1]), True) if value.endswith("%") else (float(value[:-2]), False)
    whole = total if share else steps_per_epoch
    if whole is None:
        raise ConfigError(f"{name}={value!r}: the {'length of the run' if share else 'size of an epoch'} is not known here; give steps")
    return max(1, round(number * whole / (100 if share else 1))) if number else 0
