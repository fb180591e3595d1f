"""Where this process stands among the others: what Cloud TPU, Kubernetes (JobSet), SLURM, Open MPI or plain variables say of it. Nothing is started here, and no jax is needed.

A variable of ours wins over what a cluster says, and a cluster fills in what is not given:

    LLMJAX_COORDINATOR=HOST:PORT   where process 0 listens         (or JAX_COORDINATOR_ADDRESS)
    LLMJAX_NUM_PROCESSES=N         how many there are              (or JAX_NUM_PROCESSES)
    LLMJAX_PROCESS_ID=I            which one this is, from 0       (or JAX_PROCESS_ID)
    LLMJAX_LOCAL_DEVICES=0,1       which GPUs of the host it takes (or JAX_LOCAL_DEVICE_IDS; all it sees)
"""
from __future__ import annotations

import dataclasses as dc
import os
import re
from collections.abc import Callable, Mapping

from llmjax.core.errors import ConfigError

Environment = Mapping[str, str]
PORT = 8482                            # the one jax uses on Cloud TPU, whose firewall rules are written for it


@dc.dataclass(frozen=True)
class Place:
    """source: who said so. coordinator: "host:port" of process 0. local_devices: the accelerators of the host that are this process's; None: all it sees."""
    source: str
    coordinator: str | None
    count: int | None
    index: int | None
    local_devices: tuple[int, ...] | None = None


def find(env: Environment | None = None) -> Place | None:
    """This process's place, or None where it is alone. Raises ConfigError naming the variable that is missing or is no number."""
    env = os.environ if env is None else env
    told = plain(env)
    if told is not None and told.count == 1:
        return None
    place = next((found for ask in FINDERS if (found := ask(env)) is not None), None)
    if told is not None:
        given = {field: value for field in ("coordinator", "count", "index", "local_devices") if (value := getattr(told, field)) is not None}
        place = dc.replace(place, **given) if place is not None else told
    if place is None or place.count == 1:
        return None
    for name, value in (("LLMJAX_NUM_PROCESSES", place.count), ("LLMJAX_PROCESS_ID", place.index), ("LLMJAX_COORDINATOR", place.coordinator)):
        if value is None:
            raise ConfigError(f"several processes ({place.source}), but {name} is missing; set {' '.join(f'{n}={example}' for n, example in EXAMPLES.items())} for each of them")
    assert place.count is not None and place.index is not None and place.coordinator is not None
    if not 0 <= place.index < place.count:
        raise ConfigError(f"this is process {place.index} of {place.count} ({place.source}): LLMJAX_PROCESS_ID counts from 0 to LLMJAX_NUM_PROCESSES - 1")
    if not re.fullmatch(r".+:\d+", place.coordinator):
        raise ConfigError(f"LLMJAX_COORDINATOR={place.coordinator}: HOST:PORT of process 0 is wanted")
    return place


EXAMPLES = {"LLMJAX_COORDINATOR": "HOST:PORT", "LLMJAX_NUM_PROCESSES": "N", "LLMJAX_PROCESS_ID": "I"}


def number(env: Environment, name: str) -> int | None:
    """A variable as a whole number from 0, None where it is not set. Raises ConfigError."""
    text = env.get(name, "").strip()
    if text and not text.isdigit():
        raise ConfigError(f"{name}={text}: a whole number from 0 is wanted")
    return int(text) if text else None


def plain(env: Environment) -> Place | None:
    """Our own variables, each of which may be missing."""
    ours, theirs = ("LLMJAX_NUM_PROCESSES", "LLMJAX_PROCESS_ID"), ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    count, index = (number(env, a if env.get(a) else b) for a, b in zip(ours, theirs))
    coordinator = env.get("LLMJAX_COORDINATOR") or env.get("JAX_COORDINATOR_ADDRESS") or None
    devices = env.get("LLMJAX_LOCAL_DEVICES") or env.get("JAX_LOCAL_DEVICE_IDS")
    if devices and not re.fullmatch(r"\d+(,\d+)*", devices):
        raise ConfigError(f"LLMJAX_LOCAL_DEVICES={devices}: numbers are wanted, as in 0,1")
    if count is None and index is None and coordinator is None:
        return None
    return Place("environment variables", coordinator, count, index, tuple(map(int, devices.split(","))) if devices else None)


