"""Where arrays lie: the device mesh, the ordered rules from logical axes to mesh axes, and what both make of a tree of labels.

Mesh axes: data fsdp tensor sequence expert stage. Logical axes are the words of the labels, and `batch` and `length` for activations.
"""
from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llmjax.core.errors import ConfigError, ShardingError, nearest
from llmjax.core.labels import Label
from llmjax.core.platform import partitioned
from llmjax.core.tree import flatten, map_named

MESH_AXES = ("stage", "data", "fsdp", "expert", "sequence", "tensor")      # outermost first: neighbours on the last axes talk most
Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]
RULES: Rules = (
    ("batch", ("data", "fsdp", "stage", "expert")),
    ("length", "sequence"),
    ("residual", ("sequence", "tensor")),      # the length of the residual stream, between the mixers and feed-forwards
    ("vocab", "tensor"),
    ("embed", "fsdp"),
    ("source", "fsdp"),                # an encoder's output, as cross-attention reads it
    ("factor", None),
    ("label", None),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("expert", "expert"),
    ("layer", "stage"),
    ("head_dim", None),
    ("latent", None),
    ("norm", None),
    ("router", None),
    ("position", None),
    ("width", None),
)


@dc.dataclass(frozen=True)
class Layout:
    """The mesh's axis sizes (at most one None: as many as there are devices left) and the ordered rules; the first rule that names a logical axis decides."""
    data: int | None = None
    fsdp: int | None = 1
    tensor: int | None = 1
    sequence: int | None = 1
    expert: int | None = 1
    stage: int | None = 1
    microbatches: int | None = None      # parts of a batch that pass through the stages one after the other; None: as many as there are stages
    dcn: Literal["data", "fsdp", "stage"] = "data"      # the axis that goes across slices, where the devices are of several
    interleave: int = 1                  # chunks of layers a stage holds: 1 is GPipe, more make the idle share smaller and the traffic larger
    ticks: Literal["nested", "flat"] = "nested"      # an interleaved tick is made again in the backward pass, and its layers once more, one at a time; flat: they are not, and are all kept meanwhile
    rules: Rules = RULES

    def __post_init__(self):
        check_rules(self.rules)
        if self.stage == 1 and (self.microbatches, self.interleave) != (None, 1):
            raise ConfigError("layout.microbatches and layout.interleave say how a pipeline runs; set layout.stage too")
        for name in ("microbatches", "interleave"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"layout.{name}={value!r}: a whole number from 1 is wanted")
        if self.ticks not in ("nested", "flat"):
            raise ConfigError(f"layout.ticks={self.ticks!r}: 'nested' or 'flat' is wanted")
        if self.ticks == "flat" and self.interleave == 1:
            raise ConfigError("layout.ticks=flat is about interleaved stages, whose ticks are made again; set layout.interleave too")
        if self.interleave > 1 and self.stage and (self.microbatches or self.stage) % self.stage:
            raise ConfigError(f"layout.microbatches={self.microbatches}: with layout.interleave={self.interleave} a multiple of layout.stage={self.stage} is wanted")

    def sizes(self) -> dict[str, int | None]:
        return {axis: getattr(self, axis) for axis in MESH_AXES}


def check_rules(rules: Rules) -> None:
    """Raises ConfigError for a rule whose logical axis nothing has or whose mesh axis does not exist."""
    known = [name for name, _ in RULES]
    for name, axes in rules:
        if name not in known:
            raise ConfigError(f"layout.rules: no weight or activation has the axis {name!r}" + nearest(name, known))
        for axis in mesh_axes(axes):
            if axis not in MESH_AXES:
                raise ConfigError(f"layout.rules: {name!r} is laid on the mesh axis {axis!r}, which does not exist" + nearest(axis, MESH_AXES))


