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
from llmjax.core.model_config import Attention, Layer, MaskedHead, MixtureOfExperts, Mlp, ModelConfig, NoHead, Norm, QKNorm, ReplacedHead, TokenHead, Transform, unrolled
from llmjax.core.positions import DynamicNtk, LinearScaling, Llama3Scaling, Rope, Yarn
from llmjax.core.tree import size

SMALL = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-6,
             bos_token_id=1, eos_token_id=2, pad_token_id=0)
LATENT = dict(num_key_value_heads=4, kv_lora_rank=12, qk_rope_head_dim=8, qk_nope_head_dim=6, v_head_dim=10, n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=2,
              first_k_dense_replace=1, moe_intermediate_size=16, n_group=4, topk_group=2)
BERT = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64, hidden_act="gelu", type_vocab_size=2,
            hidden_dropout_prob=0.1)
DELTA = dict(linear_key_head_dim=8, linear_value_head_dim=6, linear_num_key_heads=2, linear_num_value_heads=4, linear_conv_kernel_dim=3)
MROPE = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25, "mrope_section": [1, 1, 0], "mrope_interleaved": True}
# By family; after a "+" what of it this case adds.
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
    "phi3": dict(SMALL, model_type="phi3", hidden_size=64, partial_rotary_factor=0.75, sliding_window=6, original_max_position_embeddings=32,
                 rope_scaling={"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 8.0]}),
    "olmo2": dict(SMALL, model_type="olmo2", attention_bias=True),
    "granite": dict(SMALL, model_type="granite", embedding_multiplier=12.0, logits_scaling=7.0, residual_multiplier=0.22, attention_multiplier=0.015625, mlp_bias=True),
    "smollm3": dict(SMALL, model_type="smollm3", num_hidden_layers=5, no_rope_layers=[1, 1, 0, 1, 0], no_rope_layer_interval=4),
    "starcoder2": dict({k: v for k, v in SMALL.items() if k != "rms_norm_eps"}, model_type="starcoder2", norm_epsilon=1e-5, use_bias=True, sliding_window=6),
    "stablelm": dict({k: v for k, v in SMALL.items() if k != "rms_norm_eps"}, model_type="stablelm", use_qkv_bias=True, use_parallel_residual=True, qk_layernorm=True,
                     partial_rotary_factor=0.25),
    "cohere": dict({k: v for k, v in SMALL.items() if k != "rms_norm_eps"}, model_type="cohere", logit_scale=0.25, use_qk_norm=True, rope_theta=8e6),
    "cohere2": dict({k: v for k, v in SMALL.items() if k != "rms_norm_eps"}, model_type="cohere2", sliding_window=6, num_hidden_layers=9, sliding_window_pattern=4),
    "glm4": dict(SMALL, model_type="glm4", head_dim=8, partial_rotary_factor=0.5),
    "gpt_neox": dict(model_type="gpt_neox", vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64, rotary_pct=0.5,
                     rotary_emb_base=20000, use_parallel_residual=False, attention_bias=True, bos_token_id=0, eos_token_id=0),
    "gptj": dict(model_type="gptj", vocab_size=96, n_embd=32, n_head=4, n_layer=3, n_positions=64, rotary_dim=4, n_inner=None, activation_function="gelu_new"),
    "ministral3": dict(SMALL, model_type="ministral3", head_dim=8, sliding_window=7, rope_parameters={
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.2,
        "max_position_embeddings": 128}),
    "deepseek_v2": dict(SMALL | LATENT, model_type="deepseek_v2", topk_method="group_limited_greedy", q_lora_rank=None, routed_scaling_factor=16.0, norm_topk_prob=False),
    "deepseek_v3": dict(SMALL | LATENT, model_type="deepseek_v3", q_lora_rank=16, routed_scaling_factor=2.5, attention_bias=True, num_nextn_predict_layers=1, rope_scaling={
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}),
    "gpt_oss": dict(SMALL, model_type="gpt_oss", head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=6, swiglu_limit=5.0, experts_per_token=2),
    "granitemoe": dict(SMALL, model_type="granitemoe", num_local_experts=4, num_experts_per_tok=2, embedding_multiplier=12.0, logits_scaling=7.0, attention_multiplier=0.25),
    "glm4_moe": dict(SMALL, model_type="glm4_moe", head_dim=8, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, n_group=1, topk_group=1, first_k_dense_replace=1,
                     use_qk_norm=True, attention_bias=True, partial_rotary_factor=0.5),
    "llama4": dict(SMALL, model_type="llama4_text", head_dim=8, intermediate_size_mlp=64, num_local_experts=4, num_experts_per_tok=1, num_hidden_layers=8, attention_chunk_size=8,
                   interleave_moe_layer_step=2, attn_temperature_tuning=4, attn_scale=0.2, floor_scale=16),
    "dbrx": dict(model_type="dbrx", vocab_size=96, d_model=32, n_heads=4, n_layers=3, max_seq_len=128, attn_config=dict(kv_n_heads=2, clip_qkv=8, rope_theta=5e5, model_type=""),
                 ffn_config=dict(ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2, ffn_act_fn={"name": "gelu"})),
    "falcon": dict(model_type="falcon", vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, new_decoder_architecture=True, num_kv_heads=2, bias=True),
    "bloom": dict(model_type="bloom", vocab_size=96, n_embed=32, n_layer=3, n_head=4, seq_length=128, offset_alibi=100, attention_softmax_in_fp32=True),
    "mpt": dict(model_type="mpt", vocab_size=96, d_model=32, n_heads=4, n_layers=3, max_seq_len=128, no_bias=True, attn_config=dict(alibi=True, alibi_bias_max=8, clip_qkv=6)),
    "opt": dict(model_type="opt", vocab_size=96, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=16,
                do_layer_norm_before=False, bos_token_id=2, eos_token_id=2, pad_token_id=1, prefix="</s>"),
    "grok1": dict(SMALL, model_type="grok-1", num_experts=4, num_experts_per_tok=2, embedding_multiplier_scale=5.5, output_multiplier_scale=0.5, max_attn_value=20.0),
    "nanochat": dict(SMALL, model_type="nanochat", hidden_act="relu2"),
    "gemma4": dict(SMALL, model_type="gemma4_text", head_dim=16, global_head_dim=24, num_global_key_value_heads=1, attention_k_eq_v=True, sliding_window=6, num_hidden_layers=7,
                   layer_types=["sliding_attention", "full_attention", "sliding_attention"] * 2 + ["full_attention"], num_kv_shared_layers=3, use_double_wide_mlp=True,
                   hidden_size_per_layer_input=8, vocab_size_per_layer_input=80, final_logit_softcapping=20.0),
    "gemma4+experts": dict(SMALL, model_type="gemma4_text", head_dim=16, global_head_dim=24, num_hidden_layers=3, sliding_window=6, num_kv_shared_layers=1, use_double_wide_mlp=True,
                           layer_types=["sliding_attention", "full_attention", "full_attention"], hidden_size_per_layer_input=0, enable_moe_block=True, num_experts=4, top_k_experts=2,
                           moe_intermediate_size=16),
    "qwen3_next": dict(SMALL, model_type="qwen3_next", head_dim=16, num_hidden_layers=5, attention_bias=True, layer_types=["linear_attention", "full_attention"] * 2 + ["linear_attention"],
                       num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=24, mlp_only_layers=[1], partial_rotary_factor=0.5, **DELTA),
    "qwen3_5": dict(SMALL, model_type="qwen3_5_text", head_dim=16, full_attention_interval=2, rope_parameters=MROPE, **DELTA),
    "qwen3_5_moe": dict(SMALL, model_type="qwen3_5_moe_text", head_dim=16, full_attention_interval=3, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                        shared_expert_intermediate_size=24, **DELTA),
    "gpt2": dict(model_type="gpt2", vocab_size=96, n_embd=24, n_head=3, n_layer=4, n_positions=64, n_inner=40, activation_function="gelu_new", scale_attn_by_inverse_layer_idx=True,
                 summary_type="cls_index", resid_pdrop=0.1, bos_token_id=50256, eos_token_id=50256),
    "bert": dict(BERT, model_type="bert", architectures=["BertForMaskedLM"], tie_word_embeddings=False),
    "bert+next": dict(BERT, model_type="bert", architectures=["BertForPreTraining"]),
    "roberta": dict(BERT, model_type="roberta", architectures=["RobertaForSequenceClassification"], pad_token_id=1, id2label={"0": "no", "1": "perhaps", "2": "yes"}),
    "xlm-roberta": dict(BERT, model_type="xlm-roberta", architectures=["XLMRobertaForQuestionAnswering"], pad_token_id=1),
    "distilbert": dict(model_type="distilbert", architectures=["DistilBertForTokenClassification"], vocab_size=96, dim=32, hidden_dim=48, n_layers=3, n_heads=4, max_position_embeddings=64,
                       num_labels=5, sinusoidal_pos_embds=False, activation="relu"),
    "electra": dict(BERT, model_type="electra", architectures=["ElectraForPreTraining"], embedding_size=16, summary_type="first"),
    "modernbert": dict({k: v for k, v in BERT.items() if k not in ("hidden_act", "type_vocab_size", "hidden_dropout_prob")}, model_type="modernbert",
                       architectures=["ModernBertForSequenceClassification"], local_attention=8,
                       classifier_pooling="mean", norm_bias=True, mlp_bias=True, attention_bias=True, classifier_bias=True, num_hidden_layers=5, global_attn_every_n_layers=2),
    "deberta-v2": dict(BERT, model_type="deberta-v2", architectures=["DebertaV2ForMaskedLM"], legacy=False, type_vocab_size=0, relative_attention=True, pos_att_type="p2c|c2p", position_buckets=8,
                       norm_rel_ebd="layer_norm", share_att_key=True, position_biased_input=False, max_relative_positions=-1),
    "deberta-v2-legacy": dict(BERT, model_type="deberta-v2", architectures=["DebertaV2ForMaskedLM"], relative_attention=True, pos_att_type=["c2p"], max_relative_positions=16),
    "deberta-v2+convolution": dict(BERT, model_type="deberta-v2", architectures=["DebertaV2Model"], type_vocab_size=0, relative_attention=True, pos_att_type="p2c|c2p", conv_kernel_size=3,
                                   num_hidden_layers=1),
    "t5": dict(model_type="t5", architectures=["T5ForConditionalGeneration"], vocab_size=96, d_model=32, d_ff=48, d_kv=6, num_layers=3, num_decoder_layers=2, num_heads=4, dropout_rate=0.1,
               feed_forward_proj="gated-gelu", tie_word_embeddings=False, n_positions=64, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, relative_attention_num_buckets=8),
    "t5+told twice": dict(model_type="t5", vocab_size=96, d_model=32, d_ff=48, d_kv=6, num_layers=1, num_heads=4, feed_forward_proj="relu", is_gated_act=True, dense_act_fn="gelu"),
    "bart": dict(model_type="bart", vocab_size=96, d_model=32, encoder_layers=3, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=40, encoder_attention_heads=4,
                 decoder_attention_heads=2, max_position_embeddings=64, normalize_before=False, num_hidden_layers=3, forced_eos_token_id=2),
    "bart+untied": dict(model_type="bart", vocab_size=96, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48, decoder_ffn_dim=40, encoder_attention_heads=4,
                        decoder_attention_heads=2, max_position_embeddings=64, tie_word_embeddings=False),
    "mbart": dict(model_type="mbart", vocab_size=96, d_model=32, encoder_layers=2, decoder_layers=3, encoder_ffn_dim=48, decoder_ffn_dim=40, encoder_attention_heads=4,
                  decoder_attention_heads=2, max_position_embeddings=64, normalize_before=True, add_final_layer_norm=True, scale_embedding=True, forced_eos_token_id=2),
}
CASES["dbrx+as they are"] = {**CASES["dbrx"], "ffn_config": {**CASES["dbrx"]["ffn_config"], "moe_normalize_expert_weights": None}}
CASES["gemma3+both ways"] = {**CASES["gemma3"], "architectures": ["Gemma3TextModel"], "use_bidirectional_attention": True}
# Published counts: the models' cards, or the sum over the shapes in their safetensors indices; where these say less, what transformers makes of the published numbers.
COUNTS = {"gpt-2": 124_439_808, "smollm2-135m": 134_515_008, "llama-2-7b": 6_738_415_616, "llama-2-70b": 68_976_648_192, "llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496,
          "llama-4-scout": 107_769_861_120, "mixtral-8x22b": 140_630_071_296, "qwen3-30b-a3b": 30_532_122_624, "qwen3-235b-a22b": 235_093_634_560, "gemma-2b": 2_506_172_416,
          "phi-2": 2_779_683_840, "phi-3-mini": 3_821_079_552, "phi-4": 14_659_507_200, "deepseek-v2-lite": 15_706_484_224, "deepseek-v3": 671_026_419_200,
          "gpt-oss-20b": 20_914_757_184, "gpt-oss-120b": 116_829_156_672, "olmo2-1b": 1_484_916_736, "olmo2-7b": 7_298_617_344, "granite-3.1-2b": 2_533_531_648,
          "smollm3-3b": 3_075_098_624, "starcoder2-3b": 3_030_371_328, "stablelm-2-1.6b": 1_644_515_328, "command-r-35b": 34_980_831_232, "glm-4-9b": 9_400_279_040,
          "glm-4.5-air": 106_852_251_264, "pythia-160m": 162_322_944, "gpt-j-6b": 6_050_882_784, "falcon-7b": 6_921_720_704, "falcon-40b": 41_303_293_952,
          "falcon-rw-1b": 1_311_625_216, "bloom-560m": 559_214_592, "bloom": 176_247_271_424, "mpt-7b": 6_649_286_656, "opt-125m": 125_239_296, "opt-350m": 331_196_416,
          "dbrx": 131_596_523_520, "nanochat-d32": 1_879_048_192, "qwen1.5-moe-a2.7b": 14_315_784_192, "qwen3-next-80b-a3b": 79_674_391_296, "command-r7b": 8_028_033_024,
          "granite-3.0-1b-a400m": 1_334_628_352,
          # no class counts it: its cards say 314 B; 64 layers of 8 experts of 3 matrices, attention, router and four norms, the table and a norm
          "grok-1": 64 * (8 * 3 * 6144 * 32_768 + 2 * 6144 * (48 + 8) * 128 + 6144 * 8 + 4 * 6144) + 131_072 * 6144 + 6144,
          "llama-3.1-8b": 8_030_261_248, "llama-3.1-405b": 405_853_388_800, "llama-3.2-1b": 1_235_814_400, "mistral-7b": 7_241_732_096, "mixtral-8x7b": 46_702_792_704,
          "qwen2.5-0.5b": 494_032_768, "qwen2.5-7b": 7_615_616_512, "qwen3-0.6b": 596_049_920, "qwen3-8b": 8_190_735_360, "gemma2-2b": 2_614_341_888, "gemma2-9b": 9_241_705_984,
          "gemma3-1b": 999_885_952, "gemma4-26b-a4b": 25_233_141_790,
          "embeddinggemma-300m": 302_863_104, "gpt-2-medium": 354_823_168, "gpt-2-xl": 1_557_611_200, "smollm2-360m": 361_821_120, "smollm2-1.7b": 1_711_376_384,
          "llama-2-13b": 13_015_864_320,
          # of the class that `architectures` names; flan-t5's head is a matrix of its own, BART's count includes the 50,265 numbers of final_logits_bias, a buffer of its checkpoints
          "bert-base": 109_482_240, "bert-large": 335_141_888, "all-minilm-l6-v2": 22_713_216, "roberta-base": 124_697_433, "xlm-roberta-base": 278_043_648, "distilbert-base": 66_362_880,
          "electra-small-generator": 13_546_682, "modernbert-base": 149_655_232, "deberta-v3-base": 183_831_552, "deberta-v2-xlarge": 884_593_152, "t5-small": 60_506_624, "t5-base": 222_903_552,
          "flan-t5-base": 247_577_856, "bart-base": 139_420_416 + 50_265}


def test_every_family_has_a_case():
    assert {name.split("+")[0] for name in CASES} == set(FAMILIES) and set(COUNTS) == set(PUBLISHED)


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes(name):
    config = published(name)
    assert size(models.abstract_params(models.build(config))) == COUNTS[name]
    assert to_model_config(to_hf(config)) == config


@pytest.mark.parametrize("name", CASES)
def test_config_both_ways(name):
    config, name = to_model_config(CASES[name]), name.split("+")[0]
    assert config.family == name
    hf = to_hf(config, "float32")
    assert to_model_config(json.loads(json.dumps(hf))) == config
    new = ("rope_parameters", "dtype", "layer_types") if name not in ("cohere2", "smollm3", "gpt_oss", "llama4", "qwen3_next", "qwen3_5", "qwen3_5_moe", "gemma4") else ("rope_parameters", "dtype")
    old = {k: v for k, v in hf.items() if k not in new}          # what transformers 4 would have written
    if name == "gemma3":
        assert old["rope_scaling"] == {"rope_type": "linear", "factor": 8.0} and old["rope_local_base_freq"] == 2e4
    assert to_model_config(old) == config
    assert to_hf(dc.replace(unrolled(config)))["model_type"] == hf["model_type"]


@pytest.mark.parametrize("name", CASES)
def test_weights_both_ways_bit_for_bit(name):
    config = to_model_config(CASES[name])
    table = FAMILIES[config.family].rows(config)
    like = models.abstract_params(models.build(config))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), like)
    tensors = {e.name: e.make() for e in exports(table, params)}

    class Source:
        where, shapes = "memory", {n: x.shape for n, x in tensors.items()}
        read = staticmethod(lambda name, *rows: tensors[name][slice(*rows) if rows else ...])
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, load(Source, table, like), params)))
    apart = load(Source, table, models.abstract_params(models.build(unrolled(config))))
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


