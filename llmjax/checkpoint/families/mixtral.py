"""Mixtral: Mistral's attention over a mixture of experts. The files keep each expert apart (w1 gate, w3 up, w2 down)."""
from llmjax.checkpoint.families import base
from llmjax.checkpoint.fields import Fields, both_ropes, read_rope
from llmjax.checkpoint.table import Row
from llmjax.core.model_config import Attention, Layer, MixtureOfExperts, ModelConfig, Norm

M = base.L + "block_sparse_moe."
EXPERTS = (Row(M + "gate.weight", "ffn/router", "e d -> d e"), Row(M + "experts.{e}.w1.weight", "ffn/gate", "f d -> d f"),
           Row(M + "experts.{e}.w3.weight", "ffn/up", "f d -> d f"), Row(M + "experts.{e}.w2.weight", "ffn/down", "d f -> f d"))


def read(f: Fields) -> ModelConfig:
    dim, heads, context = f.count("hidden_size"), f.count("num_attention_heads"), f.count("max_position_embeddings", 131_072)
    window = f.value("sliding_window", None) and f.count("sliding_window", None)
    mixer = Attention(heads, base.kv_heads(f, heads, 8), base.head_dim(f, dim, heads), read_rope(f, 1_000_000.0, context), window)
    ffn = MixtureOfExperts(f.count("num_local_experts", 8), f.count("num_experts_per_tok", 2), f.count("intermediate_size"), f.activation("hidden_act", "silu"))
    return base.model(f, "mixtral", [Layer(mixer, ffn)] * f.count("num_hidden_layers"), dim=dim, norm=Norm(eps=f.number("rms_norm_eps", 1e-5)), tied=False, context=context)


def write(config: ModelConfig) -> dict:
    first = base.first(config)
    return {**base.common(config), **both_ropes(first.mixer.rope), "sliding_window": first.mixer.window,
            "num_local_experts": first.ffn.experts, "num_experts_per_tok": first.ffn.top_k}


FAMILY = base.Family("mixtral", ("mixtral",), "MixtralForCausalLM", read, write, base.table(*base.ATTENTION, *EXPERTS, *base.PRE), MixtureOfExperts)
