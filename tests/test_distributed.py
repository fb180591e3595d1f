"""Runs in several real processes on this host: the losses of one process, a process that dies or falls silent, other numbers of processes, processes that differ, SIGTERM."""
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from jax import numpy as jnp
from safetensors.numpy import load_file
from tiny_models import free_port

from llmjax import run, settings, train
from llmjax.core import ConfigError, Distributed, heartbeat

ROOT = pathlib.Path(__file__).parent.parent
KNOBS = ("log_every=1", "checkpoint_every=3", "eval_every=None", "compute.dtype=float32", "compute.unroll=False", "compute.attention=reference", "model.repeats=2", "data.source.max_bytes=150000",
         "batch_size=8", "schedule=Constant()", "distributed.heartbeat_timeout=20", "distributed.start_timeout=60")
CLOSE = 1e-5                           # of a loss, in float32: sums in another order


def config(*more):
    return settings.load(str(ROOT / "configs/quickstart.py") + ":size=tiny", [*KNOBS, *more])


def command(folder, *overrides):
    return [sys.executable, "-m", "llmjax", "train", "--config=configs/quickstart.py:size=tiny", f"--workdir={folder}", *(f"--config.{k}" for k in (*KNOBS, *overrides))]


ONE = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "PYTHONUNBUFFERED": "1"}


