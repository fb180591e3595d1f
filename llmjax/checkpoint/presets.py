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
    "t5-small": t5(512, 2048, 6, 8),
    "t5-base": t5(768, 3072, 12, 12),
    "flan-t5-base": t5(768, 2048, 12, 12, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "bart-base": dict(model_type="bart", vocab_size=50_265, d_model=768, encoder_layers=6, decoder_layers=6, encoder_ffn_dim=3072, decoder_ffn_dim=3072, encoder_attention_heads=12,
                      decoder_attention_heads=12, bos_token_id=0, eos_token_id=2, pad_token_id=1),
    "gemma3-1b": llama(262_144, 1152, 6912, 26, 4, 1, 32_768, model_type="gemma3_text", sliding_window=512, **GEMMA),
}


def published(name: str) -> ModelConfig:
    """The configuration of a published model. Raises CheckpointError for an unknown name, naming the nearest."""
    if name not in PUBLISHED:
        raise CheckpointError(f"there is no published size {name!r} here" + nearest(name, PUBLISHED))
    return to_model_config(PUBLISHED[name], where=name)
