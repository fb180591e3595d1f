"""LoRA adapters that PEFT made, on tiny models of transformers: logits, and what is refused."""
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from tiny_models import perturbed

import llmjax
from llmjax import decode, pretrained
from llmjax.checkpoint.lora_folder import Low, with_adapters
from llmjax.core import CheckpointError, Lora, chosen
from llmjax.core.leaves import is_leaf

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
SIZES = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
KINDS = {"llama": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=False), "qwen2": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
         "gpt2": lambda: transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64)}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {"llama": dict(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj", "embed_tokens", "lm_head"]),
            "qwen2": dict(r=4, lora_alpha=6, target_modules=ALL, use_rslora=True, rank_pattern={"q_proj": 2, "1.mlp.up_proj": 6}, alpha_pattern={"v_proj": 20}, layers_to_transform=None),
            "gpt2": dict(r=3, lora_alpha=6, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)}
IDS = np.random.default_rng(0).integers(0, 96, (3, 20))


def make(kind, folder, *adapters, std=0.2):
    """A base model and adapters on it in folders; -> logits of PEFT's [adapter, B, T, V]."""
    torch.manual_seed(0)
    config = KINDS[kind]()
    config.initializer_range = std
    base = perturbed(transformers.AutoModelForCausalLM.from_config(config))
    base.save_pretrained(folder / "base")
    seen = []
    for i, options in enumerate(adapters):
        torch.manual_seed(i + 1)
        model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32), peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.copy_(torch.randn(p.shape) * std)
            seen.append(model(torch.tensor(IDS)).logits.numpy())
        model.save_pretrained(folder / f"adapter{i}", save_embedding_layers=False)
    return seen


def logits(model, params, ids=IDS):
    return np.asarray(model.apply({"params": params}, jnp.asarray(ids, jnp.int32))[0])


@pytest.mark.parametrize("std", [0.02, 0.2])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_pefts(kind, std, tmp_path):
    """float32 on both sides, 1e-5 of the largest logit: what the order of sums in two libraries leaves."""
    expected, = make(kind, tmp_path, ADAPTERS[kind], std=std)
    model, params, _ = llmjax.load(tmp_path / "base", dtype="float32", adapter=tmp_path / "adapter0")
    close = 1e-5 * max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(logits(model, params), expected, atol=close)
    plain = llmjax.load(tmp_path / "base", dtype="float32")[1]
    assert np.abs(logits(model, plain) - expected).max() > 20 * close, "the adapter does something"

    if std == 0.2:                                                 # as a server holds it: layers apart, laid out for decoding, each row choosing
        apart, ready = decode.prepare(model, plain)
        rows = chosen(with_adapters(ready, [pretrained.read_adapter(apart, tmp_path / "adapter0")], "float32"), jnp.asarray([1, 0, 1]))
        np.testing.assert_allclose(logits(apart, rows)[[0, 2]], expected[[0, 2]], atol=close)

    def swapped(w):
        return Lora(w.w, w.a[..., ::-1], w.b, w.alpha) if isinstance(w, Lora) else w
    wrong = jax.tree.map(swapped, params, is_leaf=is_leaf)
    assert np.abs(logits(model, wrong) - expected).max() > 20 * close, "ranks in another order are seen"


def test_rows_with_different_adapters_in_one_batch(tmp_path):
    """Row 0 with one, row 1 with none, row 2 with another of another rank: each as PEFT has it alone, also when the base is laid out for decoding, and in int8."""
    first, other = make("qwen2", tmp_path, dict(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"]), ADAPTERS["qwen2"])
    model, params, _ = llmjax.load(tmp_path / "base", dtype="float32")
    apart, ready = decode.prepare(model, params)
    found = [pretrained.read_adapter(apart, tmp_path / f"adapter{i}") for i in range(2)]
    both = with_adapters(ready, found, "float32")
    assert decode.prepare(apart, both)[1] is both, "what is prepared stays"
    got = logits(apart, chosen(both, jnp.asarray([1, 0, 2])))
    expected = np.stack([first[0], logits(model, params)[1], other[2]])
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(logits(apart, both), logits(apart, ready))
    np.testing.assert_allclose(logits(apart, chosen(both, jnp.asarray([2, 2, 1]))), np.stack([other[0], other[1], first[2]]), atol=1e-5 * np.abs(expected).max())
    model, small, _ = llmjax.load(tmp_path / "base", dtype="float32", quantize="int8")
    apart, ready = decode.prepare(model, small)
    got = logits(apart, chosen(with_adapters(ready, found, "float32"), jnp.asarray([1, 0, 2])))
    alone = [logits(*llmjax.load(tmp_path / "base", dtype="float32", quantize="int8", adapter=tmp_path / f"adapter{i}")[:2]) for i in range(2)]
    expected = np.stack([alone[0][0], logits(model, small)[1], alone[1][2]])
    np.testing.assert_allclose(got, expected, atol=2e-3 * np.abs(expected).max())      # the same int8 weights; laid out for decoding, activations are of 15 bits


REFUSED = [("bias", dict(bias="all"), "bias='all' is not read .none is."), ("DoRA", dict(use_dora=True), "use_dora='True'"), ("modules_to_save", dict(modules_to_save=["lm_head"]), "modules_to_save"),
           ("another kind", dict(peft_type="IA3"), "peft_type='IA3'.*LORA is"), ("a field of the future", dict(use_magic=7), "use_magic='7'"), ("pissa", dict(init_lora_weights="pissa"), "pissa"),
           ("no rank", dict(r=0), "r=0"), ("a target without tensors", dict(target_modules=["q_proj", "w_pack"]), "target_modules names 'w_pack'")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapters")
    make("llama", path, dict(r=2, target_modules=["q_proj"]))
    return path


@pytest.mark.parametrize("name, change, words", REFUSED, ids=[r[0] for r in REFUSED])
def test_what_is_not_supported_is_refused_by_name(name, change, words, folder, tmp_path):
    shutil.copytree(folder / "adapter0", tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(CheckpointError, match=words):
        llmjax.load(folder / "base", adapter=tmp_path / "a")


def test_tensors_that_do_not_fit_are_refused_by_name(folder, tmp_path):
    shutil.copytree(folder / "adapter0", tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    good, lead = safetensors.numpy.load_file(file), "base_model.model.model.layers.0.self_attn.q_proj."
    one = np.zeros((2, 32), np.float32)
    for change, words in (({lead + "lora_magnitude_vector": one}, "nothing reads.*magnitude"), ({lead + "base_layer.weight": one}, "copy of the base"),
                          ({lead.replace("q_proj", "w_pack") + f"lora_{k}.weight": one for k in "AB"}, "'model.layers.0.self_attn.w_pack'.*q_proj"),
                          ({lead.replace("q_proj", "k_proj") + "lora_A.weight": one}, "lora_A alone"), ({lead + "lora_A.weight": one[:, :5]}, r"lora_A has shape \(2, 5\)"),
                          ({lead.replace("layers.0", "layers.7") + f"lora_{k}.weight": one for k in "AB"}, "layers.7")):
        safetensors.numpy.save_file({**good, **change}, file)
        with pytest.raises(CheckpointError, match=words):
            llmjax.load(folder / "base", adapter=tmp_path / "a")
    with pytest.raises(CheckpointError, match="embed/table.*is the head too"):
        with_adapters({"embed": {"table": one}}, [{("embed/table", ()): Low(one.T, one, 1.0)}], "float32")
    file.unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors"):
        llmjax.load(folder / "base", adapter=tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        llmjax.load(folder / "base", adapter=tmp_path / "nowhere")
