"""Gemma 1: Llama with norm scales kept around 0, tanh-GELU gates, and the embedding times sqrt(dim)."""
from llmjax.checkpoint.families import base
from llmjax.checkpoint.fields import Fields, both_ropes, read_rope
from llmjax.core.model_config import Attention, Layer, Mlp, ModelConfig, Norm


def read(f: Fields) -> ModelConfig:
    dim, heads, context = f.count("hidden_size"), f.count("num_attention_heads"), f.count("max_position_embeddings", 8192)
    biased = f.flag("attention_bias")
    mixer = Attention(heads, base.kv_heads(f, heads, 16), f.count("head_dim", 256), read_rope(f, 10_000.0, context), qkv_bias=biased, out_bias=biased)
    named = "hidden_activation" if f.values.get("hidden_activation") else "hidden_act"       # version 4 wrote both and used the first
    f.ignore("hidden_act", "hidden_activation")
    ffn = Mlp(f.count("intermediate_size"), f.activation(named, "gelu_pytorch_tanh"))
    layers = [Layer(mixer, ffn)] * f.count("num_hidden_layers")
    return base.model(f, "gemma", layers, dim=dim, norm=Norm(eps=f.number("rms_norm_eps", 1e-6), offset=1.0), tied=True, context=context, embed_scale=dim ** 0.5)


def write(config: ModelConfig) -> dict:
    shared = base.common(config)
    return {**shared, "hidden_activation": shared["hidden_act"], **both_ropes(base.first(config).mixer.rope), "attention_bias": base.first(config).mixer.qkv_bias}


FAMILY = base.Family("gemma", ("gemma",), "GemmaForCausalLM", read, write, base.table(*base.ATTENTION, *base.MLP, *base.PRE))
