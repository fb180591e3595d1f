"""GPTQ, AWQ and FP8 folders: packed here after the published descriptions, read back to exactly the numbers they stand for; settings and parts that do not fit are named.

The packers follow AutoGPTQ's QuantLinear.pack (qlinear_cuda_old), AutoAWQ's WQLinear_GEMM.from_linear, and DeepSeek-V3's inference/fp8_cast_bf16.py, one number at a time.
"""
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from llmjax import pretrained
from llmjax.checkpoint import quantized
from llmjax.core.errors import CheckpointError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

BASE = dict(vocab_size=96, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1,
            eos_token_id=2, initializer_range=0.2)
TOKENS = np.random.default_rng(2).integers(3, 96, (2, 24)).astype(np.int32)


def stream(numbers, bits):
    """Numbers as one stream of bits from the lowest on, in words of 32."""
    whole = sum(int(n) << (bits * i) for i, n in enumerate(numbers))
    return np.array([(whole >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(numbers) * bits // 32))], np.uint32).view(np.int32)


def auto_gptq_3_bits(numbers):
    """AutoGPTQ's own loop for 3 bits, 32 numbers in three words."""
    row, i, out = 0, 0, np.zeros(len(numbers) // 32 * 3, np.uint32)
    x = np.asarray(numbers, np.uint32)
    while row < len(out):
        for j in range(i, i + 10):
            out[row] |= x[j] << np.uint32(3 * (j - i))
        i += 10
        out[row] |= x[i] << np.uint32(30)
        row += 1
        out[row] |= (x[i] >> np.uint32(2)) & np.uint32(1)
        i += 1
        for j in range(i, i + 10):
            out[row] |= x[j] << np.uint32(3 * (j - i) + 1)
        i += 10
        out[row] |= x[i] << np.uint32(31)
        row += 1
        out[row] |= (x[i] >> np.uint32(1)) & np.uint32(3)
        i += 1
        for j in range(i, i + 10):
            out[row] |= x[j] << np.uint32(3 * (j - i) + 2)
        i, row = i + 10, row + 1
    return out.view(np.int32)


def gptq(w, bits, group, version=1, ordered=False):
    """(tensors, the numbers they stand for): w [outputs, inputs]."""
    rng, (outputs, inputs) = np.random.default_rng(0), w.shape
    groups = 1 if group == -1 else -(-inputs // group)
    index = np.arange(inputs) // (inputs if group == -1 else group)
    index = rng.permutation(index) if ordered else index
    q, zeros = rng.integers(0, 2 ** bits, (inputs, outputs)), rng.integers(0, 2 ** bits, (groups, outputs))
    scales = (0.02 + rng.random((groups, outputs)) * 0.05).astype(np.float16)
    kept = (zeros - (version == 1)) % 2 ** bits
    parts = {"qweight": np.stack([stream(q[:, o], bits) for o in range(outputs)], 1), "qzeros": np.stack([stream(kept[g], bits) for g in range(groups)]), "scales": scales,
             "g_idx": index.astype(np.int32)}
    return parts, ((q - zeros[index]).astype(np.float32) * scales.astype(np.float32)[index]).T


def awq(w, group):
    rng, (outputs, inputs) = np.random.default_rng(1), w.shape
    groups = 1 if group == -1 else inputs // group
    q, zeros = rng.integers(0, 16, (inputs, outputs)), rng.integers(0, 16, (groups, outputs))
    scales = (0.02 + rng.random((groups, outputs)) * 0.05).astype(np.float16)

    def pack(x):
        out = np.zeros((x.shape[0], outputs // 8), np.uint32)
        for word in range(outputs // 8):
            for place, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                out[:, word] |= x[:, word * 8 + column].astype(np.uint32) << np.uint32(4 * place)
        return out.view(np.int32)
    index = np.arange(inputs) // (inputs if group == -1 else group)
    return {"qweight": pack(q), "qzeros": pack(zeros), "scales": scales}, ((q - zeros[index]).astype(np.float32) * scales.astype(np.float32)[index]).T


def fp8(w, block):
    """torch's own float8 and its arithmetic."""
    w = torch.as_tensor(w)
    rows, columns = (-(-n // b) for n, b in zip(w.shape, block))
    factors, stored, exact = torch.zeros(rows, columns), torch.zeros(w.shape, dtype=torch.float8_e4m3fn), torch.zeros(w.shape)
    for i in range(rows):
        for j in range(columns):
            at = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            factors[i, j] = w[at].abs().max() / 448.0
            stored[at] = (w[at] / factors[i, j]).to(torch.float8_e4m3fn)
            exact[at] = stored[at].to(torch.float32) * factors[i, j]
    return {"weight": stored, "weight_scale_inv": factors}, exact.numpy()


SCHEMES = {
    "gptq": (dict(quant_method="gptq", bits=4, group_size=32, desc_act=False, sym=True, damp_percent=0.1, checkpoint_format="gptq"), lambda w: gptq(w, 4, 32)),
    "gptq v2": (dict(quant_method="gptq", bits=4, group_size=32, desc_act=False, checkpoint_format="gptq_v2", meta={"quantizer": ["gptqmodel:1.4"]}), lambda w: gptq(w, 4, 32, 2)),
    "gptq desc_act": (dict(quant_method="gptq", bits=4, group_size=32, desc_act=True), lambda w: gptq(w, 4, 32, ordered=True)),
    "gptq 3 bits": (dict(quant_method="gptq", bits=3, group_size=-1, desc_act=False), lambda w: gptq(w, 3, -1)),
    "gptq 8 bits": (dict(quant_method="gptq", bits=8, group_size=48, desc_act=False), lambda w: gptq(w, 8, 48)),
    "gptq 2 bits": (dict(quant_method="gptq", bits=2, group_size=64, desc_act=False), lambda w: gptq(w, 2, 64)),
    "awq": (dict(quant_method="awq", bits=4, group_size=32, zero_point=True, version="gemm", modules_to_not_convert=None), lambda w: awq(w, 32)),
    "awq whole": (dict(quant_method="awq", w_bit=4, q_group_size=-1, zero_point=True, version="GEMM"), lambda w: awq(w, -1)),
    "fp8": (dict(quant_method="fp8", activation_scheme="dynamic", fmt="e4m3", weight_block_size=[128, 128]), lambda w: fp8(w, (128, 128))),
    "fp8 small": (dict(quant_method="fp8", activation_scheme="dynamic", weight_block_size=[48, 40]), lambda w: fp8(w, (48, 40))),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE)).save_pretrained(folder)
    return folder


def quantise(plain, folder, config, pack, keep=()):
    """The plain folder with its layers packed -> the unquantised tensors that it stands for."""
    from safetensors.torch import save_file
    tensors, exact, out = load_file(plain / "model.safetensors"), {}, {}
    for name, x in tensors.items():
        exact[name] = x
        if ".layers." in name and x.ndim == 2 and name not in keep:
            parts, exact[name] = pack(x)
            out |= {name.removesuffix("weight") + part: torch.as_tensor(y) for part, y in parts.items()}
        else:
            out[name] = torch.as_tensor(x)
    folder.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in out.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**json.loads((plain / "config.json").read_text()), "quantization_config": config}))
    return exact


@pytest.mark.parametrize("name", SCHEMES)
def test_the_numbers_and_the_logits(name, plain, tmp_path, monkeypatch):
    """Every tensor bit for bit, and the logits of transformers on the unquantised numbers."""
    config, pack = SCHEMES[name]
    exact = quantise(plain, tmp_path / "q", config, pack)
    monkeypatch.setattr("llmjax.checkpoint.table.PORTION", 1000)                    # rows in portions too
    _, source, _ = pretrained.open_checkpoint(tmp_path / "q")
    assert set(source.shapes) == set(exact)
    for key, x in exact.items():
        np.testing.assert_array_equal(np.asarray(source.read(key), np.float32), x, err_msg=key)
        np.testing.assert_array_equal(np.asarray(source.read(key, 3, 7), np.float32), x[3:7])
    model, params, _ = pretrained.load(tmp_path / "q", dtype="float32")
    reference = transformers.LlamaForCausalLM.from_pretrained(plain).eval()
    reference.load_state_dict({k: torch.as_tensor(np.ascontiguousarray(v)) for k, v in exact.items()})
    with torch.no_grad():
        want = reference(torch.as_tensor(TOKENS, dtype=torch.long)).logits.numpy()
    got = np.asarray(model.apply({"params": params}, jnp.asarray(TOKENS))[0])
    assert np.abs(got - want).max() / want.std() < 5e-5                              # float32 on both sides, another order of sums
    pretrained.save(tmp_path / "out", model, params)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert all(np.array_equal(x, exact[k]) for k, x in load_file(tmp_path / "out" / "model.safetensors").items())


def test_three_bits_as_auto_gptq_packs_them():
    numbers = np.random.default_rng(0).integers(0, 8, 96)
    np.testing.assert_array_equal(auto_gptq_3_bits(numbers), stream(numbers, 3))
    np.testing.assert_array_equal(quantized.unpack(auto_gptq_3_bits(numbers)[:, None], 3)[:, 0], numbers)


@pytest.mark.parametrize(("one", "other"), [("gptq", "gptq v2"), ("gptq desc_act", "gptq"), ("fp8", "fp8 small")])
def test_another_convention_gives_other_numbers(one, other, plain, tmp_path):
    """The tests above can tell the conventions apart: a folder packed in one and labelled as the other is refused or reads as other numbers."""
    exact = quantise(plain, tmp_path / "q", SCHEMES[other][0], SCHEMES[one][1])
    if one.startswith("fp8"):
        with pytest.raises(CheckpointError, match=r"weight_scale_inv' has shape \(1, 2\).*it would be \(2, 5\)"):
            pretrained.open_checkpoint(tmp_path / "q")
        return
    _, source, _ = pretrained.open_checkpoint(tmp_path / "q")
    key = "model.layers.0.self_attn.q_proj.weight"
    assert np.array_equal(source.read(key), exact[key]) == (one == "gptq desc_act")      # g_idx stands in the file whatever desc_act says


def test_biases_of_zeros_are_passed_over(plain, tmp_path):
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file
    quantise(plain, tmp_path / "q", *SCHEMES["gptq"])
    file, name = tmp_path / "q" / "model.safetensors", "model.layers.1.self_attn.o_proj.bias"
    for value, words in ((0.0, None), (1.0, "nothing reads 'model.layers.1.self_attn.o_proj.bias'")):
        save_file(load_torch(file) | {name: torch.full((64,), value)}, file)
        if words is None:
            pretrained.load(tmp_path / "q")
        else:
            with pytest.raises(CheckpointError, match=words):
                pretrained.load(tmp_path / "q")


@pytest.mark.parametrize(("name", "change", "words"), [
    ("gptq", {"quant_method": "bitsandbytes"}, r"quantised \(bitsandbytes\), which this version does not read; gptq, awq, fp8, mxfp4 are"),
    ("gptq", {"bits": 5}, r"bits='5' is not read \(2, 3, 4, 8 are\)"), ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format='marlin' is not read"),
    ("gptq", {"dynamic": {"-:.*": {}}}, "dynamic=.*is a field this version does not know"), ("awq", {"version": "gemv"}, "version='gemv' is not read"),
    ("awq", {"zero_point": False}, "zero_point='False' is not read"), ("fp8", {"fmt": "e5m2"}, "fmt='e5m2' is not read"),
    ("fp8", {"weight_block_size": None}, "weight_block_size=None is not read"),
    ("gptq", {"bits": True}, "bits='True' is not read"),
    ("gptq", {"group_size": None}, "group_size is null"), ("fp8", {"bits": 8}, "bits='8' is a field this version does not know"),
    ("gptq", {"group_size": 16}, r"scales' has shape .*it would be \(12, 64\)"),
    ("gptq", {"group_size": 0}, "group_size=0: a whole number from 1"),
])
def test_settings_that_are_not_read(name, change, words, plain, tmp_path):
    config, pack = SCHEMES[name]
    quantise(plain, tmp_path / "q", {**config, **change}, pack)
    with pytest.raises(CheckpointError, match=words) as error:
        pretrained.load(tmp_path / "q")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(("name", "missing", "words"), [
    ("gptq desc_act", "g_idx", "has no g_idx"), ("gptq", "qzeros", "has no qzeros"), ("awq", "qweight", "belongs to a quantised layer that has no qweight"), ("fp8", "weight", "has no weight"),
])
def test_parts_that_are_missing(name, missing, words, plain, tmp_path):
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file
    quantise(plain, tmp_path / "q", *SCHEMES[name])
    file = tmp_path / "q" / "model.safetensors"
    tensors = load_torch(file)
    tensors.pop(f"model.layers.1.mlp.up_proj.{missing}")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=words):
        pretrained.load(tmp_path / "q")


def test_groups_that_do_not_exist(plain, tmp_path):
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file
    quantise(plain, tmp_path / "q", *SCHEMES["gptq desc_act"])
    file = tmp_path / "q" / "model.safetensors"
    tensors = load_torch(file)
    tensors["model.layers.1.mlp.up_proj.g_idx"][3] = 9
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"'model.layers.1.mlp.up_proj' cannot be read: g_idx names the group 9 of 2"):
        pretrained.load(tmp_path / "q")


def test_straight_onto_a_mesh(plain, tmp_path):
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 (fake) devices")
    from llmjax.core import make_mesh
    quantise(plain, tmp_path / "q", *SCHEMES["gptq"])
    ours, sharded = (pretrained.load(tmp_path / "q", dtype="float32", mesh=mesh)[1] for mesh in (None, make_mesh(fsdp=4, tensor=2)))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, ours, sharded)))


def test_mxfp4(tmp_path):
    """gpt-oss as it is published: experts in MXFP4, the rest as it is, against transformers' own unpacking."""
    from safetensors.numpy import save_file
    from transformers.integrations.mxfp4 import _convert_moe_packed_tensors
    fields = {**BASE, "intermediate_size": 96, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**fields)).eval().float()
    rng, packed = np.random.default_rng(0), {}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("gate_up_proj", "down_proj")):
                experts, inputs, outputs = p.shape
                blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16)).astype(np.uint8)
                scales = rng.integers(120, 128, (experts, outputs, inputs // 32)).astype(np.uint8)
                packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
                p.copy_(_convert_moe_packed_tensors(torch.as_tensor(blocks), torch.as_tensor(scales), dtype=torch.float32))
        want = model(input_ids=torch.as_tensor(TOKENS, dtype=torch.long)).logits.numpy()
    model.save_pretrained(tmp_path)
    tensors = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if not k.endswith(("gate_up_proj", "down_proj"))}
    save_file(tensors | packed, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, params, _ = pretrained.load(tmp_path, dtype="float32")
    got = np.asarray(ours.apply({"params": params}, jnp.asarray(TOKENS))[0])
    assert np.abs(got - want).max() < 5e-5 * want.std()                                  # both in float32: the order of sums
