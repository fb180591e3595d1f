"""A run on chips that are not there: its mesh, its model and its train state as shapes with shardings. Nothing is computed and no device is asked for."""
from __future__ import annotations

import dataclasses as dc
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from llmjax import models, train
from llmjax.core import ConfigError, RunConfig, batch_parts, batch_sharding, check_batch, shardings
from llmjax.core.mesh import MESH_AXES, axis_sizes, check_slices
from llmjax.core.model_config import LanguageHead
from llmjax.core.run_config import in_steps
from llmjax.plan.chips import Topology

BATCH = {"tokens": jnp.int32, "targets": jnp.int32, "positions": jnp.int32, "segment_ids": jnp.int32, "weights": jnp.float32}      # what data.Dataset gives


@dc.dataclass(frozen=True)
class Job:
    """config, with every axis of its layout a number. topology: None where only the number of devices is known. mesh: abstract; params and state: shapes with shardings on it."""
    config: RunConfig
    topology: Topology | None
    mesh: AbstractMesh
    model: models.Decoder
    labels: Any
    params: Any
    optimizer: Any

    @property
    def devices(self) -> int:
        return self.mesh.size

    @property
    def parts(self) -> int:
        """Over how many parts the batch is divided."""
        return batch_parts(self.mesh, self.config.layout.rules)            # type: ignore[arg-type]

    @property
    def rows(self) -> int:
        """Rows a device holds at a time."""
        return self.config.batch_size // self.parts // self.config.accumulate

    @property
    def steps(self) -> int | None:
        """None where the run's length is in passes over data that are not here."""
        return self.config.steps if isinstance(self.config.steps, int) else None

    def over(self, axis: str) -> int:
        """Into how many parts the rules divide a logical axis."""
        from llmjax.core.mesh import mesh_axes
        size = 1
        for a in mesh_axes(dict(reversed(self.config.layout.rules))[axis]):
            size *= self.mesh.shape[a]
        return size

    def state(self) -> train.State:
        return train.abstract(self.params, self.optimizer, jax.eval_shape(lambda: jax.random.key(0)), offload=self.config.offload_optimizer)

    def batch(self, mesh: Any) -> dict[str, jax.ShapeDtypeStruct]:
        shape, place = (self.config.batch_size, self.config.context), batch_sharding(mesh, 2, self.config.layout.rules)
        return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, dtype in BATCH.items()}


def make(config: RunConfig, topology: Topology | None, mesh: Any = None) -> Job:
    """The job of a configuration. mesh: a real one, to compile for; else it is abstract and has the topology's devices, or as many as the layout names.
    Raises ConfigError, ShardingError for what `llmjax train` would refuse."""
    if config.model.encoder or not isinstance(config.model.head, LanguageHead):
        raise ConfigError("a plan is made of a decoder with the language head; this model is another")
    wanted = config.layout.sizes()
    count = topology.devices if topology else _product(wanted)
    sizes: dict[str, Any] = axis_sizes(wanted, count)
    check_slices(topology.slices if topology else 1, sizes, config.layout.dcn)
    if mesh is None:
        kind = AbstractDevice("TPU v5p" if topology is None or topology.is_tpu else "NVIDIA H100", 1, "tpu" if topology is None or topology.is_tpu else "gpu")
        mesh = AbstractMesh(tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes), abstract_device=kind)
    config = dc.replace(config, layout=dc.replace(config.layout, **sizes))
    check_batch(config.batch_size, config.accumulate, config.context, mesh, config.layout)
    model = models.Decoder(config.model, config.compute, config.layout)
    labels, shapes = models.labels(model), models.abstract_params(model)
    places = shardings(labels, shapes, mesh, config.layout.rules)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)
    total = config.steps if isinstance(config.steps, int) else 10_000      # its value is a constant of the program, whose size does not depend on it
    schedule = train.make_schedule(config.schedule if _in_steps(config) else dc.replace(config.schedule, warmup="1%"), config.optimizer.learning_rate, total)
    return Job(config, topology, mesh, model, labels, params, train.make_optimizer(config.optimizer, schedule, labels))


def _in_steps(config: RunConfig) -> bool:
    try:
        in_steps(config.schedule.warmup, 1, None, "warmup")
    except ConfigError:
        return False
    return True


def _product(sizes: dict[str, int | None]) -> int:
    count = 1
    for size in sizes.values():
        count *= size or 1
    return count
