"""Who is who: what each launcher's variables say, those of the documentation of Cloud TPU, JobSet, SLURM and Open MPI; and the roll call over real sockets."""
import threading
import time

import jax
import pytest
from tiny_models import free_port

from llmjax.core import ConfigError, cluster
from llmjax.core.cluster import Place
from llmjax.core.roll_call import roll_call, whoami

SLURM = dict(SLURM_JOB_ID="5000", SLURM_STEP_NODELIST="gpu[007-009,12],other", SLURM_NTASKS="8", SLURM_STEP_NUM_TASKS="4", SLURM_PROCID="2", SLURM_LOCALID="0", SLURM_NODEID="2",
             SLURM_STEP_TASKS_PER_NODE="1(x4)", SLURM_STEP_ID="0", CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7")
JOBSET = dict(JOBSET_NAME="run", REPLICATED_JOB_NAME="workers", REPLICATED_JOB_REPLICAS="2", JOB_INDEX="1", JOB_COMPLETION_INDEX="3", LLMJAX_NUM_PROCESSES="8")
MPI = dict(OMPI_COMM_WORLD_SIZE="4", OMPI_COMM_WORLD_RANK="3", OMPI_COMM_WORLD_LOCAL_RANK="1", OMPI_COMM_WORLD_LOCAL_SIZE="2", OMPI_MCA_orte_hnp_uri="1531576320.0;tcp://10.96.0.1,10.148.0.1:34911")


@pytest.mark.parametrize(("env", "place"), [
    ({}, None),
    (dict(LLMJAX_NUM_PROCESSES="1"), None),
    (dict(LLMJAX_COORDINATOR="a:1", LLMJAX_NUM_PROCESSES="2", LLMJAX_PROCESS_ID="1", LLMJAX_LOCAL_DEVICES="2,3"), Place("environment variables", "a:1", 2, 1, (2, 3))),
    (dict(JAX_COORDINATOR_ADDRESS="a:1", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="0"), Place("environment variables", "a:1", 2, 0)),
    (dict(TPU_WORKER_HOSTNAMES="t-0,t-1", TPU_WORKER_ID="1"), Place("Cloud TPU pod", "t-0:8482", 2, 1)),
    (dict(TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0"), None),
    (dict(TPU_WORKER_HOSTNAMES="s-0,s-1", TPU_WORKER_ID="1", MEGASCALE_NUM_SLICES="3", MEGASCALE_SLICE_ID="2", MEGASCALE_COORDINATOR_ADDRESS="lead:8080"), Place("Cloud TPU pod", "lead:8482", 6, 5)),
    (JOBSET, Place("JobSet", "run-workers-0-0.run:8482", 8, 7)),
    (dict(JOB_COMPLETION_INDEX="3"), None),                                        # an array of separate jobs
    (SLURM, Place("SLURM", "gpu007:62344", 4, 2)),                                 # one task a node: all its GPUs
    ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "1,1,2", "SLURM_LOCALID": "1"}, Place("SLURM", "gpu007:62344", 4, 2, (4, 5, 6, 7))),
    ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "4", "CUDA_VISIBLE_DEVICES": "0", "SLURM_LOCALID": "3"}, Place("SLURM", "gpu007:62344", 4, 2)),        # --gpus-per-task=1
    ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, None),
    ({**SLURM, "LLMJAX_COORDINATOR": "10.0.0.1:99"}, Place("SLURM", "10.0.0.1:99", 4, 2)),
    (MPI, Place("Open MPI", f"10.96.0.1:{61440 + (1531576320 >> 12) % 4096}", 4, 3, (1,))),
])
def test_places(env, place, monkeypatch):
    monkeypatch.setattr(cluster, "tpu_chips", lambda: 0)
    assert cluster.find(env) == place


@pytest.mark.parametrize(("env", "words"), [
    (dict(LLMJAX_NUM_PROCESSES="2", LLMJAX_PROCESS_ID="0"), "LLMJAX_COORDINATOR is missing"),
    (dict(LLMJAX_COORDINATOR="a:1", LLMJAX_NUM_PROCESSES="2"), "LLMJAX_PROCESS_ID is missing"),
    (dict(LLMJAX_COORDINATOR="a:1", LLMJAX_NUM_PROCESSES="two", LLMJAX_PROCESS_ID="0"), "LLMJAX_NUM_PROCESSES=two"),
    (dict(LLMJAX_COORDINATOR="a:1", LLMJAX_NUM_PROCESSES="2", LLMJAX_PROCESS_ID="2"), "process 2 of 2"),
    (dict(LLMJAX_COORDINATOR="host", LLMJAX_NUM_PROCESSES="2", LLMJAX_PROCESS_ID="1"), "HOST:PORT"),
    ({**MPI, "OMPI_MCA_orte_hnp_uri": ""}, "Open MPI.*LLMJAX_COORDINATOR is missing"),          # Open MPI 5 on several hosts
])
def test_what_is_missing_is_said(env, words, monkeypatch):
    monkeypatch.setattr(cluster, "tpu_chips", lambda: 0)
    with pytest.raises(ConfigError, match=words) as error:
        cluster.find(env)
    assert "\n" not in str(error.value)


