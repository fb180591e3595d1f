"""Llama 1 to 3.x, SmolLM2 and whoever else says model_type "llama": grouped queries, rotary positions with every scaling, SwiGLU, optional biases."""
from llmjax.checkpoint.families import base
from llmjax.checkpoint.fields import Fields, both_ropes, read_rope
from llmjax.core.model_config import Attention, Layer, Mlp, ModelConfig, Norm


def read(f: Fields) -> ModelConfig:
    dim, heads, context = f.count("hidden_size"), f.count("num_attention_heads"), f.count("max_position_embeddings", 2048)
    biased = f.flag("attention_bias")
    mixer = Attention(heads, f.count("num_key_value_heads", heads), base.head_dim(f, dim, heads), read_rope(f, 10_000.0, context), qkv_bias=biased, out_bias=biased)
    ffn = Mlp(f.count("intermediate_size"), f.activation("hidden_act", "silu"), bias=f.flag("mlp_bias"))
    return base.model(f, "llama", [Layer(mixer, ffn)] * f.count("num_hidden_layers"), dim=dim, norm=Norm(eps=f.number("rms_norm_eps", 1e-6)), tied=False, context=context)


def write(config: ModelConfig) -> dict:
    first = base.first(config)
    return {**base.common(config), **both_ropes(first.mixer.rope), "attention_bias": first.mixer.qkv_bias, "mlp_bias": first.ffn.bias}


FAMILY = base.Family("llama", ("llama",), "LlamaForCausalLM", read, write, base.table(*base.ATTENTION, *base.MLP, *base.PRE))
