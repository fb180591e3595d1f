"""Families: configurations both ways (both spellings of transformers), unknown fields, published sizes, weights both ways."""
import dataclasses as dc
import json

import jax
import numpy as np
import pytest

from llmjax import models
from llmjax.checkpoint import FAMILIES, PUBLISHED, exports, folder, load, published, to_hf, to_model_config
from llmjax.checkpoint.families.base import plain
from llmjax.core.errors import CheckpointError
from llmjax.core.model_config import (
    Attention,
    DynamicNtk,
    Layer,
    LinearScaling,
    Llama3Scaling,
    MixtureOfExperts,
    Mlp,
    ModelConfig,
    Norm,
    QKNorm,
    Rope,
    Yarn,
    unrolled,
)
from llmjax.core.tree import size

SMALL = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-6,
             bos_token_id=1, eos_token_id=2, pad_token_id=0)
DELTA = dict(linear_key_head_dim=8, linear_value_head_dim=6, linear_num_key_heads=2, linear_num_value_heads=4, linear_conv_kernel_dim=3)
MROPE = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25, "mrope_section": [1, 1, 0], "mrope_interleaved": True}
CASES = {
    "llama": dict(SMALL, model_type="llama", hidden_act="silu", attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=6),
    "mistral": dict(SMALL, model_type="mistral", sliding_window=6),
    "mixtral": dict(SMALL, model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=9, head_dim=None),
    "qwen2": dict(SMALL, model_type="qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": dict(SMALL, model_type="qwen3", head_dim=16, attention_bias=True),
    "gemma2": dict(SMALL, model_type="gemma2", head_dim=16, sliding_window=6, query_pre_attn_scalar=24, attn_logit_softcapping=None, attention_bias=True),
    "gemma3": dict(SMALL, model_type="gemma3_text", head_dim=16, sliding_window=6, num_hidden_layers=7, final_logit_softcapping=20.0,
                   rope_parameters={"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}, "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}),
    "gemma": dict(SMALL, model_type="gemma", head_dim=16, hidden_act="gelu", hidden_activation="gelu_pytorch_tanh", attention_bias=True),
    "qwen2_moe": dict(SMALL, model_type="qwen2_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=24, mlp_only_layers=[1],
                      use_sliding_window=False, sliding_window=0, norm_topk_prob=True),
    "qwen3_moe": dict(SMALL, model_type="qwen3_moe", head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=2),
    "phi": dict(model_type="phi", vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, qk_layernorm=True,
                max_position_embeddings=128, partial_rotary_factor=0.5, hidden_act="gelu_new"),
    "phi3": dict(SMALL, model_type="phi3", hidden_size=64, partial_rotary_factor=0.75, sliding_window=6, original_max_position_embeddings=128),
    "olmo2": dict(SMALL, model_type="olmo2", attention_bias=True),
    "granite": dict(SMALL, model_type="granite", embedding_multiplier=12.0, logits_scaling=7.0, residual_multiplier=0.22, attention_multiplier=0.015625, mlp_bias=True),
    "smollm3": dict(SMALL, model_type="smollm3", num_hidden_layers=5, no_rope_layers=[1, 1, 0, 1, 0], no_rope_layer_interval=4),
    "starcoder2": dict({k: v for k, v in SMALL.items() if k != "rms_norm_eps"}, model_type="starcoder2", norm_epsilon=1e-5, use_bias=True, sliding_window=6),
    "stablelm": dict({k: v for k, v in SMALL.items() if k != "rms_norm_eps"}, model_type="stablelm", use_qkv_bias=True, use_parallel_residual=True, partial_rotary_factor=0.25),
    "cohere": dict({k: v for k, v in SMALL.items() if k != "rms_norm_eps"}, model_type="cohere", logit_scale=0.25, use_qk_norm=False, rope_theta=8e6),
    "cohere2": dict({k: v for k, v in SMALL.items() if k != "rms_norm_eps"}, model_type="cohere2", sliding_window=6, num_hidden_layers=9, sliding_window_pattern=4),
    "glm4": dict(SMALL, model_type="glm4", head_dim=8, partial_rotary_factor=0.5),
    "gpt_neox": dict(model_type="gpt_neox", vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64, rotary_pct=0.5,
                     rotary_emb_base=20000, use_parallel_residual=False, attention_bias=True, bos_token_id=0, eos_token_id=0),
    "gptj": dict(model_type="gptj", vocab_size=96, n_embd=32, n_head=4, n_layer=3, n_positions=64, rotary_dim=4, n_inner=None, activation_function="gelu_new"),
    "gemma4": dict(SMALL, model_type="gemma4_text", head_dim=16, global_head_dim=24, num_global_key_value_heads=1, attention_k_eq_v=True, sliding_window=6, num_hidden_layers=7,
                   layer_types=["sliding_attention", "full_attention", "sliding_attention"] * 2 + ["full_attention"], num_kv_shared_layers=3, use_double_wide_mlp=True,
                   hidden_size_per_layer_input=8, vocab_size_per_layer_input=80, final_logit_softcapping=20.0),
    "qwen3_next": dict(SMALL, model_type="qwen3_next", head_dim=16, num_hidden_layers=5, attention_bias=True, layer_types=["linear_attention", "full_attention"] * 2 + ["linear_attention"],
                       num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=24, mlp_only_layers=[1], partial_rotary_factor=0.5, **DELTA),
    "qwen3_5": dict(SMALL, model_type="qwen3_5_text", head_dim=16, full_attention_interval=2, rope_parameters=MROPE, **DELTA),
    "qwen3_5_moe": dict(SMALL, model_type="qwen3_5_moe_text", head_dim=16, full_attention_interval=3, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                        shared_expert_intermediate_size=24, **DELTA),
    "gpt2": dict(model_type="gpt2", vocab_size=96, n_embd=24, n_head=3, n_layer=4, n_positions=64, n_inner=40, activation_function="gelu_new", scale_attn_by_inverse_layer_idx=True,
                 summary_type="cls_index", resid_pdrop=0.1, bos_token_id=50256, eos_token_id=50256),
}
# Published counts: the models' cards, or the sum over the shapes in their safetensors indices.
COUNTS = {"gpt-2": 124_439_808, "smollm2-135m": 134_515_008, "llama-2-7b": 6_738_415_616, "llama-2-70b": 68_976_648_192, "llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496,
          "llama-3.1-8b": 8_030_261_248, "llama-3.1-405b": 405_853_388_800, "llama-3.2-1b": 1_235_814_400, "mistral-7b": 7_241_732_096, "mixtral-8x7b": 46_702_792_704,
          "qwen2.5-0.5b": 494_032_768, "qwen2.5-7b": 7_615_616_512, "qwen3-0.6b": 596_049_920, "qwen3-8b": 8_190_735_360, "gemma2-2b": 2_614_341_888, "gemma2-9b": 9_241_705_984,
          "gemma3-1b": 999_885_952, "gpt-2-medium": 354_823_168, "gpt-2-xl": 1_557_611_200, "smollm2-360m": 361_821_120, "smollm2-1.7b": 1_711_376_384,
          "llama-2-13b": 13_015_864_320}


def test_every_family_has_a_case():
    assert set(CASES) == set(FAMILIES) and set(COUNTS) == set(PUBLISHED)


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes(name):
    config = published(name)
    assert size(models.abstract_params(models.Decoder(config))) == COUNTS[name]
    assert to_model_config(to_hf(config)) == config


@pytest.mark.parametrize("name", CASES)
def test_config_both_ways(name):
    config = to_model_config(CASES[name])
    assert config.family == name
    hf = to_hf(config, "float32")
    assert to_model_config(json.loads(json.dumps(hf))) == config
    new = ("rope_parameters", "dtype", "layer_types") if name not in ("cohere2", "smollm3", "qwen3_next", "qwen3_5", "qwen3_5_moe", "gemma4") else ("rope_parameters", "dtype")
    old = {k: v for k, v in hf.items() if k not in new}          # what transformers 4 would have written
    if name == "gemma3":
        assert old["rope_scaling"] == {"rope_type": "linear", "factor": 8.0} and old["rope_local_base_freq"] == 2e4
    assert to_model_config(old) == config
    assert to_hf(dc.replace(unrolled(config)))["model_type"] == hf["model_type"]


@pytest.mark.parametrize("name", CASES)
def test_weights_both_ways_bit_for_bit(name):
    config = to_model_config(CASES[name])
    table = FAMILIES[name].table
    like = models.abstract_params(models.Decoder(config))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), like)
    tensors = {e.name: e.make() for e in exports(table, params)}

    class Source:
        where, shapes = "memory", {n: x.shape for n, x in tensors.items()}
        read = staticmethod(lambda name, *rows: tensors[name][slice(*rows) if rows else ...])
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, load(Source, table, like), params)))
    apart = load(Source, table, models.abstract_params(models.Decoder(unrolled(config))))
    again = {e.name: e.make() for e in exports(table, apart)}
    assert set(again) == set(tensors) and all(np.array_equal(again[n], x) for n, x in tensors.items())


