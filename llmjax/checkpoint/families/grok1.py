"""Grok-1: norms before and after each block, capped scores, two of eight experts a token (their probabilities as they are), one table for both ends, scaled at each.

Tensor names are those of its conversions to the Hugging Face layout; the published code (github.com/xai-org/grok-1) says the mathematics.
"""
from typing import Any

from llmjax.checkpoint.families import base
from llmjax.checkpoint.fields import Fields, both_ropes, read_rope
from llmjax.checkpoint.table import Row
from llmjax.core.model_config import Attention, Layer, MixtureOfExperts, ModelConfig, Norm

L, M = base.L, base.L + "moe_block."
NORMS = tuple(Row(f"{L}{theirs}.weight", f"{ours}/scale") for theirs, ours in (
    ("pre_attn_norm", "norm_mixer"), ("post_attn_norm", "norm_mixer_out"), ("pre_moe_norm", "norm_ffn"), ("post_moe_norm", "norm_ffn_out")))
ATTENTION = (*(Row(f"{L}attn.{name}_proj.weight", f"mixer/{name}", "(n h) d -> d n h") for name in "qkv"), Row(L + "attn.o_proj.weight", "mixer/o", "d (n h) -> n h d"))
EXPERTS = (Row(M + "gate.weight", "ffn/router", "e d -> d e"),
           *(Row(f"{M}experts.{{e}}.{theirs}.weight", f"ffn/{ours}", "o i -> i o") for theirs, ours in (("linear", "gate"), ("linear_v", "up"), ("linear_1", "down"))))


def read(f: Fields) -> ModelConfig:
    dim, heads, context = f.count("hidden_size"), f.count("num_attention_heads"), f.count("max_position_embeddings", 8192)
    size, cap = base.head_dim(f, dim, heads), f.number("max_attn_value", 30.0)
    mixer = Attention(heads, base.kv_heads(f, heads, 8), size, read_rope(f, 10_000.0, context), scale=base.scale_of(float(f.number("attn_output_multiplier", size ** -0.5)), size),
                      softcap=float(cap) if cap > 0 else None)
    ffn = MixtureOfExperts(f.count("num_experts", 8), f.count("num_experts_per_tok", 2), f.count("intermediate_size"), f.activation("hidden_act", "gelu_new"), renormalize=False)
    return base.model(f, "grok1", [Layer(mixer, ffn, "sandwich")] * f.count("num_hidden_layers"), dim=dim, norm=Norm(eps=f.number("rms_norm_eps", 1e-5)), tied=True, context=context,
                      embed_scale=float(f.number("embedding_multiplier_scale", 78.38367176906169)), logit_scale=float(f.number("output_multiplier_scale", 0.5773502691896257)))


def write(config: ModelConfig) -> dict[str, Any]:
    first = base.first(config)
    mixer = first.mixer
    return {**base.common(config), **both_ropes(mixer.rope), "attn_output_multiplier": mixer.head_dim ** -0.5 if mixer.scale is None else mixer.scale,
            "max_attn_value": mixer.softcap or 0.0, "num_experts": first.ffn.experts, "num_experts_per_tok": first.ffn.top_k, "embedding_multiplier_scale": config.embed_scale,
            "output_multiplier_scale": config.logit_scale}


FAMILY = base.Family("grok1", ("grok-1",), "Grok1ModelForCausalLM", read, write, base.table(*ATTENTION, *EXPERTS, *NORMS), MixtureOfExperts)
