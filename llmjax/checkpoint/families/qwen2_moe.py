"""Qwen1.5 and Qwen2 with experts: Qwen2's attention; beside the chosen experts an MLP that every token passes, times a sigmoid gate."""
from dataclasses import replace
from typing import Any

from llmjax.checkpoint.families import base
from llmjax.checkpoint.families.qwen2 import windows, write_windows
from llmjax.checkpoint.families.qwen3_moe import EXPERTS, M, experts_of, sparse, write_experts
from llmjax.checkpoint.fields import Fields, both_ropes, read_rope
from llmjax.checkpoint.table import Row
from llmjax.core.model_config import Attention, Layer, MixtureOfExperts, Mlp, ModelConfig, Norm

SHARED = (*(Row(f"{M}shared_expert.{name}_proj.weight", f"ffn/shared/{name}", "o i -> i o") for name in ("gate", "up", "down")),
          Row(M + "shared_expert_gate.weight", "ffn/shared_gate", "g d -> d g"))


def read(f: Fields) -> ModelConfig:
    dim, heads, context = f.count("hidden_size"), f.count("num_attention_heads"), f.count("max_position_embeddings", 32_768)
    norm, count = Norm(eps=f.number("rms_norm_eps", 1e-6)), f.count("num_hidden_layers")
    mixer = Attention(heads, base.kv_heads(f, heads, 16), base.head_dim(f, dim, heads), read_rope(f, 10_000.0, context), qkv_bias=f.flag("qkv_bias", True))
    activation = f.activation("hidden_act", "silu")
    whole = Mlp(f.count("intermediate_size", 5632), activation)
    experts = experts_of(f, activation, shared=f.count("shared_expert_intermediate_size", 5632), shared_gate=True)
    layers = [Layer(replace(mixer, window=window), experts if mixed else whole) for window, mixed in zip(windows(f, count), sparse(f, count))]
    return base.model(f, "qwen2_moe", layers, dim=dim, norm=norm, tied=False, context=context)


def write(config: ModelConfig) -> dict[str, Any]:
    mixer = base.first(config).mixer
    shared = next((layer.ffn.shared for layer in config.layers if isinstance(layer.ffn, MixtureOfExperts)), None)
    return {**base.common(config), **write_experts(config), **both_ropes(mixer.rope), **write_windows(config), "qkv_bias": mixer.qkv_bias, "shared_expert_intermediate_size": shared}


FAMILY = base.Family("qwen2_moe", ("qwen2_moe",), "Qwen2MoeForCausalLM", read, write,
                     base.table(*base.ATTENTION, *EXPERTS, *SHARED, *base.MLP, *base.PRE), (MixtureOfExperts, Mlp))
