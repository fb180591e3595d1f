"""GGUF files: every block type against the gguf package's own dequantiser, every architecture written and read against transformers and llama.cpp, what metadata cannot say."""
import dataclasses as dc
import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import free_port, perturbed

from llmjax import convert, models, pretrained, tokenizers
from llmjax.checkpoint import gguf_file, gguf_models, gguf_write, table
from llmjax.core.errors import CheckpointError
from llmjax.core.positions import DynamicNtk, Llama3Scaling, Rope
from llmjax.core.tree import flatten

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

CORPUS = ["The history of the lighthouse begins long before electricity, it's told.", "def add(a, b):\n    return a + b  # 12345", "Café, naïve, 東京, Ελλάδα, здравствуйте 🙂"] * 4
BASE = dict(vocab_size=384, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
            bos_token_id=1, eos_token_id=2)
ROPE3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
MOE = dict(moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
CASES = {                                                       # (class, what config.json says within what llama.cpp fixes in its source)
    "llama": ("Llama", {**BASE, "attention_bias": True, "tie_word_embeddings": True, "rope_parameters": ROPE3}),
    "llama, yarn": ("Llama", {**BASE, "rope_parameters": dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=16)}),
    "mistral": ("Mistral", {**BASE, "sliding_window": None, "head_dim": 32}),
    "mixtral": ("Mixtral", {**BASE, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen2": ("Qwen2", {**BASE, "use_sliding_window": False}),
    "qwen3": ("Qwen3", {**BASE, "head_dim": 32, "rope_parameters": dict(rope_type="default", rope_theta=1e6)}),
    "qwen3_moe": ("Qwen3Moe", {**BASE, **MOE, "head_dim": 32, "norm_topk_prob": True}),
    "gemma2": ("Gemma2", {**BASE, "head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 32}),
    "gemma3": ("Gemma3", {**BASE, "head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 32, "num_hidden_layers": 7}),
    "phi3": ("Phi3", {**BASE, "partial_rotary_factor": 0.5, "hidden_size": 128, "sliding_window": None}),
    "gpt2": ("GPT2", dict(vocab_size=384, n_embd=64, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)),
    "starcoder2": ("Starcoder2", {**BASE, "sliding_window": None}),
}
TOKENS = np.random.default_rng(2).integers(3, 300, (2, 40)).astype(np.int32)       # longer than the windows and the original contexts above
KINDS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"]


def theirs(name, scale):
    """A model of transformers at a weight scale (0.2 shows a wrong rotary base), its 1-D parameters perturbed so that a swapped or forgotten one shows."""
    prefix, fields = CASES[name]
    config = getattr(transformers, prefix + ("TextConfig" if prefix == "Gemma3" else "Config"))(**fields, initializer_range=scale)
    torch.manual_seed(0)
    return perturbed(getattr(transformers, prefix + ("LMHeadModel" if prefix == "GPT2" else "ForCausalLM"))(config))


def answer(model):
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(TOKENS, dtype=torch.long)).logits.float().numpy()


def far(got, want):
    return float(np.abs(np.asarray(got) - want).max() / want.std())


@pytest.fixture(scope="module")
def tokenizer():
    made = tokenizers.train_bpe(CORPUS, 380, ("<pad>", "<s>", "</s>"), eos="</s>", bos="<s>", pad="<pad>", chat_template=tokenizers.CHATML)
    return made


@pytest.mark.parametrize("scale", [0.02, 0.2])
@pytest.mark.parametrize("name", CASES)
def test_every_architecture_both_ways(name, scale, tmp_path, tokenizer):
    """transformers -> our load -> GGUF -> our load -> Hugging Face folder -> transformers. Float32 throughout: 5e-5 of the logits' deviation is the order of sums."""
    reference = theirs(name, scale)
    reference.save_pretrained(tmp_path / "hf")
    tokenizer.save(tmp_path / "hf")
    report = convert.convert(tmp_path / "hf", tmp_path / "m.gguf", to="gguf", dtype="float32", check=True, progress=False)
    assert report.check.passed and report.check.to_source < 5e-5 and report.tokenizer
    assert all(t.targets or not t.source for t in report.tensors) and sum(bool(t.source) for t in report.tensors) == len(pretrained.open_checkpoint(tmp_path / "hf")[1].shapes)
    model, params, words = pretrained.load(tmp_path / "m.gguf", dtype="float32")
    assert far(model.apply({"params": params}, jnp.asarray(TOKENS))[0], answer(reference)) < 5e-5
    assert all(words.encode(text) == tokenizer.encode(text) for text in CORPUS) and words.chat_template == tokenizer.chat_template
    pretrained.save(tmp_path / "back", model, params)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32).eval()
    assert far(answer(again), answer(reference)) < 5e-5


LLAMA_CPP = """
import json, sys, urllib.request, os
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.cpuparams.n_threads, params.port, params.warmup = sys.argv[1], 64, 1, int(sys.argv[2]), False
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
body = dict(prompt=json.loads(sys.argv[3]), n_predict=12, temperature=0, return_tokens=True, n_probs=4, cache_prompt=False, samplers=["temperature"], ignore_eos=True)
request = urllib.request.Request(server.listening_address + "/completion", data=json.dumps(body).encode(), headers={"Content-Type": "application/json"})
found = json.loads(urllib.request.urlopen(request).read())
print("FOUND" + json.dumps([found["tokens"], [[c["id"], {x["id"]: x["logprob"] for x in c["top_logprobs"]}] for c in found["completion_probabilities"]]]), flush=True)
os._exit(0)
"""


def llama_cpp(file, prompt, port):
    """Greedy continuation by llama.cpp in a process of its own -> (tokens, {step: {token: log-probability} of the best four}); it tells no probabilities for half a character."""
    done = subprocess.run([sys.executable, "-c", LLAMA_CPP, str(file), str(port), json.dumps(prompt)], capture_output=True, text=True, timeout=120, check=False)
    lines = [line for line in done.stdout.splitlines() if "FOUND" in line]
    assert lines, done.stderr[-800:]
    tokens, best = json.loads(lines[0].split("FOUND", 1)[1])
    told, step = {}, 0
    for token, found in best:
        step = tokens.index(token, step)
        told[step], step = {int(k): v for k, v in found.items()}, step + 1
    return tokens, told


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp (llama.cpp in a wheel) is not installed")
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "q8_0", "q4_0"])
@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_reads_what_is_written(name, kind, tmp_path, tokenizer):
    """Along llama.cpp's own greedy path our reading of the same file gives the same next tokens and log-probabilities.

    llama.cpp rounds what 16-bit matrices are multiplied with to 16 bits (2e-2 of a logit here) and what block types are multiplied with to blocks of 8 bits (a tenth and more): there a
    near tie may fall the other way, so what is asked is that its token is as probable as our best, within that.
    """
    if kind != "float32" and name not in ("llama", "qwen3_moe", "gemma3"):
        pytest.skip("the block types are the same for every architecture")
    theirs(name, 0.2).save_pretrained(tmp_path / "hf")
    tokenizer.save(tmp_path / "hf")
    convert.convert(tmp_path / "hf", tmp_path / "m.gguf", to="gguf", dtype=kind, progress=False)
    model, params, _ = pretrained.load(tmp_path / "m.gguf", dtype="float32")
    prompt = TOKENS[0, :20].tolist()
    tokens, best = llama_cpp(tmp_path / "m.gguf", prompt, free_port())
    logprobs = np.asarray(jax.nn.log_softmax(model.apply({"params": params}, jnp.asarray([prompt + tokens]))[0][0].astype(jnp.float32)))[len(prompt) - 1:]
    off = max(abs(value - logprobs[i, t]) for i, found in best.items() for t, value in found.items())
    limit = {"float32": 5e-3, "bfloat16": 0.1, "float16": 0.1}.get(kind, 1.0)       # nats; llama.cpp looks GELU up in a table of float16 numbers (2e-3)
    assert off < limit and len(tokens) == 12 and len(best) > 1
    assert all(logprobs[i].max() - logprobs[i, t] < 2 * limit for i, t in enumerate(tokens))
    if kind == "float32":
        assert tokens == [int(logprobs[i].argmax()) for i in range(12)]


# Block types


def random_blocks(kind, rows, columns):
    """Random bytes of a block type whose scales are finite."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = np.random.default_rng(3).integers(0, 256, (rows, columns // block * size), np.uint8)
    if kind in ("F32", "F16", "BF16"):
        x = np.random.default_rng(4).standard_normal((rows, columns)).astype(np.float32)
        return gguf_write.encode(x, kind)
    blocks = raw.reshape(rows, -1, size)
    if kind == "MXFP4":
        blocks[..., 0] = 120 + blocks[..., 0] % 16                                    # the shared exponent
        return raw
    scales = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(kind, (0, 2) if kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else (0,))
    for at in scales:                                                                  # float16 numbers around a hundredth
        blocks[..., at + 1] = 0x20 + blocks[..., at + 1] % 8
    return raw


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_type(kind, tmp_path):
    """Numbers bit for bit, whole and by rows."""
    rows, columns = 6, 512
    raw, qtype = random_blocks(kind, rows, columns), gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x", raw if kind not in ("F32", "F16") else raw.view(np.float32 if kind == "F32" else np.float16), raw_dtype=qtype if kind not in ("F32", "F16") else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file, want = gguf_file.Gguf(tmp_path / "m.gguf"), gguf.quants.dequantize(raw, qtype)
    assert file.shapes["x"] == (rows, columns) and file.describe("x") == (kind, "m.gguf") and np.isfinite(want).all()
    np.testing.assert_array_equal(np.asarray(file.read("x"), np.float32), want)
    np.testing.assert_array_equal(np.asarray(file.read("x", 2, 5), np.float32), want[2:5])


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"])
def test_written_numbers_are_those_that_are_read(kind, tmp_path):
    x = np.random.default_rng(5).standard_normal((5, 96)).astype(np.float32)
    tensors = [gguf_write.Tensor("a", (5, 96), kind, lambda: x), gguf_write.Tensor("b", (7,), "F32", lambda: x[0, :7])]
    gguf_write.write(tmp_path / "m.gguf", {"general.architecture": "llama", "llama.some": 3, "llama.list": [1, -2], "llama.yes": True, "llama.x": 0.5, "t": ["ä", ""]}, tensors, kind)
    file = gguf_file.Gguf(tmp_path / "m.gguf")
    np.testing.assert_array_equal(np.asarray(file.read("a"), np.float32), gguf_write.decode(gguf_write.encode(x, kind), kind))
    np.testing.assert_array_equal(file.read("b"), x[0, :7])
    assert (file.fields["llama.some"], file.fields["llama.list"], file.fields["llama.yes"], file.fields["llama.x"], file.fields["t"]) == (3, [1, -2], True, 0.5, ["ä", ""])


def test_numbers_float16_cannot_hold(tmp_path):
    with pytest.raises(CheckpointError, match="the tensor 'a' cannot be written: numbers beyond 65504"):
        gguf_write.write(tmp_path / "m.gguf", {"general.architecture": "llama"}, [gguf_write.Tensor("a", (1, 32), "F16", lambda: np.full((1, 32), 1e5, np.float32))], "F16")
    assert list(tmp_path.iterdir()) == []


# What metadata cannot say


@pytest.mark.parametrize(("name", "change", "words"), [
    ("llama", lambda x: dc.replace(x, mixer=dc.replace(x.mixer, window=8)), r"layers\[0\].mixer.window=8"),
    ("llama", lambda x: dc.replace(x, mixer=dc.replace(x.mixer, rope=Rope(scaling=DynamicNtk(2.0, 16)))), "rope.scaling"),
    ("llama", lambda x: dc.replace(x, mixer=dc.replace(x.mixer, rope=Rope(scaling=Llama3Scaling(8.0, 1.0, 3.0, 16)))), "no Llama 3 scaling"),
    ("gemma2", lambda x: dc.replace(x, mixer=dc.replace(x.mixer, scale=0.3)), "mixer.scale=0.3"),
    ("gpt2", lambda x: dc.replace(x, mixer=dc.replace(x.mixer, scale=0.3)), "mixer.scale=0.3"),
    ("qwen3_moe", lambda x: dc.replace(x, ffn=dc.replace(x.ffn, renormalize=False)), "renormalize=False"),
])
def test_what_gguf_cannot_express(name, change, words):
    config = transformers.AutoConfig.for_model(CASES[name][0].lower() if name != "qwen3_moe" else "qwen3_moe", **CASES[name][1]).to_dict()
    from llmjax.checkpoint import to_model_config
    made = to_model_config(config)
    made = dc.replace(made, prefix=tuple(change(x) for x in made.layers), cycle=(), repeats=0, suffix=())
    with pytest.raises(CheckpointError, match=words):
        gguf_models.to_gguf(made, flatten(models.abstract_params(models.Decoder(made))))


def test_a_family_without_an_architecture():
    from llmjax.checkpoint import to_model_config
    made = to_model_config(transformers.OlmoConfig(**BASE).to_dict() | {"model_type": "olmo2"})
    with pytest.raises(CheckpointError, match="family 'olmo2' are not written as GGUF.*known: bert, gemma2"):
        gguf_models.to_gguf(made, flatten(models.abstract_params(models.Decoder(made))))


def test_a_check_catches_a_wrong_order_of_rows(tmp_path, monkeypatch):
    """Rows of q and k written without llama's order of pairs: the check's comparison of what was written must see it."""
    theirs("llama", 0.2).save_pretrained(tmp_path / "hf")
    spoiled = {name: (lambda x: np.ascontiguousarray(x[::-1])) for name in ("blk.0.attn_q.weight",)}
    real = gguf_write.write

    def write(file, fields, tensors, *more):
        real(file, fields, [dc.replace(t, make=lambda t=t: spoiled[t.name](t.make())) if t.name in spoiled else t for t in tensors], *more)
    monkeypatch.setattr(gguf_write, "write", write)
    report = convert.convert(tmp_path / "hf", tmp_path / "m.gguf", to="gguf", dtype="q8_0", check=True, progress=False)
    assert not report.check.passed


def test_what_the_rows_of_a_table_say(tmp_path):
    """Each table makes a name once for a model, whichever way it is read: BERT's pooler is its encoder's or its classifier's, of which a model has one."""
    for name, arch in gguf_models.ARCHITECTURES.items():
        for rows in filter(None, (arch.table, arch.experts)):
            names = [row.name for row in rows.rows]
            assert isinstance(rows, table.Table) and {x for x in names if names.count(x) > 1} <= ({"cls.weight", "cls.bias"} if name == "bert" else set()), name