@pytest.mark.parametrize(("name", "change", "words"), [
    ("mpt", {"attn_config": {"alibi_bias_max": 16}}, "alibi_bias_max=16"), ("bloom", {"slow_but_exact": True, "pretraining_tp": 2}, "slow_but_exact=True with pretraining_tp=2"),
    ("gemma3+both ways", {"architectures": ["Gemma3ForCausalLM"]}, "the architecture 'Gemma3ForCausalLM' is not read; of this family are Gemma3TextModel"),
    ("bert", {"architectures": ["BertForMultipleChoice"]}, "the architecture 'BertForMultipleChoice' is not read; of this family are BertModel, BertForMaskedLM"),
    ("bert", {"is_decoder": True}, "is_decoder=True"), ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
    ("deberta-v2", {"pos_att_type": "p2p"}, "pos_att_type=['p2p']"),
    ("deberta-v2", {"conv_kernel_size": 3, "conv_groups": 2}, "conv_groups=2"), ("deberta-v2", {"conv_kernel_size": 4}, "a convolution over 4 tokens"),
    ("deberta-v2", {"position_buckets": 32, "max_relative_positions": 16}, "no distance up to max_relative_positions=16"),
    ("deberta-v2", {"tie_word_embeddings": None}, "tie_word_embeddings=None"), ("deberta-v2", {"attention_head_size": 5}, "attention_head_size=5"),
    ("modernbert", {"classifier_pooling": "max"}, "classifier_pooling='max'"), ("t5", {"feed_forward_proj": "gated-sillu"}, "feed_forward_proj='gated-sillu'"),
    ("t5", {"architectures": ["T5ForTokenClassification"]}, "'T5ForTokenClassification' is not read"), ("bart", {"normalize_before": True}, "normalize_before=True"),
])
def test_families_name_what_they_do_not_read(name, change, words):
    with pytest.raises(CheckpointError) as error:
        to_model_config({**CASES[name], **change})
    assert words in str(error.value) and "\n" not in str(error.value)


