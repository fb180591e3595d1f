"""Whole runs at the smoke size: the folder they leave, going on after a kill and after SIGTERM, other layouts, what is refused; and the verbs on the model they made."""
import dataclasses as dc
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import llmjax
from llmjax import cli, run, settings, train
from llmjax.core import ConfigError, Guard
from llmjax.objectives import NextToken

ROOT = pathlib.Path(__file__).parent.parent
TINY = "configs/quickstart.py:size=tiny"
KNOBS = ("steps=8", "log_every=1", "checkpoint_every=3", "eval_every=4", "compute.dtype=float32", "compute.unroll=False", "data.source.max_bytes=150000", "batch_size=8")


def config(*more):
    return settings.load(str(ROOT / "configs/quickstart.py") + ":size=tiny", [*KNOBS, *more])


def losses(folder):
    return {row["step"]: row["loss"] for row in train.read_rows(folder / "metrics.jsonl") if "loss" in row}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    found = run.train_model(config(), folder, quiet=True)
    return folder, found


def test_the_folder_of_a_run(whole):
    folder, found = whole
    assert sorted(losses(folder)) == list(range(1, 9)) and found["loss"] < losses(folder)[1]
    for name in ("config.json", "data", "checkpoints/8", "hf/config.json", "hf/model.safetensors", "hf/tokenizer.json", "plots/loss.png"):
        assert (folder / name).exists(), name
    assert (folder / "plots/loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert found["eval_perplexity"] == pytest.approx(np.exp(found["eval_loss"])) and 2 < found["eval_bits_per_byte"] < 8
    assert all(k in found for k in ("tokens_per_second", "mfu", "grad_norm", "learning_rate", "memory_peak_bytes"))
    assert not [p for p in folder.rglob("*") if "tmp" in p.name or p.suffix == ".part"]
    assert settings.load(str(folder / "config.json")) == config()


def test_the_saved_model_has_the_evaluated_loss(whole):
    """The Hugging Face folder, loaded and scored on the same held-out batches, gives the run's last evaluation."""
    folder, found = whole
    model, params, tokenizer = llmjax.load(folder, dtype="float32")
    corpus = llmjax.data.build(config().data, folder / "data", context=64, seed=0, progress=False)
    again = train.evaluate(model.apply, params, corpus.validation.batches(8), tokenizer.token_lengths(), model.config.vocab_size)
    assert again["loss"] == pytest.approx(found["eval_loss"], rel=1e-6) and again["bits_per_byte"] == pytest.approx(found["eval_bits_per_byte"], rel=1e-6)
    assert model.config.end_tokens == (tokenizer.eos_id,)


def start(folder, *overrides):
    call = [sys.executable, "-m", "llmjax", "train", f"--config={TINY}", f"--workdir={folder}", "--quiet", *(f"--config.{k}" for k in (*KNOBS, *overrides))]
    return subprocess.Popen(call, cwd=ROOT, env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(folder, process, step):
    deadline = time.time() + 300
    while max(losses(folder), default=0) < step and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)


def test_killed_and_stopped_runs_go_on_bit_for_bit(whole, tmp_path):
    reference = losses(whole[0])
    folder = tmp_path / "broken"
    process = start(folder, "steps=200")           # long enough to be met in the middle; a run may be given another length
    wait_for(folder, process, 4)
    process.send_signal(signal.SIGKILL)
    process.wait()
    seen = losses(folder)
    process = start(folder, "steps=200")
    wait_for(folder, process, max(seen) + 1)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said[-500:]
    assert set(losses(folder)) >= set(seen) and all(losses(folder)[s] == v for s, v in seen.items())
    assert max(losses(folder)) == max(int(p.name) for p in (folder / "checkpoints").iterdir()), "SIGTERM saves where it stopped"
    assert reference[1] == pytest.approx(seen[1], rel=1e-6)      # only step 1: the schedule of a longer run differs after it


def test_going_on_is_exact_in_process(whole, tmp_path):
    """Stopped by an error in step 5 and started again: the same losses and the same weights, to the bit."""
    folder = tmp_path / "again"
    broken = config()

    class Fails(Exception):
        pass
    real = train.JsonLines.__call__

    def fail(self, step, metrics):
        real(self, step, metrics)
        if step == 5 and "loss" in metrics:
            raise Fails
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Fails):
        patch.setattr(train.JsonLines, "__call__", fail)
        run.train_model(broken, folder, quiet=True)
    run.train_model(broken, folder, quiet=True)
    assert losses(folder) == losses(whole[0])
    assert (folder / "hf/model.safetensors").read_bytes() == (whole[0] / "hf/model.safetensors").read_bytes()
    before = (folder / "metrics.jsonl").read_text()
    run.train_model(broken, folder, quiet=True)     # complete: nothing is done again
    assert (folder / "metrics.jsonl").read_text() == before


