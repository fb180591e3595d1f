"""`convert` between all layouts: numbers, the account of tensors, the check, what stands in the way, and that nothing saved is lost."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax import cli, convert, models, pretrained, tokenizers
from llmjax.checkpoint import Store, gguf_write
from llmjax.core import Compute
from llmjax.core.errors import CheckpointError
from llmjax.core.model_config import Attention, Layer, Mlp, ModelConfig, find_cycle
from llmjax.core.override import to_json
from llmjax.core.tree import flatten, size

CORPUS = ["The history of the lighthouse begins long before electricity.", "def add(a, b):\n    return a + b  # 12345"] * 3
MODEL = ModelConfig(384, 32, **find_cycle((Layer(Attention(4, 2, 8), Mlp(64)),) * 3), context=64, bos_token=1, end_tokens=(2,), pad_token=0)


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A folder in Hugging Face layout with a tokenizer, weights in float32 that bfloat16 does not hold."""
    folder = tmp_path_factory.mktemp("origin") / "hf"
    model = models.Decoder(MODEL, Compute(dtype="float32", param_dtype="float32"))
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), models.init_params(model, jax.random.key(0)))
    words = tokenizers.train_bpe(CORPUS, 380, ("<pad>", "<s>", "</s>"), eos="</s>", bos="<s>", pad="<pad>", chat_template=tokenizers.CHATML)
    pretrained.save(folder, model, params, words)
    return folder, params, words


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("to", ["hf", "gguf", "orbax"])
def test_every_layout_and_back(to, dtype, origin, tmp_path):
    folder, params, words = origin
    target = tmp_path / ("m.gguf" if to == "gguf" else "out")
    report = convert.convert(folder, target, to=to, dtype=dtype, check=True, progress=False)
    assert report.check.passed and report.check.unexplained == 0 and (report.check.to_source == 0) == (dtype == "float32")
    assert report.family == "llama" and report.tokenizer and report.parameters == size(params)
    model, found, tokenizer = pretrained.load(target, dtype="float32")
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), params)
    if to == "gguf":                                                              # vectors stay in float32 there
        whole, rounded = flatten(params), flatten(rounded)
        assert all(np.array_equal(x, (whole if name.endswith("scale") else rounded)[name]) for name, x in flatten(found).items())
    else:
        assert same(found, rounded)
    assert tokenizer.encode(CORPUS[1]) == words.encode(CORPUS[1]) and tokenizer.chat_template == words.chat_template
    assert (model.config.bos_token, model.config.end_tokens, model.config.pad_token) == (1, (2,), 0)
    back = convert.convert(target, tmp_path / "back", dtype="float32", progress=False)
    assert same(pretrained.load(tmp_path / "back", dtype="float32")[1], found) and back.dtype == "float32"


def test_the_account_names_every_tensor(origin, tmp_path):
    folder, params, _ = origin
    report = convert.convert(folder, tmp_path / "m.gguf", to="gguf", dtype="q8_0", progress=False)
    rows = {t.source: t for t in report.tensors}
    assert set(rows) == set(pretrained.open_checkpoint(folder)[1].shapes) and len(rows) == 2 + 1 + 3 * 9
    row = rows["model.layers.2.self_attn.q_proj.weight"]
    assert row == convert.Moved("model.layers.2.self_attn.q_proj.weight", (32, 32), ("F32", "Q8_0"), ("cycle/0/mixer/q[2]",), ("blk.2.attn_q.weight (m.gguf)",))
    assert sum(int(np.prod(t.shape)) for t in report.tensors) == size(params)
    convert.write_report(tmp_path / "r.json", report)
    convert.write_report(tmp_path / "r.txt", report)
    told = json.loads((tmp_path / "r.json").read_text())
    assert told["tensors"][0]["source"] in rows and len(told["tensors"]) == 30 and len((tmp_path / "r.txt").read_text().splitlines()) == 31
    assert len(convert.lines(report, 3)) == 8


def test_what_is_read_by_nothing_is_told(origin, tmp_path):
    from safetensors.numpy import load_file, save_file
    folder, _, _ = origin
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text((folder / "config.json").read_text())
    save_file(load_file(folder / "model.safetensors") | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)}, tmp_path / "hf" / "model.safetensors")
    report = convert.convert(tmp_path / "hf", tmp_path / "out", dtype="float32", progress=False)
    assert [t.source for t in report.tensors if not t.targets] == ["model.layers.0.self_attn.rotary_emb.inv_freq"] and not report.tokenizer