def test_slurm_agrees_with_jax(monkeypatch):
    """Count, number and first host as jax's own reading of the same variables has them."""
    from jax._src.clusters.slurm_cluster import SlurmCluster
    for nodes in ("node001", "node001,host2", "node[001-0015],host2", "node[001,007-015],host2"):
        env = {**SLURM, "SLURM_STEP_NODELIST": nodes, "SLURM_NTASKS": "4"}
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        place = cluster.find(env)
        assert (place.coordinator, place.count, place.index) == (SlurmCluster.get_coordinator_address(None, None), SlurmCluster.get_process_count(), SlurmCluster.get_process_id())


def test_tpu_vms_ask_the_metadata_server(monkeypatch):
    """A worker of a Cloud TPU VM with four hosts, as jax's own reader of the metadata finds it."""
    from jax._src.clusters import cloud_tpu_cluster
    said = {"agent-worker-number": "2", "worker-network-endpoints": "unknown:unknown:10.0.0.5,unknown:unknown:10.0.0.6,unknown:unknown:10.0.0.7,unknown:unknown:10.0.0.8", "tpu-env": "ZONE: 'z'"}
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (said[key], 200))
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cluster, "tpu_chips", lambda: 4)
    for name in ("TPU_SKIP_MDS_QUERY", "MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID"):
        monkeypatch.delenv(name, raising=False)
    assert cluster.find({}) == Place("Cloud TPU VM", "10.0.0.5:8482", 4, 2)
    assert cluster.find({"JAX_PLATFORMS": "cpu"}) is None
    said["worker-network-endpoints"] = "unknown:unknown:10.0.0.5"
    assert cluster.find({}) is None                                                # one host


def call(places, seconds=5.0):
    """Everyone's answer, or error."""
    found = [None] * len(places)

    def one(i, place):
        try:
            found[i] = roll_call(place, seconds)
        except ConfigError as error:
            found[i] = str(error)
    threads = [threading.Thread(target=one, args=x) for x in enumerate(places)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_roll_call():
    at = f"127.0.0.1:{free_port()}"
    answers = call([Place("test", at, 3, i) for i in (2, 1, 0)])
    assert answers == [[whoami()] * 3] * 3
    assert call([Place("test", at, 2, i) for i in (1, 0)]) == [[whoami()] * 2] * 2, "the port is free again at once"


def test_roll_call_names_who_is_missing_or_wrong():
    at = f"127.0.0.1:{free_port()}"
    began = time.monotonic()
    zero, two = call([Place("test", at, 4, i) for i in (0, 2)], 1.0)
    assert zero == two and f"of 4 processes, numbers 1, 3 did not come to {at} within 1 s" in zero and time.monotonic() - began < 3
    assert f"process 0 does not answer at {at}" in call([Place("test", at, 2, 1)], 0.5)[0]
    zero, one = call([Place("test", at, 3, 0), Place("test", at, 2, 1)], 2.0)
    assert zero == one and "process 1" in zero and "was told of 2 processes, process 0" in zero and "of 3" in zero
    import socket
    with socket.socket() as held:
        held.bind(("", 0))
        held.listen()
        port = held.getsockname()[1]
        assert f"cannot listen at port {port}" in call([Place("test", f"127.0.0.1:{port}", 2, 0)], 1.0)[0]


def test_shares_of_a_batch():
    """Which rows a process reads, from the devices that are its own: data over two processes, a mesh whose tensor axis crosses them, and rows that do not stand together."""
    from llmjax.core.distributed import share

    class Laid:
        def __init__(self, *rows):
            self.rows = rows

        def addressable_devices_indices_map(self, shape):
            return {i: (slice(*r), slice(None)) for i, r in enumerate(self.rows)}
    assert share(Laid((4, 6), (6, 8)), (8, 16)) == (1, 2)
    assert share(Laid((0, 4), (0, 4)), (8, 16)) == (0, 2)
    assert share(Laid((None, None, None)), (8, 16)) == (0, 1)
    assert share(Laid((0, 2), (4, 6)), (8, 16)) == (0, 1)
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    assert share(jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a")), (8, 16)) == (0, 1)
