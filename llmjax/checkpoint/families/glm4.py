"""GLM-4 (0414): norms before and after each block, half of each head rotated in neighbouring pairs, biases on queries, keys and values, gate and up in one tensor."""
from llmjax.checkpoint.families import base
from llmjax.checkpoint.families.phi3 import FUSED_MLP
from llmjax.checkpoint.fields import Fields, both_ropes, read_rope
from llmjax.checkpoint.table import Row
from llmjax.core.model_config import Attention, Layer, Mlp, ModelConfig, Norm

NORMS = tuple(Row(f"{base.L}{theirs}.weight", f"{ours}/scale") for theirs, ours in (
    ("input_layernorm", "norm_mixer"), ("post_self_attn_layernorm", "norm_mixer_out"), ("post_attention_layernorm", "norm_ffn"), ("post_mlp_layernorm", "norm_ffn_out")))


def read(f: Fields) -> ModelConfig:
    dim, heads, context = f.count("hidden_size"), f.count("num_attention_heads"), f.count("max_position_embeddings", 131_072)
    mixer = Attention(heads, base.kv_heads(f, heads, 2), f.count("head_dim", 128), read_rope(f, 10_000.0, context, fraction=0.5, interleaved=True),
                      qkv_bias=f.flag("attention_bias", True))
    ffn = Mlp(f.count("intermediate_size"), f.activation("hidden_act", "silu"))
    return base.model(f, "glm4", [Layer(mixer, ffn, "sandwich")] * f.count("num_hidden_layers"), dim=dim, norm=Norm(eps=f.number("rms_norm_eps", 1.5625e-07)), tied=False, context=context)


def write(config: ModelConfig) -> dict:
    mixer = base.first(config).mixer
    return {**base.common(config), **both_ropes(mixer.rope, partial=True), "attention_bias": mixer.qkv_bias}


FAMILY = base.Family("glm4", ("glm4",), "Glm4ForCausalLM", read, write, base.table(*base.ATTENTION, *FUSED_MLP, *NORMS))
