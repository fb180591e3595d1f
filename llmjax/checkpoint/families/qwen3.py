"""Qwen3 (dense): Llama with an RMS norm on each head's queries and keys; windows as in Qwen2."""
from dataclasses import replace

from llmjax.checkpoint.families import base
from llmjax.checkpoint.families.qwen2 import windows, write_windows
from llmjax.checkpoint.fields import Fields, both_ropes, read_rope
from llmjax.core.model_config import Attention, Layer, Mlp, ModelConfig, Norm, QKNorm


def read(f: Fields) -> ModelConfig:
    dim, heads, context = f.count("hidden_size"), f.count("num_attention_heads"), f.count("max_position_embeddings", 32_768)
    norm, biased = Norm(eps=f.number("rms_norm_eps", 1e-6)), f.flag("attention_bias")
    mixer = Attention(heads, base.kv_heads(f, heads, 32), f.count("head_dim", 128), read_rope(f, 10_000.0, context),
                      qkv_bias=biased, out_bias=biased, qk_norm=QKNorm(norm))
    ffn = Mlp(f.count("intermediate_size"), f.activation("hidden_act", "silu"))
    layers = [Layer(replace(mixer, window=window), ffn) for window in windows(f, f.count("num_hidden_layers"))]
    return base.model(f, "qwen3", layers, dim=dim, norm=norm, tied=False, context=context)


def write(config: ModelConfig) -> dict:
    first = base.first(config)
    return {**base.common(config), **both_ropes(first.mixer.rope), **write_windows(config), "attention_bias": first.mixer.qkv_bias}


FAMILY = base.Family("qwen3", ("qwen3",), "Qwen3ForCausalLM", read, write, base.table(*base.ATTENTION, *base.QK_NORMS, *base.MLP, *base.PRE))
