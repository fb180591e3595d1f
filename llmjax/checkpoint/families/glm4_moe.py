"""GLM-4.5 and 4.6: grouped queries with half of each head rotated, DeepSeek-V3's mixture behind dense layers; queries and keys may be normed.

The layers behind the last one that predict further tokens (num_nextn_predict_layers) are left out.
"""
from typing import Any

from llmjax.checkpoint.families import base
from llmjax.checkpoint.families.deepseek_v3 import SELECTION, SHARED, layers, sigmoid_experts, write_layers
from llmjax.checkpoint.families.qwen3_moe import EXPERTS
from llmjax.checkpoint.fields import Fields, both_ropes, read_rope
from llmjax.checkpoint.table import Table
from llmjax.core.model_config import Attention, MixtureOfExperts, Mlp, ModelConfig, Norm, QKNorm


def rows(config: ModelConfig) -> Table:
    return base.table(*base.ATTENTION, *base.QK_NORMS, *EXPERTS, SELECTION, *SHARED, *base.MLP, *base.PRE, extras=(rf"model\.layers\.{len(config.layers)}\..*",))


def read(f: Fields) -> ModelConfig:
    dim, heads, context, activation = f.count("hidden_size"), f.count("num_attention_heads"), f.count("max_position_embeddings", 131_072), f.activation("hidden_act", "silu")
    norm = Norm(eps=f.number("rms_norm_eps", 1e-5))
    mixer = Attention(heads, base.kv_heads(f, heads, 8), base.head_dim(f, dim, heads), read_rope(f, 10_000.0, context, fraction=0.5), qkv_bias=f.flag("attention_bias"),
                      qk_norm=QKNorm(norm) if f.flag("use_qk_norm") else None)
    experts = sigmoid_experts(f, activation, experts=128, top_k=8, groups=(1, 1), scale=1.0, hidden=1408)
    f.ignore("num_nextn_predict_layers", "num_mtp_layers")                               # layers that are left out
    stack = layers(f, mixer, Mlp(f.count("intermediate_size"), activation), experts, 1)
    return base.model(f, "glm4_moe", stack, dim=dim, norm=norm, tied=False, context=context)


def write(config: ModelConfig) -> dict[str, Any]:
    mixer = base.first(config).mixer
    return {**base.common(config), **both_ropes(mixer.rope, partial=True), **write_layers(config), "attention_bias": mixer.qkv_bias, "use_qk_norm": mixer.qk_norm is not None}


FAMILY = base.Family("glm4_moe", ("glm4_moe",), "Glm4MoeForCausalLM", read, write, rows, (MixtureOfExperts, Mlp))