def test_a_run_without_its_folder_in_hugging_face_layout(origin, tmp_path):
    """The newest checkpoint's parameters, its configuration and its tokenizer; nothing of the optimiser is read."""
    from llmjax import settings
    _, params, words = origin
    run = settings.load("configs/quickstart.py:size=tiny", [])
    import dataclasses as dc
    run = dc.replace(run, model=dc.replace(MODEL, bos_token=None, end_tokens=(), pad_token=None))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_json(run)))
    words.save(folder / "data" / "tokenizer")
    store = Store(folder / "checkpoints")
    for step, factor in ((3, 0.0), (7, 1.0)):
        store.save(step, {"params": jax.tree.map(lambda x, f=factor: x * f, params), "opt_state": {"mu": jnp.ones(3)}, "step": jnp.int32(step)}, wait=True)
    store.close()
    model, found, tokenizer = pretrained.load(folder, dtype="float32")
    assert same(found, params) and model.config.end_tokens == (2,) and model.config.bos_token == 1 and tokenizer.encode("before") == words.encode("before")
    report = convert.convert(folder, tmp_path / "m.gguf", to="gguf", dtype="float32", check=True, progress=False)
    assert report.check.passed and {t.source for t in report.tensors} == set(flatten(params))


def test_what_stands_in_the_way(origin, tmp_path):
    folder = origin[0]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("dear")
    (tmp_path / "m.gguf").write_bytes(b"mine")
    for target, to, overwrite, words in [("full", "hf", False, "it is there already; name another target"), ("full", "hf", True, "something else than a checkpoint of the layout hf"),
                                         ("full", "orbax", True, "something else"), ("m.gguf", "gguf", False, "give --overwrite"), ("full", "gguf", True, "something else"),
                                         ("x.bin", "gguf", False, "ends in .gguf")]:
        with pytest.raises(CheckpointError, match=words):
            convert.convert(folder, tmp_path / target, to=to, overwrite=overwrite, progress=False)
    assert sorted(x.name for x in tmp_path.rglob("*")) == ["diary.txt", "full", "m.gguf"] and (tmp_path / "m.gguf").read_bytes() == b"mine"
    with pytest.raises(CheckpointError, match="hf is written in float32"):
        convert.convert(folder, tmp_path / "out", dtype="q8_0")
    with pytest.raises(CheckpointError, match="--to=ggml is no layout"):
        convert.convert(folder, tmp_path / "out", to="ggml")


@pytest.mark.parametrize("to", ["hf", "gguf", "orbax"])
def test_overwriting_loses_nothing_before_all_is_written(to, origin, tmp_path, monkeypatch):
    folder, params, _ = origin
    target = tmp_path / ("m.gguf" if to == "gguf" else "out")
    convert.convert(folder, target, to=to, dtype="float32", progress=False)
    with monkeypatch.context() as patched:
        def fails(*_, **__):
            raise OSError(28, "No space left on device")
        patched.setattr(*{"hf": ("llmjax.checkpoint.safetensors_file.write_file", fails), "gguf": (gguf_write, "encode", fails), "orbax": (Store, "save", fails)}[to])
        with pytest.raises((CheckpointError, OSError)):
            convert.convert(folder, target, to=to, dtype="bfloat16", overwrite=True, progress=False)
    assert [x.name for x in tmp_path.iterdir()] == [target.name] and same(pretrained.load(target, dtype="float32")[1], params)
    convert.convert(folder, target, to=to, dtype="bfloat16", overwrite=True, progress=False)
    assert [x.name for x in tmp_path.iterdir()] == [target.name] and not same(pretrained.load(target, dtype="float32")[1], params)


def test_a_tokenizer_gguf_cannot_hold(origin, tmp_path):
    model, params, _ = pretrained.load(origin[0], dtype="float32")
    pretrained.save(tmp_path / "a", model, params, tokenizers.characters_tokenizer(CORPUS))
    with pytest.raises(CheckpointError, match="cannot hold this tokenizer"):
        convert.convert(tmp_path / "a", tmp_path / "m.gguf", to="gguf", progress=False)
    convert.convert(tmp_path / "a", tmp_path / "m.gguf", to="gguf", tokenizer=False, progress=False)
    assert pretrained.load(tmp_path / "m.gguf")[2] is None


def test_the_verb(origin, tmp_path, capsys):
    folder = str(origin[0])
    assert cli.main(["convert", folder, str(tmp_path / "m.gguf"), "--to=gguf", "--dtype=q4_0", "--check", f"--report={tmp_path / 'r.json'}"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "24 more (--verbose shows them)" in out[3] and "with a tokenizer" in out[-2] and "(passed)" in out[-1] and (tmp_path / "r.json").exists()
    assert cli.main(["convert", folder, str(tmp_path / "m.gguf"), "--to=gguf"]) == 2 and "--overwrite" in capsys.readouterr().err
    assert cli.main(["convert", folder, str(tmp_path / "m.gguf"), "--to=gguf", "--overwrite", "--verbose", "--no-tokenizer"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 31


def test_a_failed_check_is_status_1(origin, tmp_path, capsys, monkeypatch):
    real = gguf_write.encode
    calls = []

    def wrong(x, kind):                                  # what lands in the file is a little off; what the check rounds in memory is not
        calls.append(kind)
        return real(x * 1.01 if len(calls) == 5 else x, kind)
    monkeypatch.setattr(gguf_write, "encode", wrong)
    assert cli.main(["convert", str(origin[0]), str(tmp_path / "m.gguf"), "--to=gguf", "--check"]) == 1
    assert "FAILED" in capsys.readouterr().out
