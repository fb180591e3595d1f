"""Granite: Llama with four multipliers, on the embedding, the scores, what each block adds, and the logits."""
from typing import Any

from llmjax.checkpoint.families import base
from llmjax.checkpoint.fields import Fields, both_ropes, read_rope
from llmjax.core.model_config import Attention, FeedForward, Layer, Mlp, ModelConfig, Norm


def read_granite(f: Fields, family: str, ffn: FeedForward) -> ModelConfig:
    """What the families of Granite share; ffn is the feed-forward of every layer."""
    dim, heads, context = f.count("hidden_size"), f.count("num_attention_heads"), f.count("max_position_embeddings", 2048)
    biased, size = f.flag("attention_bias"), base.head_dim(f, dim, heads)
    mixer = Attention(heads, base.kv_heads(f, heads, heads), size, read_rope(f, 10_000.0, context), qkv_bias=biased, out_bias=biased,
                      scale=base.scale_of(float(f.number("attention_multiplier", 1.0)), size))
    layer = Layer(mixer, ffn, residual_scale=float(f.number("residual_multiplier", 1.0)))
    return base.model(f, family, [layer] * f.count("num_hidden_layers"), dim=dim, norm=Norm(eps=f.number("rms_norm_eps", 1e-6)), tied=False, context=context,
                      embed_scale=float(f.number("embedding_multiplier", 1.0)), logit_scale=1.0 / f.number("logits_scaling", 1.0))


def write_granite(config: ModelConfig) -> dict[str, Any]:
    first = base.first(config)
    mixer = first.mixer
    return {**base.common(config), **both_ropes(mixer.rope), "attention_bias": mixer.qkv_bias, "embedding_multiplier": config.embed_scale,
            "attention_multiplier": mixer.head_dim ** -0.5 if mixer.scale is None else mixer.scale, "residual_multiplier": first.residual_scale,
            "logits_scaling": base.inverse(lambda x: 1.0 / x, 1.0 / config.logit_scale, config.logit_scale)}


def read(f: Fields) -> ModelConfig:
    return read_granite(f, "granite", Mlp(f.count("intermediate_size"), f.activation("hidden_act", "silu"), bias=f.flag("mlp_bias")))


def write(config: ModelConfig) -> dict[str, Any]:
    return {**write_granite(config), "mlp_bias": base.first(config).ffn.bias}


FAMILY = base.Family("granite", ("granite",), "GraniteForCausalLM", read, write, base.table(*base.ATTENTION, *base.MLP, *base.PRE))