def mesh_axes(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def axis_sizes(sizes: Mapping[str, int | None], count: int) -> dict[str, int]:
    """The axes of a mesh of `count` devices, in the order of MESH_AXES, the one that is None filled in. Raises ShardingError."""
    wrong = [f"{k}={v!r}" for k, v in sizes.items() if v is not None and (not isinstance(v, int) or isinstance(v, bool) or v < 1)]
    if wrong:
        raise ShardingError(f"mesh: {', '.join(wrong)}: sizes are whole numbers from 1, or None for 'what is left'")
    unknown = [k for k, v in sizes.items() if v is None]
    if len(unknown) > 1:
        raise ShardingError(f"mesh: {' and '.join(unknown)} are both None; at most one axis can be inferred")
    product = math.prod(v for v in sizes.values() if v is not None)
    given = " × ".join(f"{k}={v}" for k, v in sizes.items() if v not in (None, 1)) or "all axes 1"
    if count % product or (not unknown and product != count):
        raise ShardingError(f"mesh: {given} needs {'a multiple of ' if unknown else ''}{product} devices, there are {count}; change an axis, or start with more devices")
    if unknown:
        sizes = {**sizes, unknown[0]: count // product}
    return {axis: sizes[axis] or 1 for axis in MESH_AXES}


def make_mesh(data: int | None = None, fsdp: int | None = 1, tensor: int | None = 1, sequence: int | None = 1, expert: int | None = 1, stage: int | None = 1, *,
              devices: Sequence[Any] | None = None, dcn: str = "data") -> Mesh:
    """A mesh of all devices (or of those given) with six named axes; one axis that is None takes the devices the others leave. Raises ShardingError.

    dcn: where the devices are of several slices (each with its own fast network), the axis whose outer part goes from slice to slice.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = axis_sizes(dict(stage=stage, data=data, fsdp=fsdp, expert=expert, sequence=sequence, tensor=tensor), len(devices))
    shape = [sizes[axis] for axis in MESH_AXES]
    if set(devices) < set(jax.devices()):          # a few chosen ones, which need be no torus
        placed = np.asarray(devices).reshape(shape)
    else:
        slices = sorted({slice_of(d) for d in devices})
        check_slices(len(slices), sizes, dcn)
        placed = hybrid(devices, shape, MESH_AXES.index(dcn), slices)
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def check_slices(count: int, sizes: Mapping[str, int], dcn: str) -> None:
    """Raises ShardingError where the axis that goes across the slices is not a multiple of them."""
    if sizes[dcn] % count:
        raise ShardingError(f"mesh: {count} slices do not divide {dcn}={sizes[dcn]}, the axis that goes across them; make it a multiple, or choose another layout.dcn")


def slice_of(device: Any) -> int:
    """Which of several slices a device is of."""
    return getattr(device, "slice_index", 0) or 0


def hybrid(devices: Sequence[Any], shape: Sequence[int], axis: int, slices: Sequence[int]) -> np.ndarray:
    """The devices in the mesh's shape, slice after slice along one axis; within a slice as its own network wants them (an axis may be a part of a dimension of the torus)."""
    inner = [n // len(slices) if i == axis else n for i, n in enumerate(shape)]
    parts = [[d for d in devices if slice_of(d) == s] for s in slices]
    if len({len(part) for part in parts}) > 1:
        raise ShardingError(f"mesh: the slices have {', '.join(str(len(part)) for part in parts)} devices; all must have the same number")
    return np.concatenate([mesh_utils.create_device_mesh(inner, part, allow_split_physical_axes=True) for part in parts], axis)


def from_layout(layout: Layout, devices: Sequence[Any] | None = None) -> Mesh:
    return make_mesh(**layout.sizes(), devices=devices, dcn=layout.dcn)


def partition(axes: Sequence[str | None], shape: Sequence[int], mesh: Any, rules: Rules, name: str) -> PartitionSpec:
    """The PartitionSpec of one array: each dimension's rule, left to right; a mesh axis serves one dimension. Raises ShardingError naming parameter, dimension, axis and a fix."""
    spec: list[Any] = []
    used: set[str] = set()
    table: dict[str, Any] = {}
    for rule, target in rules:
        table.setdefault(rule, target)
    for dim, (axis, length) in enumerate(zip(axes, shape)):
        if axis is None:
            spec.append(None)
            continue
        if axis not in table:
            raise ShardingError(f"{name}: no rule lays the axis {axis!r}; add ({axis!r}, None) to layout.rules")
        chosen = tuple(a for a in mesh_axes(table[axis]) if mesh.shape[a] > 1 and a not in used)
        parts = math.prod(mesh.shape[a] for a in chosen)
        if length % parts:
            raise ShardingError(f"{name}: dimension {dim} ({axis}, length {length}) does not divide over {' × '.join(f'{a}={mesh.shape[a]}' for a in chosen)}; "
                                f"choose a divisor of {length}, or replace the rule by ({axis!r}, None)")
        used.update(chosen)
        spec.append(None if not chosen else chosen[0] if len(chosen) == 1 else chosen)
    while spec and spec[-1] is None:
        spec.pop()
    return PartitionSpec(*spec)


def shardings(labels: Any, shapes: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """A NamedSharding per weight. labels: tree of Label; shapes: the same tree with `.shape` leaves. Raises ShardingError, also when a mesh axis serves no weight."""
    out = map_named(lambda name, x, label: NamedSharding(mesh, partition(label.axes, x.shape, mesh, rules, name)), shapes, labels)
    used = {a for s in jax.tree.leaves(out) for entry in s.spec for a in mesh_axes(entry)}
    for axis in ("fsdp", "tensor", "expert", "stage"):
        if mesh.shape[axis] > 1 and axis not in used:
            raise ShardingError(f"layout.{axis}={mesh.shape[axis]}: no weight of this model has an axis laid on {axis!r}; set layout.{axis}=1 and use data or fsdp")
    return out


def batch_sharding(mesh: Mesh, ndim: int = 2, rules: Rules = RULES, lead: int = 0) -> NamedSharding:
    """How a batch array [.., B, T] lies: B over the axes of the rule for `batch`, after `lead` unsharded dimensions."""
    axes = dict(reversed(rules))
    batch = tuple(a for a in mesh_axes(axes["batch"]) if mesh.shape[a] > 1)
    length = tuple(a for a in mesh_axes(axes["length"]) if mesh.shape[a] > 1)
    spec = [None] * lead + [batch or None] + ([length or None] if ndim > lead + 1 else [])
    return NamedSharding(mesh, PartitionSpec(*spec))


def batch_parts(mesh: Mesh, rules: Rules = RULES) -> int:
    """Over how many parts the batch dimension is divided."""
    return math.prod(mesh.shape[a] for a in mesh_axes(dict(reversed(rules))["batch"]))


def microbatches(layout: Layout) -> int:
    """How many microbatches pass through the stages of the ambient mesh."""
    return layout.microbatches or free_axes("layer", layout.rules)[2]


def ticks(layout: Layout, stages: int) -> int:
    """How often a pipeline hands on."""
    return (layout.microbatches or stages) * layout.interleave + stages - 1


def bubble(layout: Layout, stages: int) -> float:
    """The share of a pipeline's ticks in which a stage waits."""
    return (stages - 1) / ticks(layout, stages)


def free_axes(name: str, rules: Rules = RULES) -> tuple[Any, tuple[str, ...], int]:
    """-> (the ambient mesh, the axes the rule for `name` lays it on that have several devices and are not manual already, how many parts that makes)."""
    mesh = jax.sharding.get_abstract_mesh()
    table = dict(reversed(rules))
    axes: tuple[str, ...] = () if mesh.empty else tuple(a for a in mesh_axes(table[name]) if mesh.shape[a] > 1 and a not in mesh.manual_axes)
    return mesh, axes, math.prod(mesh.shape[a] for a in axes)


def check_batch(batch_size: int, accumulate: int, context: int, mesh: Mesh, layout: Layout) -> None:
    """Raises ConfigError where the rows of a step, or the tokens of a row, do not divide as the mesh and the layout want them."""
    parts = batch_parts(mesh, layout.rules)
    if batch_size % (parts * accumulate):
        raise ConfigError(f"batch_size={batch_size} does not divide over {parts} parts of the mesh in accumulate={accumulate} steps; change batch_size or the layout")
    stages, experts = mesh.shape["stage"], mesh.shape["expert"]
    rows, waves = batch_size // accumulate // (mesh.shape["data"] * mesh.shape["fsdp"]), layout.microbatches or stages
    if stages > 1 and rows % (waves * experts):
        raise ConfigError(f"batch_size={batch_size}: {rows} rows pass through each pipeline at a time, which do not divide into {waves} microbatches (over expert={experts}); "
                          "change batch_size, accumulate or layout.microbatches")
    pieces = math.prod(mesh.shape[a] for a in mesh_axes(dict(reversed(layout.rules))["length"]))
    if pieces > 1 and context % (2 * pieces):
        raise ConfigError(f"context={context} is not a multiple of {2 * pieces}, two chunks for each of layout.sequence={pieces}; change context or the layout")


def constrain(x: jax.Array, axes: str, rules: Rules = RULES) -> jax.Array:
    """Pins an activation's layout on the ambient mesh (`jax.set_mesh`); without a mesh, or on one device, x itself: nothing enters the program.

    axes: a word per dimension, "." for a dimension that is not divided: "batch length ." Of a rule's axes as many are used, from the first on, as divide the dimension.
    """
    if not partitioned():
        return x
    spec: list[Any] = []
    for word, length in zip(axes.split(), x.shape, strict=True):
        chosen: tuple[str, ...]
        mesh, chosen, _ = (jax.sharding.get_abstract_mesh(), (), 1) if word == "." else free_axes(word, rules)
        while chosen and length % math.prod(mesh.shape[a] for a in chosen):
            chosen = chosen[:-1]
        spec.append(chosen or None)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def explain_sharding(labels: Any, shapes: Any, mesh: Mesh, rules: Rules = RULES) -> str:
    """A table, one line per weight: name, label, shape, which mesh axis divides which dimension, and the shape one device holds."""
    placed = flatten(shardings(labels, shapes, mesh, rules))
    rows = [("weight", "label", "shape", "laid on", "per device")]
    names: dict[str, Label] = flatten(labels)
    for name, x in flatten(shapes).items():
        sharding = placed[name]
        laid = " ".join("-" if e is None else "+".join(mesh_axes(e)) for e in (*sharding.spec, *[None] * (len(x.shape) - len(sharding.spec))))
        rows.append((name, str(names[name]), "×".join(map(str, x.shape)), laid, "×".join(map(str, sharding.shard_shape(x.shape)))))
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows)
