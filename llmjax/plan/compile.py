"""The train step of a run, compiled for TPUs that are not there: libtpu's compiler, a topology instead of devices, the same step that `llmjax train` runs.

It runs in a process of its own: what libtpu wants to find in its environment is set before jax wakes up, and a compiler that dies takes nobody
with it. FOLDER/job.json goes in, FOLDER/program.hlo and FOLDER/program.meta.json come out.
"""
from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax

from llmjax import train
from llmjax.core import ConfigError, MissingExtra, RunConfig
from llmjax.core.mesh import from_layout
from llmjax.core.override import from_json, to_json
from llmjax.plan import hlo, job
from llmjax.plan.chips import CHIPS, Topology, topology

# Without these libtpu asks the cloud's metadata server what it runs on; the last lets several compile at once.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5e-16", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
               "TF_CPP_MIN_LOG_LEVEL": "2"}


def devices(where: Topology) -> list[Any]:
    """The devices of a TPU topology, none of which need exist: tori are closed where a dimension is a whole ring of links."""
    from jax.experimental import topologies
    chip = CHIPS[where.chip]
    flat = len(chip.pod) == 2
    wrap = tuple(n == 16 for n in where.shape) + (False,) if flat else (min(where.shape) >= 4,) * 3
    more: dict[str, Any] = {"chip_config_name": "megacore"} if chip.ask in ("v4", "v5") else {}
    host = tuple(min(n, 2) for n in where.shape[:2]) + (1,)
    more |= {"num_slices": where.slices} if where.slices > 1 else {}
    return list(topologies.get_topology_desc(f"{chip.ask}:{'x'.join(map(str, where.shape))}", platform="tpu", chips_per_host_bounds=host, wrap=wrap, **more).devices)


def lower(config: RunConfig, where: Topology) -> Any:
    """The train step of `config` lowered for `where` (jax.stages.Lowered)."""
    mesh = from_layout(config.layout, devices(where))
    made = job.make(config, where, mesh)
    state, batch = made.state(), made.batch(mesh)
    step = train.make_step(made.model.apply, made.config.objective, made.optimizer, accumulate=config.accumulate, skip=config.guard.policy == "skip")
    with jax.set_mesh(mesh):
        return step.program(state, batch).lower(state, batch, None, None)          # type: ignore[attr-defined]


def compile_into(folder: pathlib.Path) -> None:
    """The child's work."""
    told = json.loads((folder / "job.json").read_text())
    begun = time.perf_counter()
    program = lower(from_json(told["config"]), topology(told["topology"])).compile()
    seconds, memory = time.perf_counter() - begun, program.memory_analysis()
    (folder / "program.hlo").write_text(program.as_text())
    kept = {name: getattr(memory, name) for name in dir(memory) if name.endswith("_in_bytes")}
    (folder / "program.meta.json").write_text(json.dumps({**kept, "compile_seconds": round(seconds, 1), "topology": told["topology"], "jax": jax.__version__}, indent=1))


def run(config: RunConfig, where: Topology, dump: str | pathlib.Path | None = None) -> dict[str, Any]:
    """Compiles in a process of its own. -> what the program says (hlo.read), "memory" (jax's memory_analysis) and "hbm_bytes", the sum a device holds.

    Raises MissingExtra without libtpu, ConfigError for chips that are no TPUs, for a program the compiler refuses (memory it has not, first of all) and for what a run would refuse.
    """
    if not where.is_tpu:
        raise ConfigError(f"--compile: {where.name} are no TPUs; the compiler that needs no chips is libtpu's")
    if importlib.util.find_spec("libtpu") is None:
        raise MissingExtra("libtpu", "tpu", "plan --compile")
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(dump) if dump is not None else pathlib.Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("program.hlo", "program.meta.json"):
            (folder / name).unlink(missing_ok=True)
        (folder / "job.json").write_text(json.dumps({"config": to_json(config), "topology": where.name}))
        child = [sys.executable, "-c", "import sys; from llmjax.plan import compile; compile.main(sys.argv[1])", str(folder)]
        done = subprocess.run(child, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=False)
        if done.returncode or not (folder / "program.meta.json").exists():
            raise ConfigError(f"--compile: {reason(done.stderr, done.returncode)}")
        memory = json.loads((folder / "program.meta.json").read_text())
        found = hlo.read((folder / "program.hlo").read_text(), job.make(config, where).mesh.shape)
    get = lambda name: memory.get(f"{name}_size_in_bytes", 0)
    return {**found, "memory": memory, "hbm_bytes": get("argument") + get("temp") + get("output") - get("alias"), "peak_bytes": memory.get("peak_memory_in_bytes")}


def reason(stderr: str, code: int) -> str:
    """The line of a child's last words that says what happened."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip() and "Traceback filtering" not in line and "internal frames" not in line and not line.startswith("---")]
    for wanted, order in ((("Ran out of memory", "RESOURCE_EXHAUSTED"), lines), (("Error", "error"), lines[::-1])):
        said = next((line for line in order if any(word in line for word in wanted)), None)
        if said:
            return said[:400]
    return (lines[-1] if lines else f"the compiler ended with status {code}")[:400]


def main(folder: str) -> None:
    try:
        compile_into(pathlib.Path(folder))
    except ValueError as error:                        # what the user can mend, said as the parent would
        print(f"Error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
