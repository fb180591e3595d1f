"""Copies of a run's state on the hosts' own disks, between its checkpoints: quick to write, and enough to go on from after a preemption, also where some hosts come back with empty disks.

Every process writes the pieces that its devices hold. Where a state is held more than once (over the data axis, say from slice to slice), processes that hold the same pieces stand in
for each other: one that has lost its copy gets the pieces over the devices' own network. Nothing goes through shared storage (as in Orbax's emergency checkpoints).

A copy is FOLDER/RUN/STEP/PIECES.safetensors and, written last, PIECES.json; PIECES is a hash of which pieces of which arrays these are, so a copy made on another mesh is told from this run's.
"""
from __future__ import annotations

import dataclasses as dc
import hashlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from llmjax.checkpoint import safetensors_file
from llmjax.checkpoint.store import describe, flat_state, full_disk, typed
from llmjax.checkpoint.store import placed as place_of
from llmjax.checkpoint.table import Export
from llmjax.core.distributed import exchange
from llmjax.core.errors import CheckpointError
from llmjax.core.tree import path_name

KEEP = 2                               # the newest; the one before it stays while a copy is being written


@dc.dataclass(frozen=True)
class Found:
    """A step all of whose pieces are somewhere. holders: the process that gives each set of pieces; whole: whether every process has its own."""
    step: int
    holders: frozenset[int]
    whole: bool


