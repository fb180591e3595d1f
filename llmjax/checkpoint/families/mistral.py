"""Mistral: Llama without biases, every layer under the same sliding window (or none)."""
from llmjax.checkpoint.families import base
from llmjax.checkpoint.fields import Fields, both_ropes, read_rope
from llmjax.core.model_config import Attention, Layer, Mlp, ModelConfig, Norm


def read(f: Fields) -> ModelConfig:
    dim, heads, context = f.count("hidden_size"), f.count("num_attention_heads"), f.count("max_position_embeddings", 131_072)
    window = f.value("sliding_window", 4096) and f.count("sliding_window", 4096)
    mixer = Attention(heads, base.kv_heads(f, heads, 8), base.head_dim(f, dim, heads), read_rope(f, 10_000.0, context), window)
    ffn = Mlp(f.count("intermediate_size"), f.activation("hidden_act", "silu"))
    return base.model(f, "mistral", [Layer(mixer, ffn)] * f.count("num_hidden_layers"), dim=dim, norm=Norm(eps=f.number("rms_norm_eps", 1e-6)), tied=False, context=context)


def write(config: ModelConfig) -> dict:
    first = base.first(config)
    return {**base.common(config), **both_ropes(first.mixer.rope), "sliding_window": first.mixer.window}


FAMILY = base.Family("mistral", ("mistral",), "MistralForCausalLM", read, write, base.table(*base.ATTENTION, *base.MLP, *base.PRE))