@pytest.mark.parametrize(("name", "change"), [("cohere2", {"rotary_pct": 0.5}), ("cohere2", {"use_gated_activation": False}), ("starcoder2", {"norm_type": "rms_norm"}),
                                              ("gptj", {"scale_attn_weights": False})])
def test_a_field_with_one_known_value_is_refused_with_another(name, change):
    field, value = next(iter(change.items()))
    with pytest.raises(CheckpointError, match=f"{field}={value!r}: this family is read with"):
        to_model_config({**CASES[name], **change})


def test_a_window_left_out_is_transformers_default():
    assert {layer.mixer.window for layer in to_model_config({**CASES["qwen3_moe"], "use_sliding_window": True}).layers} == {4096}


def test_spellings_of_rotary_scaling():
    base = CASES["llama"]
    for scaling, want in [
        (None, None), ({"type": "linear", "factor": 2}, LinearScaling(2.0)), ({"rope_type": "dynamic", "factor": 4.0}, DynamicNtk(4.0, 128)),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}, Llama3Scaling(8.0, 1.0, 4.0, 32)),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "finetuned": True}, Yarn(4.0, 32)),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16, "attention_factor": 1.5, "truncate": False},
         Yarn(4.0, 32, 16.0, attention_factor=1.5, truncate=False)),
    ]:
        four = to_model_config({**base, "rope_theta": 5e5, "rope_scaling": scaling})
        five = to_model_config({**base, "rope_parameters": {"rope_theta": 5e5, **(scaling or {"rope_type": "default"})}})
        assert four == five and four.layers[0].mixer.rope == Rope(5e5, scaling=want)
        assert to_model_config(to_hf(four)) == four