def test_a_mesh_changes_nothing_and_a_run_goes_on_on_another(whole, tmp_path):
    folder = tmp_path / "mesh"
    part = dc.replace(config("layout.fsdp=4", "layout.tensor=2"), steps=8)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        def stop(self, step, metrics):
            if step == 4:
                raise KeyboardInterrupt
        patch.setattr(train.JsonLines, "__call__", stop)
        run.train_model(part, folder, quiet=True)
    run.train_model(config("layout.data=8"), folder, quiet=True)
    for step, loss in losses(folder).items():
        assert loss == pytest.approx(losses(whole[0])[step], rel=1e-5)        # sums over devices in another order
    assert max(losses(folder)) == 8


def test_guard_stops_and_says_why(tmp_path, whole):
    bad = dc.replace(config("optimizer.learning_rate=1e8", "optimizer.clip=None", "checkpoint_every=1", "eval_every=None", "steps=30"), objective=NextToken())
    with pytest.raises(train.TrainingStopped, match=r"step \d+: .*(not a finite|not finite).*learning rate"):
        run.train_model(bad, tmp_path / "stops", quiet=True)
    watch = train.Watch(Guard("skip", spike=4.0, patience=3))
    rng = np.random.default_rng(0)
    for i in range(40):
        assert watch.look(i, 2 + 0.1 * rng.standard_normal(), False) is None
    assert watch.limit() == pytest.approx(2.4, abs=0.15) and "standard deviations" in watch.look(41, 5.0, True)
    again = train.Watch(Guard("skip", spike=4.0, patience=3), **watch.state())
    assert again.limit() == watch.limit()
    with pytest.raises(train.TrainingStopped, match="3th such step in a row|in a row"):
        for i in range(3):
            again.look(42 + i, float("nan"), True)


@pytest.mark.parametrize("overrides, word", [
    (["model.vocab_size=300"], "model.vocab_size=300 is too small"), (["layout.data=3"], "needs 3 devices"), (["batch_size=9", "layout.data=8"], "batch_size=9"),
    (["layout.tensor=8"], "does not divide over tensor=8"), (["layout.expert=8"], "layout.expert=8"), (["layout.stage=8"], "stage=8"), (["context=65"], "context=65")])
def test_what_cannot_be_run_is_refused(overrides, word, tmp_path, whole):
    import shutil
    folder = tmp_path / "refused"
    folder.mkdir()
    shutil.copytree(whole[0] / "data", folder / "data")
    with pytest.raises(ValueError, match=word) as caught:
        run.train_model(config(*overrides), folder, quiet=True)
    assert "\n" not in str(caught.value)


def test_another_run_in_the_folder_is_refused(whole):
    with pytest.raises(ConfigError, match="optimizer.learning_rate was 0.002, now 0.5"):
        run.train_model(config("optimizer.learning_rate=0.5"), whole[0], quiet=True)


def ask(capsys, *argv):
    status = cli.main(list(argv))
    out = capsys.readouterr()
    return status, out.out, out.err