def tpu_pod(env: Environment) -> Place | None:
    """Variables that GKE sets in the pods of a TPU slice, and MEGASCALE_* where there are several slices."""
    names = [name for name in (env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES") or "").split(",") if name]
    slices = number(env, "MEGASCALE_NUM_SLICES") or 1
    if len(names) * slices <= 1:
        return None
    worker = number(env, "TPU_WORKER_ID") or 0
    lead = (env.get("MEGASCALE_COORDINATOR_ADDRESS") or names[0]).split(":")[0]
    return Place("Cloud TPU pod", f"{lead}:{PORT}", len(names) * slices, worker + len(names) * (number(env, "MEGASCALE_SLICE_ID") or 0))


def jobset(env: Environment) -> Place | None:
    """Pods of a JobSet. JOB_COMPLETION_INDEX comes from Kubernetes; the others are the JobSet's own labels, which launch/gke.yaml hands to the container. The pods of job j are
    called NAME-REPLICATED-j-i.NAME. How many processes there are is LLMJAX_NUM_PROCESSES."""
    index, name = number(env, "JOB_COMPLETION_INDEX"), env.get("JOBSET_NAME")
    if index is None or not name:
        return None
    count, jobs = number(env, "LLMJAX_NUM_PROCESSES"), number(env, "REPLICATED_JOB_REPLICAS") or 1
    each = None if count is None else count // jobs
    return Place("JobSet", f"{name}-{env.get('REPLICATED_JOB_NAME') or 'workers'}-0-0.{name}:{PORT}", count, None if each is None else (number(env, "JOB_INDEX") or 0) * each + index)


def slurm(env: Environment) -> Place | None:
    """Tasks of a step (srun). With one task on a node it takes all of the node's GPUs, with several each takes its own."""
    nodes, index, job = env.get("SLURM_STEP_NODELIST"), number(env, "SLURM_PROCID"), number(env, "SLURM_JOB_ID")
    count = number(env, "SLURM_STEP_NUM_TASKS") or number(env, "SLURM_NTASKS")
    if not nodes or index is None or job is None or count is None:
        return None
    here = expand(env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or "1")
    tasks = here[min(number(env, "SLURM_NODEID") or 0, len(here) - 1)]
    port = 61440 + (job + (number(env, "SLURM_STEP_ID") or 0)) % 4096            # above what Linux gives to clients, different for jobs that share a node
    return Place("SLURM", f"{first_host(nodes)}:{port}", count, index, own_devices(env, tasks, number(env, "SLURM_LOCALID") or 0))


def expand(text: str) -> list[int]:
    """SLURM's "2(x3),1" as [2, 2, 2, 1]."""
    return [int(m[1]) for part in text.split(",") if (m := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)) for _ in range(int(m[2] or 1))] or [1]


def first_host(nodes: str) -> str:
    """The first of SLURM's "node[001-004,7]-ib,other": "node001-ib"."""
    match = re.match(r"([^,\[]*)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodes)
    assert match is not None
    return "".join(part or "" for part in match.groups())


def open_mpi(env: Environment) -> Place | None:
    """Ranks of mpirun. Open MPI up to 4 says where mpirun runs, and rank 0 is taken to run there too; from 5 on that is known only where all ranks are on one host."""
    count, index = number(env, "OMPI_COMM_WORLD_SIZE"), number(env, "OMPI_COMM_WORLD_RANK")
    if count is None or index is None:
        return None
    local = number(env, "OMPI_COMM_WORLD_LOCAL_SIZE") or 1
    launcher = re.match(r"(\d+)\.", env.get("OMPI_MCA_orte_hnp_uri", ""))
    address = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", env.get("OMPI_MCA_orte_hnp_uri", ""))
    host = next(x for x in address.groups() if x) if address else "127.0.0.1" if local == count else None
    job = int(launcher[1]) >> 12 if launcher else sum(env.get("PMIX_NAMESPACE", "").encode())
    return Place("Open MPI", f"{host}:{61440 + job % 4096}" if host else None, count, index, own_devices(env, local, number(env, "OMPI_COMM_WORLD_LOCAL_RANK") or 0))


def own_devices(env: Environment, tasks: int, local: int) -> tuple[int, ...] | None:
    """Which of the host's GPUs are those of process `local` of the `tasks` on this host. None, all it sees, where it is alone or the launcher has shown it one alone."""
    visible = env.get("CUDA_VISIBLE_DEVICES") or env.get("ROCR_VISIBLE_DEVICES") or ""
    seen = len([x for x in visible.split(",") if x])
    if tasks == 1 or (seen and seen < tasks):
        return None
    each = max(1, seen // tasks)
    return tuple(range(local * each, (local + 1) * each))


def tpu_vm(env: Environment) -> Place | None:
    """Cloud TPU VMs, which ask the metadata server who they are: jax's own code does it, where this machine has TPU chips."""
    if env.get("JAX_PLATFORMS", "tpu").split(",")[0] not in ("tpu", "") or "TPU_SKIP_MDS_QUERY" in env or not tpu_chips():
        return None
    from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster
    if not GceTpuCluster.is_env_present() or GceTpuCluster.get_process_count() == 1:
        return None
    return Place("Cloud TPU VM", GceTpuCluster.get_coordinator_address(300, str(PORT)), GceTpuCluster.get_process_count(), GceTpuCluster.get_process_id())


def tpu_chips() -> int:
    """How many TPU chips this machine has on its bus."""
    from jax._src.hardware_utils import num_available_tpu_chips_and_device_id
    return num_available_tpu_chips_and_device_id()[0]


FINDERS: tuple[Callable[[Environment], Place | None], ...] = (tpu_pod, jobset, open_mpi, slurm, tpu_vm)      # mpirun within a SLURM job: its ranks count