def test_windows_and_scales_are_data():
    qwen = to_model_config(CASES["qwen2"])
    assert [layer.mixer.window for layer in qwen.layers] == [None, 5, 5]
    gemma = to_model_config(CASES["gemma3"])
    assert [layer.mixer.window for layer in gemma.layers] == [6] * 5 + [None, 6]
    assert gemma.layers[5].mixer.rope == Rope(5e5, scaling=LinearScaling(8.0)) and gemma.layers[0].mixer.rope == Rope(2e4)
    assert gemma.layers[0].mixer.scale == 256 ** -0.5 and gemma.embed_scale == 32 ** 0.5 and gemma.norm.offset == 1.0
    gpt = to_model_config(CASES["gpt2"])
    assert [layer.mixer.scale for layer in gpt.layers] == [None] + [8 ** -0.5 / i for i in (2.0, 3.0, 4.0)]
    both = to_model_config({**CASES["gpt2"], "scale_attn_weights": False})
    assert [layer.mixer.scale for layer in both.layers] == [1.0, 0.5, 1 / 3, 0.25]


def test_ids():
    llama = CASES["llama"]
    assert to_model_config({**llama, "eos_token_id": [5, 6]}).end_tokens == (5, 6)
    config = to_model_config({**llama, "pad_token_id": -1}, {"eos_token_id": [7, 8], "temperature": 0.6})
    assert (config.bos_token, config.end_tokens, config.pad_token) == (1, (7, 8), None)
    assert to_hf(config)["eos_token_id"] == [7, 8] and to_hf(config)["pad_token_id"] is None


