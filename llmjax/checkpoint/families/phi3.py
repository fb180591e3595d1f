"""Phi-3, 3.5 and 4: Llama with queries, keys and values in one tensor, gate and up in another, and (Phi-4-mini) a part of each head rotated; long contexts by LongRoPE."""
from llmjax.checkpoint.families import base
from llmjax.checkpoint.fields import Fields, both_ropes, read_rope
from llmjax.checkpoint.table import Row
from llmjax.core.model_config import Attention, Layer, Mlp, ModelConfig, Norm

FUSED_MLP = (Row(base.L + "mlp.gate_up_proj.weight", ("ffn/gate", "ffn/up"), "[f] d -> d f"), base.MLP[4])


def read(f: Fields) -> ModelConfig:
    dim, heads, context = f.count("hidden_size"), f.count("num_attention_heads"), f.count("max_position_embeddings", 4096)
    window = f.value("sliding_window", None) and f.count("sliding_window", None)
    f.fixed(interpolate_factor=1, full_attn_mod=1, lm_head_bias=False)                  # settings of Phi-4-mini's own code
    mixer = Attention(heads, base.kv_heads(f, heads, heads), base.head_dim(f, dim, heads), read_rope(f, 10_000.0, context, fraction=1.0), window)
    ffn = Mlp(f.count("intermediate_size"), f.activation("hidden_act", "silu"))
    return base.model(f, "phi3", [Layer(mixer, ffn)] * f.count("num_hidden_layers"), dim=dim, norm=Norm(eps=f.number("rms_norm_eps", 1e-5)), tied=False, context=context)


def write(config: ModelConfig) -> dict:
    mixer = base.first(config).mixer
    original = mixer.rope.scaling.context if mixer.rope.scaling else config.context
    return {**base.common(config), **both_ropes(mixer.rope, partial=True), "sliding_window": mixer.window, "original_max_position_embeddings": original}


FAMILY = base.Family("phi3", ("phi3",), "Phi3ForCausalLM", read, write, base.table(
    Row(base.L + "self_attn.qkv_proj.weight", ("mixer/q", "mixer/k", "mixer/v"), "[n h] d -> d n h"), base.ATTENTION[3], *FUSED_MLP, *base.PRE))