def test_heads_and_labels():
    bert = CASES["bert"]
    tags = to_model_config({**bert, "architectures": ["BertForTokenClassification"], "id2label": {"10": "c", "2": "b", "0": "a"}})
    assert tags.head == TokenHead(("a", "b", "c")) and to_hf(tags)["label2id"] == {"a": 0, "b": 1, "c": 2} and to_hf(tags)["architectures"] == ["BertForTokenClassification"]
    assert to_model_config({k: v for k, v in bert.items() if k != "architectures"}).head == NoHead(Transform("tanh"))
    assert to_model_config(CASES["modernbert"]).head.pooling == "mean" and to_model_config(CASES["modernbert"]).layers[1].mixer.window == 5
    with pytest.raises(CheckpointError, match="has no class with a ReplacedHead"):
        to_hf(dc.replace(tags, head=ReplacedHead(Transform("gelu"))))
    with pytest.raises(CheckpointError, match=r"cannot express head\.transform\.activation='relu'"):
        to_hf(dc.replace(to_model_config(bert), head=MaskedHead(Transform("relu", norm=True), spare_bias=True)))


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
    ({"quantization_config": {"quant_method": "hqq", "bits": 4}}, "the weights are quantised (hqq)"),
    ({"model_type": "rwkv"}, "model_type='rwkv' is not a family this version reads; known: bart, bert"),
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