@pytest.mark.parametrize(("change", "words"), [
    ({"hidden_act": "sillu"}, "hidden_act='sillu' is an activation this version does not know; did you mean 'silu'"),
    ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "the rope type 'spiral' is unknown"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0, "wobble": 3}}, "wobble='3'"),
    ({"attention_chunk_size": 8}, "attention_chunk_size='8' is a field this version does not know"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "the weights are quantised"),
    ({"model_type": "rwkv"}, "model_type='rwkv' is not a family this version reads; known: cohere"),
    ({"num_attention_heads": 3}, "heads=3 is not a multiple of kv_heads=2"),
    ({"num_hidden_layers": "three"}, "num_hidden_layers='three': a whole number"),
    ({"hidden_size": None}, "hidden_size is null"),
    ({"head_dim": 7}, "even number of dimensions"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
])
def test_what_would_change_the_answer_is_an_error(change, words):
    with pytest.raises(CheckpointError) as error:
        to_model_config({**CASES["llama"], **change}, where="folder/config.json")
    assert words in str(error.value) and "folder/config.json" in str(error.value) and "\n" not in str(error.value)


def test_fields_that_are_off_or_harmless_pass():
    to_model_config({**CASES["llama"], "attention_chunk_size": None, "use_mrope": False, "rope_interleaved": False, "torch_dtype": "bfloat16", "use_cache": True,
                     "pretraining_tp": 1, "transformers_version": "4.40", "attention_dropout": 0.1, "initializer_range": 0.02})
    assert to_model_config({k: v for k, v in CASES["llama"].items() if k != "model_type"} | {"architectures": ["LlamaForCausalLM"]}).family == "llama"
    with pytest.raises(CheckpointError, match="'vocab_size' is missing"):
        to_model_config({k: v for k, v in CASES["llama"].items() if k != "vocab_size"})


ATTENTION = Attention(4, 2, 8)


@pytest.mark.parametrize(("layer", "more", "words"), [
    (Layer(dc.replace(ATTENTION, window=8), Mlp(16)), {}, "mixer.window=8"),
    (Layer(dc.replace(ATTENTION, softcap=5.0), Mlp(16)), {}, "mixer.softcap=5.0"),
    (Layer(dc.replace(ATTENTION, qk_norm=QKNorm()), Mlp(16)), {}, "mixer.qk_norm"),
    (Layer(dc.replace(ATTENTION, qkv_bias=True), Mlp(16)), {}, "layers[0].mixer.out_bias=False"),
    (Layer(ATTENTION, MixtureOfExperts(4, 2, 16)), {}, "layer 0: Attention with MixtureOfExperts"),
    (Layer(dc.replace(ATTENTION, rope=None), Mlp(16)), {}, "layer 0: rope=None"),
    (Layer(ATTENTION, Mlp(16), "post"), {}, "wiring='post'"),
    (Layer(ATTENTION, Mlp(16)), {"logit_softcap": 30.0}, "logit_softcap=30.0"),
    (Layer(ATTENTION, Mlp(16)), {"norm": Norm("layer")}, "norm.kind='layer'"),
    (Layer(ATTENTION, Mlp(16)), {"family": "llamma"}, "no checkpoint family 'llamma'; did you mean 'llama'"),
])
def test_what_a_family_cannot_express_is_named(layer, more, words):
    with pytest.raises(CheckpointError) as error:
        to_hf(ModelConfig(96, 32, (layer,), 2, **more))
    assert words in str(error.value)


def test_the_usual_scale_has_one_spelling():
    spelled = ModelConfig(96, 32, (Layer(dc.replace(ATTENTION, scale=8 ** -0.5), Mlp(16)),), 2)
    assert plain(to_model_config(to_hf(spelled))) == plain(spelled)


def test_unknown_published_name():
    with pytest.raises(CheckpointError, match="did you mean 'llama-3-8b'"):
        published("llama3-8b")


def test_config_file_that_is_not_json(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        folder.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: it is not JSON \(line 1\)"):
        folder.read_config(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="a JSON object is expected"):
        folder.read_config(tmp_path)
