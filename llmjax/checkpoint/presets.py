"""Published models by name, as the fields of their config.json that make their size and their mathematics: `published("llama-3-8b") -> ModelConfig`."""
from __future__ import annotations

from typing import Any

from llmjax.checkpoint.families import to_model_config
from llmjax.core.errors import CheckpointError, nearest
from llmjax.core.model_config import ModelConfig


def llama(vocab: int, dim: int, hidden: int, layers: int, heads: int, kv_heads: int, context: int, **more: Any) -> dict[str, Any]:
    """A row of a Llama-like family."""
    return {"model_type": "llama", "vocab_size": vocab, "hidden_size": dim, "intermediate_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "max_position_embeddings": context, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, **more}


def rope3(factor: float = 8.0) -> dict[str, Any]:
    """Llama 3.1's scaling."""
    return {"rope_theta": 500_000.0,
            "rope_scaling": {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}


def bert(vocab: int, dim: int, hidden: int, layers: int, heads: int, rows: int, kind: str = "bert", architecture: str = "BertModel", **more: Any) -> dict[str, Any]:
    """A row of BERT and its kin."""
    return {"model_type": kind, "architectures": [architecture], "vocab_size": vocab, "hidden_size": dim, "intermediate_size": hidden, "num_hidden_layers": layers,
            "num_attention_heads": heads, "max_position_embeddings": rows, "type_vocab_size": 2, **more}


def t5(dim: int, hidden: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {"model_type": "t5", "vocab_size": 32_128, "d_model": dim, "d_ff": hidden, "num_layers": layers, "num_heads": heads, "d_kv": 64, "n_positions": 512,
            "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, **more}


LLAMA3 = dict(bos_token_id=128_000, eos_token_id=128_001, rope_theta=500_000.0)
QWEN = dict(rms_norm_eps=1e-6, rope_theta=1_000_000.0, bos_token_id=151_643, eos_token_id=151_643)
GEMMA = dict(rms_norm_eps=1e-6, head_dim=256, query_pre_attn_scalar=256, bos_token_id=2, eos_token_id=1, pad_token_id=0)
SMOLLM2 = dict(rope_theta=100_000.0, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0)
DEEPSEEK = dict(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, rms_norm_eps=1e-6, bos_token_id=0, eos_token_id=1)
YARN_V2 = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707}
GPT_OSS = dict(head_dim=64, num_experts_per_tok=4, sliding_window=128, rope_theta=150_000.0, bos_token_id=199_998, eos_token_id=200_002)

PUBLISHED: dict[str, dict[str, Any]] = {
    "gpt-2": dict(model_type="gpt2", vocab_size=50_257, n_embd=768, n_head=12, n_layer=12, n_positions=1024, bos_token_id=50_256, eos_token_id=50_256),
    "gpt-2-medium": dict(model_type="gpt2", vocab_size=50_257, n_embd=1024, n_head=16, n_layer=24, n_positions=1024, bos_token_id=50_256, eos_token_id=50_256),
    "gpt-2-xl": dict(model_type="gpt2", vocab_size=50_257, n_embd=1600, n_head=25, n_layer=48, n_positions=1024, bos_token_id=50_256, eos_token_id=50_256),
    "smollm2-135m": llama(49_152, 576, 1536, 30, 9, 3, 8192, **SMOLLM2),
    "smollm2-360m": llama(49_152, 960, 2560, 32, 15, 5, 8192, **SMOLLM2),
    "smollm2-1.7b": llama(49_152, 2048, 8192, 24, 32, 32, 8192, **SMOLLM2 | dict(rope_theta=130_000.0)),
    "llama-2-7b": llama(32_000, 4096, 11_008, 32, 32, 32, 4096),
    "llama-2-13b": llama(32_000, 5120, 13_824, 40, 40, 40, 4096),
    "llama-2-70b": llama(32_000, 8192, 28_672, 80, 64, 8, 4096),
    "llama-3-8b": llama(128_256, 4096, 14_336, 32, 32, 8, 8192, **LLAMA3),
    "llama-3-70b": llama(128_256, 8192, 28_672, 80, 64, 8, 8192, **LLAMA3),
    "llama-3.1-8b": llama(128_256, 4096, 14_336, 32, 32, 8, 131_072, **LLAMA3 | rope3()),
    "llama-3.1-405b": llama(128_256, 16_384, 53_248, 126, 128, 8, 131_072, **LLAMA3 | rope3()),
    "llama-3.2-1b": llama(128_256, 2048, 8192, 16, 32, 8, 131_072, tie_word_embeddings=True, **LLAMA3 | rope3(32.0)),
    "mistral-7b": llama(32_000, 4096, 14_336, 32, 32, 8, 32_768, model_type="mistral", sliding_window=4096),
    "mixtral-8x7b": llama(32_000, 4096, 14_336, 32, 32, 8, 32_768, model_type="mixtral", rope_theta=1_000_000.0, num_local_experts=8, num_experts_per_tok=2),
    "qwen2.5-0.5b": llama(151_936, 896, 4864, 24, 14, 2, 32_768, model_type="qwen2", tie_word_embeddings=True, **QWEN),
    "qwen2.5-7b": llama(152_064, 3584, 18_944, 28, 28, 4, 131_072, model_type="qwen2", **QWEN),
    "qwen3-0.6b": llama(151_936, 1024, 3072, 28, 16, 8, 32_768, model_type="qwen3", head_dim=128, tie_word_embeddings=True, **QWEN),
    "qwen3-8b": llama(151_936, 4096, 12_288, 36, 32, 8, 32_768, model_type="qwen3", head_dim=128, **QWEN),
    "gemma2-2b": llama(256_000, 2304, 9216, 26, 8, 4, 8192, model_type="gemma2", sliding_window=4096, **GEMMA),
    "gemma2-9b": llama(256_000, 3584, 14_336, 42, 16, 8, 8192, model_type="gemma2", sliding_window=4096, **GEMMA),
    "bert-base": bert(30_522, 768, 3072, 12, 12, 512, pad_token_id=0),
    "bert-large": bert(30_522, 1024, 4096, 24, 16, 512, pad_token_id=0),
    "all-minilm-l6-v2": bert(30_522, 384, 1536, 6, 12, 512, pad_token_id=0),
    "roberta-base": bert(50_265, 768, 3072, 12, 12, 514, "roberta", "RobertaForMaskedLM", layer_norm_eps=1e-5, type_vocab_size=1, bos_token_id=0, eos_token_id=2, pad_token_id=1),
    "xlm-roberta-base": bert(250_002, 768, 3072, 12, 12, 514, "xlm-roberta", "XLMRobertaModel", layer_norm_eps=1e-5, type_vocab_size=1, bos_token_id=0, eos_token_id=2, pad_token_id=1),
    "distilbert-base": dict(model_type="distilbert", architectures=["DistilBertModel"], vocab_size=30_522, dim=768, hidden_dim=3072, n_layers=6, n_heads=12, pad_token_id=0),
    "electra-small-generator": bert(30_522, 256, 1024, 12, 4, 512, "electra", "ElectraForMaskedLM", embedding_size=128, pad_token_id=0),
    "modernbert-base": dict(model_type="modernbert", architectures=["ModernBertForMaskedLM"], vocab_size=50_368, hidden_size=768, intermediate_size=1152, num_hidden_layers=22,
                            num_attention_heads=12, bos_token_id=50_281, eos_token_id=50_282, pad_token_id=50_283),
    "deberta-v3-base": bert(128_100, 768, 3072, 12, 12, 512, "deberta-v2", "DebertaV2Model", layer_norm_eps=1e-7, type_vocab_size=0, relative_attention=True, position_buckets=256,
                            norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type="p2c|c2p", position_biased_input=False, pad_token_id=0),
    "deberta-v2-xlarge": bert(128_100, 1536, 6144, 24, 24, 512, "deberta-v2", "DebertaV2Model", layer_norm_eps=1e-7, type_vocab_size=0, relative_attention=True, position_buckets=256,
                              norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type="p2c|c2p", position_biased_input=False, pad_token_id=0, conv_kernel_size=3, conv_act="gelu",
                              attention_head_size=64),
    "t5-small": t5(512, 2048, 6, 8),
    "t5-base": t5(768, 3072, 12, 12),
    "flan-t5-base": t5(768, 2048, 12, 12, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "bart-base": dict(model_type="bart", vocab_size=50_265, d_model=768, encoder_layers=6, decoder_layers=6, encoder_ffn_dim=3072, decoder_ffn_dim=3072, encoder_attention_heads=12,
                      decoder_attention_heads=12, bos_token_id=0, eos_token_id=2, pad_token_id=1),
    "gemma3-1b": llama(262_144, 1152, 6912, 26, 4, 1, 32_768, model_type="gemma3_text", sliding_window=512, **GEMMA),
    "embeddinggemma-300m": llama(262_144, 768, 1152, 24, 3, 1, 2048, model_type="gemma3_text", architectures=["Gemma3TextModel"], sliding_window=512, use_bidirectional_attention=True, **GEMMA),
    "gemma4-26b-a4b": llama(262_144, 2816, 2112, 30, 16, 8, 262_144, model_type="gemma4_text", global_head_dim=512, num_global_key_value_heads=2, attention_k_eq_v=True,
                            sliding_window=1024, hidden_size_per_layer_input=0, final_logit_softcapping=30.0, enable_moe_block=True, num_experts=128, top_k_experts=8,
                            moe_intermediate_size=704, **{k: v for k, v in GEMMA.items() if k != "query_pre_attn_scalar"}),
    "llama-4-scout": llama(202_048, 5120, 8192, 48, 40, 8, 10_485_760, model_type="llama4_text", head_dim=128, intermediate_size_mlp=16_384, num_local_experts=16, num_experts_per_tok=1,
                           bos_token_id=200_000, eos_token_id=[200_001, 200_007, 200_008], rope_theta=500_000.0, attention_chunk_size=8192, interleave_moe_layer_step=1,
                           rope_scaling={"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0, "original_max_position_embeddings": 8192}),
    "mixtral-8x22b": llama(32_768, 6144, 16_384, 56, 48, 8, 65_536, model_type="mixtral", rope_theta=1_000_000.0, num_local_experts=8, num_experts_per_tok=2),
    "qwen3-30b-a3b": llama(151_936, 2048, 6144, 48, 32, 4, 40_960, model_type="qwen3_moe", head_dim=128, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
                           norm_topk_prob=True, **QWEN),
    "qwen3-235b-a22b": llama(151_936, 4096, 12_288, 94, 64, 4, 40_960, model_type="qwen3_moe", head_dim=128, moe_intermediate_size=1536, num_experts=128, num_experts_per_tok=8,
                             norm_topk_prob=True, **QWEN),
    "gemma-2b": llama(256_000, 2048, 16_384, 18, 8, 1, 8192, model_type="gemma", **{k: v for k, v in GEMMA.items() if k != "query_pre_attn_scalar"}),
    "phi-2": dict(model_type="phi", vocab_size=51_200, hidden_size=2560, intermediate_size=10_240, num_hidden_layers=32, num_attention_heads=32, max_position_embeddings=2048,
                  partial_rotary_factor=0.4, hidden_act="gelu_new", bos_token_id=50_256, eos_token_id=50_256),
    "phi-3-mini": llama(32_064, 3072, 8192, 32, 32, 32, 4096, model_type="phi3", sliding_window=2047, original_max_position_embeddings=4096),
    "phi-4": llama(100_352, 5120, 17_920, 40, 40, 10, 16_384, model_type="phi3", rope_theta=250_000.0, original_max_position_embeddings=16_384),
    "deepseek-v2-lite": llama(102_400, 2048, 10_944, 27, 16, 16, 163_840, model_type="deepseek_v2", q_lora_rank=None, moe_intermediate_size=1408, n_routed_experts=64,
                              num_experts_per_tok=6, n_shared_experts=2, first_k_dense_replace=1, topk_method="greedy", **DEEPSEEK | dict(rope_scaling=YARN_V2)),
    "deepseek-v3": llama(129_280, 7168, 18_432, 61, 128, 128, 163_840, model_type="deepseek_v3", q_lora_rank=1536, moe_intermediate_size=2048, n_routed_experts=256, num_experts_per_tok=8,
                         n_shared_experts=1, first_k_dense_replace=3, n_group=8, topk_group=4, routed_scaling_factor=2.5, norm_topk_prob=True, num_nextn_predict_layers=1,
                         **DEEPSEEK | dict(rope_scaling={**YARN_V2, "mscale": 1.0, "mscale_all_dim": 1.0})),
    "gpt-oss-20b": llama(201_088, 2880, 2880, 24, 64, 8, 131_072, model_type="gpt_oss", num_local_experts=32, **GPT_OSS),
    "gpt-oss-120b": llama(201_088, 2880, 2880, 36, 64, 8, 131_072, model_type="gpt_oss", num_local_experts=128, **GPT_OSS),
    "olmo2-1b": llama(100_352, 2048, 8192, 16, 16, 16, 4096, model_type="olmo2", rope_theta=500_000.0, rms_norm_eps=1e-6),
    "olmo2-7b": llama(100_352, 4096, 11_008, 32, 32, 32, 4096, model_type="olmo2", rope_theta=500_000.0, rms_norm_eps=1e-6),
    "granite-3.1-2b": llama(49_155, 2048, 8192, 40, 32, 8, 131_072, model_type="granite", tie_word_embeddings=True, rope_theta=5_000_000.0, embedding_multiplier=12.0,
                            logits_scaling=8.0, residual_multiplier=0.22, attention_multiplier=0.015625),
    "smollm3-3b": llama(128_256, 2048, 11_008, 36, 16, 4, 65_536, model_type="smollm3", tie_word_embeddings=True, rope_theta=5_000_000.0),
    "starcoder2-3b": dict(model_type="starcoder2", vocab_size=49_152, hidden_size=3072, intermediate_size=12_288, num_hidden_layers=30, num_attention_heads=24, num_key_value_heads=2,
                          max_position_embeddings=16_384, rope_theta=999_999.44, sliding_window=4096, use_bias=True, norm_epsilon=1e-5, hidden_act="gelu_pytorch_tanh"),
    "stablelm-2-1.6b": dict(model_type="stablelm", vocab_size=100_352, hidden_size=2048, intermediate_size=5632, num_hidden_layers=24, num_attention_heads=32, num_key_value_heads=32,
                            max_position_embeddings=4096, use_qkv_bias=True, partial_rotary_factor=0.25, layer_norm_eps=1e-5),
    "command-r-35b": dict(model_type="cohere", vocab_size=256_000, hidden_size=8192, intermediate_size=22_528, num_hidden_layers=40, num_attention_heads=64, num_key_value_heads=64,
                          max_position_embeddings=8192, rope_theta=8_000_000.0, logit_scale=0.0625, layer_norm_eps=1e-5),
    "glm-4-9b": llama(151_552, 4096, 13_696, 40, 32, 2, 32_768, model_type="glm4", head_dim=128, attention_bias=True, partial_rotary_factor=0.5),
    "glm-4.5-air": llama(151_552, 4096, 10_944, 46, 96, 8, 131_072, model_type="glm4_moe", head_dim=128, attention_bias=True, partial_rotary_factor=0.5, rope_theta=1_000_000.0,
                         moe_intermediate_size=1408, n_routed_experts=128, num_experts_per_tok=8, n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1),
    "pythia-160m": dict(model_type="gpt_neox", vocab_size=50_304, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, max_position_embeddings=2048,
                        rotary_pct=0.25, bos_token_id=0, eos_token_id=0),
    "gpt-j-6b": dict(model_type="gptj", vocab_size=50_400, n_embd=4096, n_head=16, n_layer=28, n_positions=2048, rotary_dim=64, bos_token_id=50_256, eos_token_id=50_256),
    "falcon-7b": dict(model_type="falcon", vocab_size=65_024, hidden_size=4544, num_hidden_layers=32, num_attention_heads=71, multi_query=True, parallel_attn=True, bos_token_id=11,
                      eos_token_id=11),
    "falcon-40b": dict(model_type="falcon", vocab_size=65_024, hidden_size=8192, num_hidden_layers=60, num_attention_heads=128, num_kv_heads=8, new_decoder_architecture=True, bos_token_id=11,
                       eos_token_id=11),
    "falcon-rw-1b": dict(model_type="falcon", vocab_size=50_304, hidden_size=2048, num_hidden_layers=24, num_attention_heads=32, alibi=True, bias=True, multi_query=False,
                         parallel_attn=False, bos_token_id=1, eos_token_id=2),
    "bloom-560m": dict(model_type="bloom", vocab_size=250_880, hidden_size=1024, n_layer=24, n_head=16, bos_token_id=1, eos_token_id=2, pad_token_id=3),
    "bloom": dict(model_type="bloom", vocab_size=250_880, hidden_size=14_336, n_layer=70, n_head=112, bos_token_id=1, eos_token_id=2, pad_token_id=3),
    "mpt-7b": dict(model_type="mpt", vocab_size=50_432, d_model=4096, n_heads=32, n_layers=32, max_seq_len=2048, attn_config={"alibi": True, "alibi_bias_max": 8}),
    "opt-125m": dict(model_type="opt", vocab_size=50_272, hidden_size=768, ffn_dim=3072, num_hidden_layers=12, num_attention_heads=12, max_position_embeddings=2048, word_embed_proj_dim=768,
                     bos_token_id=2, eos_token_id=2, pad_token_id=1),
    "opt-350m": dict(model_type="opt", vocab_size=50_272, hidden_size=1024, ffn_dim=4096, num_hidden_layers=24, num_attention_heads=16, max_position_embeddings=2048, word_embed_proj_dim=512,
                     do_layer_norm_before=False, bos_token_id=2, eos_token_id=2, pad_token_id=1),
    "qwen1.5-moe-a2.7b": llama(151_936, 2048, 5632, 24, 16, 16, 8192, model_type="qwen2_moe", num_experts=60, num_experts_per_tok=4, moe_intermediate_size=1408,
                               shared_expert_intermediate_size=5632, **QWEN),
    "qwen3-next-80b-a3b": llama(151_936, 2048, 5120, 48, 16, 2, 262_144, model_type="qwen3_next", head_dim=256, partial_rotary_factor=0.25, num_experts=512, num_experts_per_tok=10,
                                moe_intermediate_size=512, shared_expert_intermediate_size=512, norm_topk_prob=True, linear_num_key_heads=16, linear_num_value_heads=32,
                                linear_key_head_dim=128, linear_value_head_dim=128, linear_conv_kernel_dim=4, **QWEN | dict(rope_theta=10_000_000.0)),
    "command-r7b": dict(model_type="cohere2", vocab_size=256_000, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
                        max_position_embeddings=8192, rope_theta=50_000.0, logit_scale=0.25, sliding_window=4096, sliding_window_pattern=4, layer_norm_eps=1e-5),
    "granite-3.0-1b-a400m": llama(49_155, 1024, 512, 24, 16, 8, 4096, model_type="granitemoe", num_local_experts=32, num_experts_per_tok=8, tie_word_embeddings=True,
                                  embedding_multiplier=12.0, logits_scaling=6.0, residual_multiplier=0.22, attention_multiplier=0.015625),
    "dbrx": dict(model_type="dbrx", vocab_size=100_352, d_model=6144, n_heads=48, n_layers=40, max_seq_len=32_768, attn_config={"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 500_000.0},
                 ffn_config={"ffn_hidden_size": 10_752, "moe_num_experts": 16, "moe_top_k": 4}),
    "grok-1": llama(131_072, 6144, 32_768, 64, 48, 8, 8192, model_type="grok-1", num_experts=8, num_experts_per_tok=2, tie_word_embeddings=True),
    "nanochat-d32": dict(model_type="nanochat", vocab_size=65_536, hidden_size=2048, intermediate_size=8192, num_hidden_layers=32, num_attention_heads=16, num_key_value_heads=16,
                         max_position_embeddings=2048, bos_token_id=0, eos_token_id=1),
}


def published(name: str) -> ModelConfig:
    """The configuration of a published model. Raises CheckpointError for an unknown name, naming the nearest."""
    if name not in PUBLISHED:
        raise CheckpointError(f"there is no published size {name!r} here" + nearest(name, PUBLISHED))
    return to_model_config(PUBLISHED[name], where=name)