class Replicas:
    """The copies of one run in `folder` of this host ("{process}" in it is the process's number). `run` names the run: another run's copies are never read."""

    def __init__(self, folder: str, run: str):
        self.folder = pathlib.Path(folder.replace("{process}", str(jax.process_index()))).expanduser().absolute() / run
        with full_disk(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._writer = ThreadPoolExecutor(1)
        self._last: Future | None = None

    def save(self, step: int, state: Any, extra: dict[str, Any] | None = None, wait: bool = False) -> None:
        """Copies this process's pieces off its devices, and writes them behind. Raises CheckpointError where the copy before this one could not be written."""
        self.wait()
        flat = {name: x if isinstance(x, jax.Array) else jnp.asarray(x) for name, x in flat_state(state).items()}
        for x in flat.values():
            x.copy_to_host_async()
        held = {piece(name, shard.index, x.shape): np.array(shard.data) for name, x in flat.items() for shard in x.addressable_shards}
        told = {"arrays": describe(flat), "extra": extra or {}}
        self._last = self._writer.submit(self._write, self.folder / str(step), pieces(flat), held, told)
        if wait:
            self.wait()

    def wait(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            with full_disk(self.folder):
                last.result()

    def close(self, done: bool = False) -> None:
        """done: the run has come to its end, and needs its copies no longer."""
        self.wait()
        self._writer.shutdown()
        if done:
            shutil.rmtree(self.folder, ignore_errors=True)

    def newest(self, like: Any) -> Found | None:
        """The newest step whose pieces, as `like` (a state of ShapeDtypeStructs with shardings) lies on the devices, are all on some host; the same on all processes, which all must ask."""
        name = pieces(flat_state(like))
        mine: tuple[str, list[int]] = name, self._steps(name)
        said = [json.loads(line) for line in exchange("replicas", json.dumps(mine))] if jax.process_count() > 1 else [mine]
        there: dict[str, dict[int, int]] = {held: {} for held, _ in said}                # which process has a step of which pieces: the first that does
        for index, (held, steps_there) in enumerate(said):
            for step in steps_there:
                there[held].setdefault(step, index)
        steps = set.intersection(*(set(by) for by in there.values()))
        if not steps:
            return None
        step = max(steps)
        return Found(step, frozenset(by[step] for by in there.values()), all(step in steps_there for _, steps_there in said))

    def restore(self, found: Found, like: Any) -> tuple[Any, dict[str, Any]]:
        """(state, extra) of a step that `newest` found, bit for bit; all processes must ask. Raises CheckpointError for a damaged copy."""
        paths, tree = jax.tree_util.tree_flatten_with_path(like)
        wanted = {name: placed(x, original) for (name, x), (_, original) in zip(flat_state(like).items(), paths)}
        name = pieces(wanted)
        mine = self.folder / str(found.step) / f"{name}.json" if found.step in self._steps(name) else None
        told = json.loads(mine.read_text()) if mine is not None else None
        if told is not None and told["arrays"] != describe(wanted):
            raise CheckpointError(f"{mine}: a copy of another model or optimiser; remove that folder")
        source = None if mine is None else safetensors_file.SafeTensors([mine.with_suffix(".safetensors")], str(mine.parent))
        flat = {}
        for key, x in wanted.items():
            def read(index, key=key, x=x):
                return source.read(piece(key, index, x.shape)) if source is not None else np.zeros([b - a for a, b in spans(index, x.shape)], x.dtype)
            near = x.sharding if found.whole else x.sharding.with_memory_kind("device")
            array = jax.make_array_from_callback(x.shape, near, read)
            flat[key] = array if found.whole else mended(array, found.holders, x.sharding)
        if not found.whole:
            told = json.loads(exchange("replica", json.dumps(told))[min(found.holders)])
        assert told is not None
        return jax.tree.unflatten(tree, [typed(flat[path_name(path)], x) for path, x in paths]), told["extra"]

    def _steps(self, name: str) -> list[int]:
        """The steps of which this host has these pieces."""
        return sorted(int(file.parent.name) for file in self.folder.glob(f"*/{name}.json"))

    def _write(self, folder: pathlib.Path, name: str, held: Mapping[str, np.ndarray], told: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{name}.{os.getpid()}.part"
        safetensors_file.write_file(part, [Export(key, x.shape, x.dtype, lambda x=x: x) for key, x in held.items()])      # type: ignore[misc]
        os.replace(part, folder / f"{name}.safetensors")
        part.write_text(json.dumps(told))
        os.replace(part, folder / f"{name}.json")
        for step in self._steps(name)[:-KEEP]:
            for kind in ("json", "safetensors"):
                (self.folder / str(step) / f"{name}.{kind}").unlink(missing_ok=True)
            if not any((self.folder / str(step)).iterdir()):
                (self.folder / str(step)).rmdir()


def spans(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape))


def piece(name: str, index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    return name + "@" + ",".join(f"{a}:{b}" for a, b in spans(index, shape))


def pieces(flat: Mapping[str, Any]) -> str:
    """A hash of what this process holds of these arrays (real or abstract)."""
    lines = sorted({piece(name, index, x.shape) for name, x in flat.items() for index in placed(x, x).sharding.addressable_devices_indices_map(x.shape).values()})
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:24]


def placed(x: Any, original: Any) -> jax.ShapeDtypeStruct:
    """An array's shape where it lies: on the sharding asked for, else the first device."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place_of(x, original))


def mended(x: jax.Array, holders: frozenset[int], place: NamedSharding) -> jax.Array:
    """An array whose replicas differ, those of the processes `holders` being right -> the same at `place` (in another memory perhaps) with all of them right, bit for bit."""
    mesh = place.mesh
    first: dict[tuple, Any] = {}                                                  # of each piece the device that gives it
    by_device: dict[Any, Any] = dict(place.devices_indices_map(x.shape))
    for device, index in sorted(by_device.items(), key=lambda item: item[0].id):
        if device.process_index in holders:
            first.setdefault(spans(index, x.shape), device)
    gives = np.vectorize(lambda d: d in first.values(), otypes=[bool])(mesh.devices)
    whole = NamedSharding(mesh, PartitionSpec(*mesh.axis_names))
    flags = jax.make_array_from_callback(gives.shape, whole, lambda index: gives[index])
    used = {axis for entry in place.spec if entry is not None for axis in ((entry,) if isinstance(entry, str) else entry)}
    rest = tuple(axis for axis in mesh.axis_names if axis not in used)
    if math.prod(mesh.shape[axis] for axis in rest) == 1:
        return jax.device_put(x, place)

    def pick(x, flag):
        bits = x if jnp.issubdtype(x.dtype, jnp.integer) else x.astype(jnp.uint8) if x.dtype == bool else jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
        bits = bits.astype(jnp.uint32) if bits.dtype.itemsize < 4 else bits            # sums of 16 bits are not everywhere
        found = jax.lax.psum(jnp.where(flag.reshape(()), bits, 0), rest)
        if jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == bool:
            return found.astype(x.dtype)
        return jax.lax.bitcast_convert_type(found.astype(f"uint{8 * x.dtype.itemsize}"), x.dtype)
    work = jax.shard_map(pick, mesh=mesh, in_specs=(place.spec, PartitionSpec(*mesh.axis_names)), out_specs=place.spec, check_vma=False)
    return jax.jit(work, out_shardings=place)(x, flags)