@pytest.mark.parametrize(("name", "more"), [
    ("xlm-roberta", {"output_past": True}), ("t5", {"output_past": True}), ("gpt2", {"_num_labels": 1, "n_special": 0, "predict_special_tokens": True, "use_bfloat16": False}),
    ("bart", {"_num_labels": 3, "output_past": True, "replacing_rate": 0, "student_decoder_layers": None}), ("distilbert", {"tie_weights_": True}),
    ("bert", {"language": "english", "name": "Bert", "sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity", "sentence_transformers": {"version": "4.1.0"}}),
    ("modernbert", {"layer_norm_eps": 1e-5}), ("gemma2", {"sliding_window_size": 4096}), ("starcoder2", {"activation_function": "gelu"}), ("cohere2", {"_sliding_window_pattern": 4}),
    ("phi3", {"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "interpolate_factor": 1, "full_attn_mod": 1}), ("mpt", {"tokenizer_name": "EleutherAI/gpt-neox-20b"}),
    ("llama", {"max_sequence_length": 2048, "_flash_attn_2_enabled": True}), ("cohere", {"model_max_length": 131072}), ("gpt_neox", {"custom_pipelines": {"text-generation": {}}}),
])
def test_fields_of_published_files_that_nothing_reads_pass(name, more):
    assert to_model_config({**CASES[name], **more}) == to_model_config(CASES[name])


@pytest.mark.parametrize(("name", "field", "off"), [
    ("deepseek_v3", "norm_topk_prob", False), ("deepseek_v3", "rope_interleave", False), ("glm4", "attention_bias", False), ("gemma4", "per_layer_config", {})])
def test_null_is_off_whatever_holds_where_nothing_is_said(name, field, off):
    """As in transformers, whose code asks whether the value is true."""
    assert to_model_config({**CASES[name], field: None}) == to_model_config({**CASES[name], field: off}) != to_model_config({k: v for k, v in CASES[name].items() if k != field})


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