def launch(count, folder, *overrides, seconds=300):
    done = subprocess.run([sys.executable, "launch/local.py", "-n", str(count), "--", *command(folder, *overrides)], cwd=ROOT, env=ONE, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, (done.stdout + done.stderr)[-1500:]
    return done.stdout


def place(index, count, port):
    return {**ONE, "LLMJAX_COORDINATOR": f"127.0.0.1:{port}", "LLMJAX_NUM_PROCESSES": str(count), "LLMJAX_PROCESS_ID": str(index)}


def start(index, count, port, folder, *overrides):
    return subprocess.Popen(command(folder, *overrides), cwd=ROOT, env=place(index, count, port), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def start_both(folder, *overrides):
    port = free_port()
    return [start(i, 2, port, folder, "layout.fsdp=2", *overrides) for i in range(2)]


def losses(folder):
    rows = [row for row in train.read_rows(folder / "metrics.jsonl") if "loss" in row]
    assert len({row["step"] for row in rows}) == len(rows), "one process writes the metrics"
    return {row["step"]: row["loss"] for row in rows}


def wait_for(folder, processes, step, saved=()):
    def reached():
        return max(losses(folder), default=0) >= step and all((folder / "checkpoints" / str(s)).is_dir() for s in saved)
    deadline = time.time() + 200
    while not reached() and all(p.poll() is None for p in processes) and time.time() < deadline:
        time.sleep(0.02)
    assert reached(), [p.communicate()[0][-500:] for p in processes if p.poll() is not None]


def end(process, seconds):
    """-> (status, what it said)."""
    said, _ = process.communicate(timeout=seconds)
    return process.returncode, said


def last_line(said):
    return said.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Nine steps in one process."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run.train_model(config("steps=9"), folder, quiet=True)
    return folder


def ready(whole, folder):
    """A new run's folder with the tokenizer and shards of another."""
    folder.mkdir()
    shutil.copytree(whole / "data", folder / "data")
    return folder


def same_losses(a, b, steps):
    assert sorted(a) == sorted(b) == steps
    assert max(abs(a[s] - b[s]) / b[s] for s in steps) < CLOSE


def test_two_processes_give_the_losses_of_one(whole, tmp_path):
    """The data are prepared by process 0 while the other waits; the model that lies on both is gathered and saved."""
    folder = tmp_path / "two"
    said = launch(2, folder, "layout.fsdp=2", "steps=9", "eval_every=3")
    same_losses(losses(folder), losses(whole), list(range(1, 10)))
    assert "[0] 2 processes on " in said and "2 devices (cpu), 1 a process; mesh fsdp=2" in said and "[1] step" not in said
    ours, theirs = load_file(folder / "hf/model.safetensors"), load_file(whole / "hf/model.safetensors")
    assert sorted(ours) == sorted(theirs)
    for name in ours:                      # nine steps of Adam at 2e-3 move a weight by up to 0.018; where a gradient is almost nothing its sign is rounding
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-3)
    found = {row["step"]: row["eval_loss"] for row in train.read_rows(folder / "metrics.jsonl") if "eval_loss" in row}
    assert sorted(found) == [3, 6, 9]
    import llmjax
    model, params, tokenizer = llmjax.load(folder, dtype="float32")
    corpus = llmjax.data.build(config().data, whole / "data", context=64, seed=0, progress=False)
    again = train.evaluate(model.apply, params, corpus.validation.batches(8), tokenizer.token_lengths(), model.config.vocab_size)
    assert again["loss"] == pytest.approx(found[9], rel=1e-6), "what was saved has the loss that was evaluated on both processes"


@pytest.mark.slow
def test_a_run_goes_on_in_another_number_of_processes_and_another_layout(whole, tmp_path):
    folder = ready(whole, tmp_path / "elastic")
    launch(2, folder, "layout.fsdp=2", "steps=3")
    run.train_model(config("steps=6"), folder, quiet=True)       # one process of eight devices
    launch(2, folder, "layout.tensor=2", "steps=9")          # both processes read every row: the tensor axis crosses them
    same_losses(losses(folder), losses(whole), list(range(1, 10)))


@pytest.mark.slow
def test_a_run_goes_on_in_four_processes(whole, tmp_path):
    folder = ready(whole, tmp_path / "four")
    launch(1, folder, "steps=3")
    launch(4, folder, "layout.fsdp=2", "layout.tensor=2", "steps=6")
    launch(2, folder, "steps=9", "layout.data=2", "accumulate=1")
    same_losses(losses(folder), losses(whole), list(range(1, 10)))


@pytest.mark.slow
def test_a_host_that_comes_back_with_an_empty_disk_gets_its_copy_from_another(whole, tmp_path):
    folder, disks = ready(whole, tmp_path / "copies"), str(tmp_path / "disk{process}")
    knobs = ("checkpoint_every=None", "layout.fsdp=1", "layout.data=2", f"replicas=Replicas(folder='{disks}', every=1)", "steps=9")
    processes = start_both(folder, *knobs)
    wait_for(folder, processes, 5)
    for process in processes:
        process.kill()
        process.communicate()
    last = max(losses(folder))
    assert not [f for f in (folder / "checkpoints").iterdir() if f.name.isdigit()] and list((tmp_path / "disk1").glob("*/*/*.json"))
    shutil.rmtree(tmp_path / "disk1")
    launch(2, folder, "layout.data=2", *(k for k in knobs if not k.startswith("layout")))
    again = [row["step"] for row in train.read_rows(folder / "metrics.jsonl") if "loss" in row]
    assert min(s for s in again if s > last - 3) > 1 and max(again) == 9
    same_losses(losses(folder), losses(whole), list(range(1, 10)))
    assert not list(tmp_path.glob("disk*/*/*")), "a run that came to its end leaves no copies"


@pytest.mark.parametrize("killed", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_process_ends_the_other_with_its_name(killed, whole, tmp_path):
    folder = ready(whole, tmp_path / "killed")
    processes = start_both(folder, "steps=100000")
    try:
        wait_for(folder, processes, 4, saved=[3])          # which is written while the run goes on
        processes[killed].kill()
        began = time.monotonic()
        status, said = end(processes[1 - killed], 60)
        assert status == 2 and time.monotonic() - began < 20, "within distributed.heartbeat_timeout"
        assert f"llmjax: process {killed} (" in last_line(said) and f"pid {processes[killed].pid}) gives no sign of life" in last_line(said)
        assert (folder / "checkpoints/3").is_dir()
    finally:
        for p in processes:
            p.kill()


def test_sigterm_of_one_process_saves_and_ends_all_at_one_step(whole, tmp_path):
    folder = ready(whole, tmp_path / "stopped")
    processes = start_both(folder, "steps=100000", "checkpoint_every=None")
    try:
        wait_for(folder, processes, 4)
        processes[1].send_signal(signal.SIGTERM)
        answers = [end(p, 60) for p in processes]
        assert [status for status, _ in answers] == [0, 0], answers
        step = max(losses(folder))
        assert [p.name for p in (folder / "checkpoints").iterdir()] == [str(step)] and f"SIGTERM: saved at step {step} of 100000" in answers[0][1]
        assert all(abs(v - losses(whole)[s]) / v < CLOSE for s, v in losses(folder).items() if s <= 9)
    finally:
        for p in processes:
            p.kill()


def both(*pairs):
    """Two processes with overrides of their own, to the end -> (status, output) of each."""
    port = free_port()
    processes = [start(i, 2, port, folder, *overrides) for i, (folder, overrides) in enumerate(pairs)]
    return [end(p, 120) for p in processes]


def test_processes_that_differ_are_told_apart(tmp_path):
    for one, two, field in [(("seed=1",), ("seed=2",), "config.seed = 2, process 0"), ((), ("optimizer=Lion()",), "config.optimizer = Lion, process 0")]:
        for status, said in both((tmp_path / "a", one), (tmp_path / "a", two)):
            assert status == 2 and "llmjax: process 1 (" in last_line(said) and field in last_line(said), said[-800:]
    for status, said in both((tmp_path / "a", ()), (tmp_path / "b", ())):
        assert status == 2 and f"--workdir = {tmp_path / 'b'}, process 0" in last_line(said) and "one folder" in last_line(said), said[-800:]
    assert not list((tmp_path / "a").iterdir())


def test_a_coordinator_that_does_not_answer_is_one_line(tmp_path):
    began = time.monotonic()
    port = free_port()
    done = subprocess.run(command(tmp_path / "a", "distributed.start_timeout=2"), cwd=ROOT, env=place(1, 2, port), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and f"process 0 does not answer at 127.0.0.1:{port}" in done.stderr
    assert time.monotonic() - began < 30 and not (tmp_path / "a").exists()


@pytest.mark.slow
def test_a_process_that_fails_ends_the_other_with_its_reason(whole, tmp_path):
    """Process 1 alone cannot read its data."""
    folder = ready(whole, tmp_path / "fails")
    (tmp_path / "sitecustomize.py").write_text("import os\nif os.environ.get('LLMJAX_PROCESS_ID') == '1':\n    import llmjax.data\n    from llmjax.core import DataError\n"
                                               "    def fail(*a, **k): raise DataError('the disk of this host is broken')\n    llmjax.data.build = fail\n")
    port = free_port()
    processes = [subprocess.Popen(command(folder, "layout.fsdp=2", "steps=9"), cwd=ROOT, env={**place(i, 2, port), "PYTHONPATH": f"{tmp_path}:{ROOT}"}, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, text=True) for i in range(2)]
    (zero, said_zero), (one, said_one) = (end(p, 60) for p in processes)
    assert (zero, one) == (2, 2) and last_line(said_one) == "llmjax: the disk of this host is broken", said_one[-800:]
    assert "llmjax: process 1 (" in last_line(said_zero) and f"pid {processes[1].pid}) failed: the disk of this host is broken" in last_line(said_zero), said_zero[-800:]


class Shelf:
    """jax's key-value store, as far as the heartbeat uses it."""

    def __init__(self):
        self.kept = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        if key in self.kept and not allow_overwrite:
            raise RuntimeError("ALREADY_EXISTS")
        self.kept[key] = value

    def key_value_try_get(self, key):
        if key not in self.kept:
            raise RuntimeError("NOT_FOUND")
        return self.kept[key]

    def key_value_dir_get(self, key):
        return [(k, v) for k, v in self.kept.items() if k.startswith(key)]


def test_who_holds_up_a_step_is_named(monkeypatch):
    """All processes beat, but one does not come out of its step; the time that is taken for anything but a step does not count."""
    now = [0.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    shelf = Shelf()
    pulse = heartbeat.Pulse(shelf, 0, ["a, pid 1", "b, pid 2", "c, pid 3"], "", Distributed(heartbeat_timeout=10, step_timeout=30), "room")

    def turn(seconds, *steps):
        for _ in range(int(seconds)):
            now[0] += 1
            for i, step in enumerate(steps):
                shelf.key_value_set(f"room/beat/{i}", f"{now[0]} {step}", allow_overwrite=True)
            if (wrong := pulse.look()) is not None:
                return wrong
        return None
    assert turn(100, "", "", "") is None and turn(20, 5, 5, 5) is None and turn(20, 6, 6, 6) is None and turn(100, 7, "", 7) is None
    assert turn(20, 8, 8, 8) is None and turn(20, 9, 8, 9) is None
    wrong = turn(20, 9, 8, 9)
    assert wrong.startswith("process 1 (b, pid 2) has not come out of step 8 for 30 s") and shelf.kept["room/fallen"] == wrong
    other = heartbeat.Pulse(shelf, 2, pulse.hosts, "", pulse.timeouts, "room")
    assert other.look() == wrong, "the others are told"
    del shelf.kept["room/fallen"]
    pulse.moved = (frozenset(), now[0])
    assert "no process has come out of step 9" in turn(40, 9, 9, 9)


def test_a_silent_process_is_named(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    shelf = Shelf()
    pulse = heartbeat.Pulse(shelf, 0, ["a, pid 1", "b, pid 2", "c, pid 3"], "", Distributed(heartbeat_timeout=10), "room")
    for t in range(30):
        now[0] = float(t)                  # a look each second
        shelf.key_value_set("room/beat/1", str(t), allow_overwrite=True)
        if t < 8:
            shelf.key_value_set("room/beat/2", str(t), allow_overwrite=True)
        if (wrong := pulse.look()) is not None:
            break
    assert wrong.startswith("process 2 (c, pid 3) gives no sign of life") and t < 8 + 10
    late = heartbeat.Pulse(Shelf(), 0, pulse.hosts, "", pulse.timeouts, "room")
    assert late.look() is None
    now[0] += 1000                         # this process stood still itself: the others are given their time
    assert late.look() is None


def test_one_process_starts_nothing(monkeypatch):
    from llmjax.core import distributed
    for name in list(os.environ):
        if name.startswith(("LLMJAX_", "SLURM_", "OMPI_", "TPU_")):
            monkeypatch.delenv(name)
    with distributed.session(config()) as together:
        assert len(together.hosts) == 1 and together.pulse is None
        with together.first("x") as mine:
            assert mine
        together.enter(3)
        together.agree(["a = 1"], "")
    distributed.barrier("x")
    for name, value in place(1, 2, free_port()).items():
        monkeypatch.setenv(name, value)
    np.asarray(jnp.zeros(1))
    with pytest.raises(ConfigError, match="process 1 of 2.*jax already uses its devices"), distributed.session(config()):
        pass
    assert json.dumps(settings.to_json(config("distributed.step_timeout=None")))
    with pytest.raises(ValueError, match="distributed.heartbeat_timeout=0"):
        config("distributed.heartbeat_timeout=0")
