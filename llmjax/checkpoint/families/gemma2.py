"""Gemma 2: norms before and after each block with scales kept around 0, soft caps on scores and logits, every other layer sliding, embedding times sqrt(dim)."""
from dataclasses import replace
from typing import Any

from llmjax.checkpoint.families import base
from llmjax.checkpoint.fields import Fields, both_ropes, read_rope
from llmjax.core.model_config import Attention, Layer, Mlp, ModelConfig, Norm


def read(f: Fields) -> ModelConfig:
    dim, heads, context, size = f.count("hidden_size"), f.count("num_attention_heads"), f.count("max_position_embeddings", 8192), f.count("head_dim", 256)
    biased, cap, final = f.flag("attention_bias"), f.optional("attn_logit_softcapping", 50.0), f.optional("final_logit_softcapping", 30.0)
    f.ignore("hidden_act", "sliding_window_size")                     # published files carry them beside hidden_activation and sliding_window, which are used
    mixer = Attention(heads, base.kv_heads(f, heads, 4), size, read_rope(f, 10_000.0, context), qkv_bias=biased, out_bias=biased,
                      scale=base.scale_of(f.number("query_pre_attn_scalar", 256) ** -0.5, size), softcap=cap and float(cap))
    ffn = Mlp(f.count("intermediate_size"), f.activation("hidden_activation", "gelu_pytorch_tanh"))
    windows = base.layer_windows(f, f.count("num_hidden_layers"), f.value("sliding_window", 4096) and f.count("sliding_window", 4096), lambda i: i % 2 == 0)
    layers = [Layer(replace(mixer, window=window), ffn, "sandwich") for window in windows]
    norm = Norm(eps=f.number("rms_norm_eps", 1e-6), offset=1.0)
    return base.model(f, "gemma2", layers, dim=dim, norm=norm, tied=True, context=context, embed_scale=dim ** 0.5, logit_softcap=final and float(final))


def write(config: ModelConfig) -> dict:
    return {**write_gemma(config), **both_ropes(base.first(config).mixer.rope)}


def write_gemma(config: ModelConfig) -> dict[str, Any]:
    """The fields that Gemma 2 and 3 share."""
    mixer = base.first(config).mixer
    return {**base.common(config, "hidden_activation"), "attention_bias": mixer.qkv_bias, "attn_logit_softcapping": mixer.softcap, "final_logit_softcapping": config.logit_softcap,
            "query_pre_attn_scalar": scalar(mixer), "sliding_window": base.widest(config) or 4096, "layer_types": base.layer_types(config)}


def scalar(mixer: Attention) -> float:
    """The number whose -1/2 power is the attention scale, whole where it can be."""
    if mixer.scale is None:
        return mixer.head_dim
    return base.inverse(lambda x: x ** -0.5, mixer.scale ** -2, mixer.scale)


FAMILY = base.Family("gemma2", ("gemma2",), "Gemma2ForCausalLM", read, write, base.table(*base.ATTENTION, *base.MLP, *base.SANDWICH))
