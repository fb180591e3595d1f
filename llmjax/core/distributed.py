"""Several processes as one run: finding each other, agreeing on what is run, waiting for each other, and ending together. On one process nothing here does or imports anything.

`session` is all that a run needs; `cluster.py` finds out who is who, `roll_call.py` waits for all, `heartbeat.py` watches over them.
"""
from __future__ import annotations

import atexit
import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import re
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

from llmjax.core import cluster, heartbeat
from llmjax.core.errors import ConfigError
from llmjax.core.override import as_text
from llmjax.core.roll_call import pauses, roll_call, whoami
from llmjax.core.run_config import Distributed, RunConfig

DAY = 24 * 3600 * 1000                 # milliseconds; a wait that the heartbeat watches over needs no limit of its own
ROOMS = itertools.count()


def initialize(timeouts: Distributed) -> list[str] | None:
    """Starts jax with the other processes of this run, where the environment says that there are any. -> "host, pid" of each, or None on one process.

    To be called before anything asks jax for its devices; calling it again changes nothing. Raises ConfigError (one line) where the environment is not complete, where a process does
    not come, and where jax runs already.
    """
    if jax.distributed.is_initialized():
        return exchange("host", whoami())
    place = cluster.find()
    if place is None:
        return None
    from jax._src import xla_bridge
    if xla_bridge.backends_are_initialized():
        raise ConfigError(f"process {place.index} of {place.count} ({place.source}): jax already uses its devices; start the run before anything else asks for them")
    hosts = roll_call(place, timeouts.start_timeout)
    seconds = max(10, round(timeouts.start_timeout))

    def lost() -> bool:
        heartbeat.end(f"jax's coordination service at {place.coordinator} could not be joined: {hosts[0]} ended, or took longer than {seconds} s")
        return True
    heartbeat.on_abort(lost)
    jax.distributed.initialize(place.coordinator, place.count, place.index, local_device_ids=place.local_devices, cluster_detection_method="deactivate", initialization_timeout=seconds,
                               heartbeat_timeout_seconds=round(2 * timeouts.heartbeat_timeout + 10), shutdown_timeout_seconds=seconds)
    return hosts


def client() -> Any:
    """jax's client of the coordination service, which holds the key-value store and the barriers."""
    from jax._src.distributed import global_state
    return global_state.client


def exchange(key: str, mine: str, seconds: float = 300.0) -> list[str]:
    """What every process said under a key that is new: the same list on all."""
    room, state = f"llmjax/{key}/{next(ROOMS)}", client()
    state.key_value_set(f"{room}/{jax.process_index()}", mine)
    return [state.blocking_key_value_get(f"{room}/{i}", round(1000 * seconds)) for i in range(jax.process_count())]


def barrier(name: str) -> None:
    """Waits until all processes have come here. On one process nothing."""
    if jax.process_count() > 1:
        client().wait_at_barrier(f"llmjax/{name}/{next(ROOMS)}", DAY)


class Session:
    """A run among its processes. hosts: "host, pid" of each."""

    def __init__(self, hosts: list[str], timeouts: Distributed, pulse: heartbeat.Pulse | None = None):
        self.hosts, self.timeouts, self.pulse = hosts, timeouts, pulse

    def enter(self, step: int | None) -> None:
        """Tells which step this process begins; None: something else, which may take long."""
        if self.pulse is not None:
            self.pulse.step = step

    @contextlib.contextmanager
    def first(self, name: str) -> Iterator[bool]:
        """Work that process 0 does (True) while the others wait before they begin theirs: `with session.first("data") as mine: …`."""
        if self.pulse is not None and self.pulse.index > 0:
            barrier(name)
        yield self.pulse is None or self.pulse.index == 0
        if self.pulse is not None and self.pulse.index == 0:
            barrier(name)

    def agree(self, lines: list[str], way: str) -> None:
        """Raises ConfigError, on every process the same, where one has other lines ("name = value") than process 0: it names the process, the first that differs, and the way out."""
        if self.pulse is None:
            return
        room, state, index, seconds = f"llmjax/agree/{next(ROOMS)}", self.pulse.client, self.pulse.index, self.timeouts.start_timeout
        try:
            if index == 0:
                found = next((wrong for i in range(1, len(self.hosts)) if (wrong := difference(lines, state.blocking_key_value_get(f"{room}/{i}", round(1000 * seconds)), i, self.hosts))), "")
                state.key_value_set(f"{room}/verdict", found + way if found else "")
            else:
                state.key_value_set(f"{room}/{index}", json.dumps([digest(lines), lines]))
                found = state.blocking_key_value_get(f"{room}/verdict", round(2000 * seconds))
        except jax.errors.JaxRuntimeError as error:
            raise ConfigError(f"the processes could not compare what they run within {seconds:g} s (distributed.start_timeout): {str(error).splitlines()[0]}") from error
        if found:
            raise ConfigError(found + way if index == 0 else found)


    def meet(self, folder: pathlib.Path) -> None:
        """Makes a run's folder. Raises ConfigError, on every process the same, where one sees another folder than process 0, as on hosts that share no file system."""
        if self.pulse is None:
            folder.mkdir(parents=True, exist_ok=True)
            return
        key, line = f"llmjax/folder/{next(ROOMS)}", f"--workdir = {folder}"
        if self.pulse.index == 0:
            folder.mkdir(parents=True, exist_ok=True)
            sign = folder / f".process-0-{secrets.token_hex(4)}"
            sign.touch()
            self.pulse.client.key_value_set(key, json.dumps([sign.name, line]))
        else:
            name, theirs = json.loads(self.pulse.client.blocking_key_value_get(key, round(1000 * self.timeouts.start_timeout)))
            if any((folder / name).exists() for _ in pauses(time.monotonic() + 10)):       # network file systems show new files late
                line = theirs
        try:
            self.agree([line], "all processes must see one folder, on a file system that their hosts share")
        finally:
            if self.pulse.index == 0:
                sign.unlink(missing_ok=True)


def digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def difference(mine: list[str], said: str, index: int, hosts: list[str]) -> str | None:
    """How the lines of a process differ from process 0's `mine`, in words; None where they do not."""
    code, theirs = json.loads(said)
    if code == digest(mine):
        return None
    ours, others = ({(parts := re.split(" [=:] ", line, maxsplit=1))[0]: parts[-1] for line in lines} for lines in (mine, theirs))
    name = next(name for name in [*ours, *others] if ours.get(name) != others.get(name))
    return f"process {index} ({hosts[index]}) has {name} = {others.get(name, 'nothing')}, process 0 ({hosts[0]}) has {ours.get(name, 'nothing')}; "


@contextlib.contextmanager
def session(config: RunConfig) -> Iterator[Session]:
    """All of a run: the processes find each other, see that they agree, and watch over each other until the end; a process that fails ends the others.

    Raises ConfigError (one line) where the processes cannot come together or differ in configuration, version or source code.
    """
    timeouts = config.distributed
    hosts = initialize(timeouts)
    if hosts is None or len(hosts) == 1:
        yield Session([whoami()], timeouts)
        return
    from jax._src.distributed import global_state
    pulse = heartbeat.Pulse(client(), jax.process_index(), hosts, global_state.coordinator_address or "", timeouts, f"llmjax/run/{next(ROOMS)}")
    try:
        together = Session(hosts, timeouts, pulse)
        together.agree([f"llmjax = {source_hash()}", f"jax = {jax.__version__}", *as_text(config)], "start all processes with the same code and configuration")
        pulse.start()
        yield together
        pulse.step = None
        barrier("end")
    except BaseException as error:
        pulse.fell(error)
        atexit.register(leave)
        late = threading.Timer(10, leave)          # threads that wait for another process would hold up the interpreter's end
        late.daemon = True
        late.start()
        raise
    pulse.stop()


def leave() -> None:
    """Ends a process that failed: jax's own exit handler, which comes after this one, would wait for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2)


def source_hash() -> str:
    """The package's version and a hash of its source files."""
    root = pathlib.Path(__file__).parent.parent
    total = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        total.update(str(file.relative_to(root)).encode() + file.read_bytes())
    version = sys.modules["llmjax"].__version__
    return f"{version} ({total.hexdigest()[:12]})"


def describe(hosts: list[str], mesh: jax.sharding.Mesh) -> str:
    """The topology in a line: processes, devices, mesh."""
    devices = jax.devices()
    axes = " × ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    names = list(dict.fromkeys(host.partition(",")[0] for host in hosts))
    some = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return (f"{len(hosts)} processes on {some}; {len(devices)} devices ({devices[0].device_kind}), {len(devices) // len(hosts)} a process"
            + (f", {slices} slices" if slices > 1 else "") + f"; mesh {axes}")


def share(sharding: jax.sharding.Sharding, shape: tuple[int, int]) -> tuple[int, int]:
    """Which part of a batch [B, T] this process needs: (i, n), the i-th of n equal parts of its rows. That is not always its number among the processes: those that hold different
    parts of the weights, or of the length, need the same rows. (0, 1), all of them, where its rows do not stand together."""
    rows = shape[0]
    spans = {index[0].indices(rows)[:2] for index in sharding.addressable_devices_indices_map(shape).values() if index is not None}
    start, stop = min(a for a, _ in spans), max(b for _, b in spans)
    size = stop - start
    together = sum(b - a for a, b in spans) == size and rows % size == 0 and start % size == 0
    return (start // size, rows // size) if together else (0, 1)