def test_verbs_on_a_model(whole, capsys, tmp_path):
    folder = str(whole[0])
    status, out, _ = ask(capsys, "generate", f"--model={folder}", "--prompt=def f(", "--prompt=import", "--max-new-tokens=4", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and [r["prompt"] for r in rows] == ["def f(", "import"] and all(r["tokens"] <= 4 for r in rows)
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('"def f("\n{"prompt": "import"}\n')
    assert [json.loads(x) for x in ask(capsys, "generate", f"--model={folder}", f"--prompts={prompts}", "--max-new-tokens=4")[1].splitlines()] == rows
    text = tmp_path / "text.txt"
    text.write_text("def add(a, b):\n    return a + b\n" * 20)
    status, out, _ = ask(capsys, "eval", f"--model={folder}", f"--file={text}", "--context=32", "--json")
    found = json.loads(out)
    assert status == 0 and found["perplexity"] == pytest.approx(np.exp(found["loss"])) and found["bits_per_byte"] > 0
    status, out, _ = ask(capsys, "convert", folder, str(tmp_path / "half"), "--dtype=bfloat16")
    assert status == 0 and (tmp_path / "half/model.safetensors").stat().st_size < 0.6 * (whole[0] / "hf/model.safetensors").stat().st_size
    status, out, _ = ask(capsys, "tokenizer", "encode", f"--tokenizer={folder}", "--text=import os")
    assert status == 0 and ask(capsys, "tokenizer", "decode", f"--tokenizer={folder}", f"--ids={out.strip()}")[1].strip() == "import os"
    assert ask(capsys, "tokenizer", "train", str(text), f"--out={tmp_path / 'tok'}", "--vocab-size=280")[0] == 0 and (tmp_path / "tok/tokenizer.json").exists()
    status, out, _ = ask(capsys, "show", f"--model={folder}")
    assert status == 0 and "parameters:" in out and "model.vocab_size = 512" in out
    assert ask(capsys, "generate", f"--model={folder}")[0] == 2


def test_errors_are_one_line_with_status_2(capsys, tmp_path):
    for argv, word in [(["trian"], "train"), (["train", "--config=configs/nowhere.py"], "nowhere"), (["show", f"--config={TINY}", "--config.stepz=3"], "steps"),
                       (["show", f"--config={TINY}", "--config.steps=many"], "steps"), (["generate", "--model=./nowhere", "--prompt=x"], "nowhere"), (["show", f"--config={TINY},sise=1"], "size"),
                       (["show", "--config=configs/quickstart.py:size=huge"], "huge"), (["eval", "--model=x"], "--file"), (["chat", "--model=smollm3"], "smollm")]:
        status, _, err = ask(capsys, *argv)
        assert status == 2 and word in err and len(err.strip().splitlines()) == 1, (argv, err)


def test_show_and_help(capsys):
    status, out, _ = ask(capsys, "show", f"--config={TINY}", "--config.optimizer=Muon(learning_rate=0.05)", "--config.steps=2ep", "--config.model.cycle.0.ffn.hidden=64")
    assert status == 0 and "config.optimizer : Muon" in out and "config.optimizer.learning_rate = 0.05" in out and "config.steps = '2ep'" in out and "config.model.cycle.0.ffn.hidden = 64" in out
    status, out, _ = ask(capsys, "show", f"--config={TINY}", "--sharding", "--config.layout.fsdp=8")
    assert status == 0 and "cycle/0/mixer/q" in out and "fsdp" in out
    for verb in cli.VERBS:
        with pytest.raises(SystemExit) as done:
            cli.main([verb, "--help"])
        assert done.value.code == 0 and len(capsys.readouterr().out) > 200


def test_every_configuration_is_built(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("To be, or not to be.\n" * 200)
    arguments = {"quickstart.py": ["", "size=tiny", "size=tiny,experts=4"], "shakespeare_char.py": [f"path={text}"], "pretrain.py": ["model=qwen3-0.6b", "model=llama-3.1-405b,suffix=14"]}
    for file in sorted((ROOT / "configs").glob("*.py")):
        for args in arguments[file.name]:
            made = settings.load(f"{file}:{args}")
            assert settings.from_json(json.loads(json.dumps(settings.to_json(made)))) == made


def test_shakespeare_takes_a_step(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("To be, or not to be, that is the question.\n" * 200)
    found = run.train_model(settings.load(f"{ROOT / 'configs/shakespeare_char.py'}:path={text}", ["steps=2", "compute.unroll=False", "batch_size=16"]), tmp_path / "run", quiet=True)
    assert found["eval_loss"] < 5
