"""OLMo 2: norms on what each block adds, and over all heads' queries and keys at once."""
from llmjax.checkpoint.families import base
from llmjax.checkpoint.fields import Fields, both_ropes, read_rope
from llmjax.checkpoint.table import Row
from llmjax.core.model_config import Attention, Layer, Mlp, ModelConfig, Norm, QKNorm

POST = (Row(base.L + "post_attention_layernorm.weight", "norm_mixer_out/scale"), Row(base.L + "post_feedforward_layernorm.weight", "norm_ffn_out/scale"))


def read(f: Fields) -> ModelConfig:
    dim, heads, context = f.count("hidden_size"), f.count("num_attention_heads"), f.count("max_position_embeddings", 2048)
    norm, biased = Norm(eps=f.number("rms_norm_eps", 1e-5)), f.flag("attention_bias")
    mixer = Attention(heads, base.kv_heads(f, heads, heads), base.head_dim(f, dim, heads), read_rope(f, 10_000.0, context),
                      qkv_bias=biased, out_bias=biased, qk_norm=QKNorm(norm, "full"))
    ffn = Mlp(f.count("intermediate_size"), f.activation("hidden_act", "silu"))
    return base.model(f, "olmo2", [Layer(mixer, ffn, "post")] * f.count("num_hidden_layers"), dim=dim, norm=norm, tied=False, context=context)


def write(config: ModelConfig) -> dict:
    mixer = base.first(config).mixer
    return {**base.common(config), **both_ropes(mixer.rope), "attention_bias": mixer.qkv_bias}


FAMILY = base.Family("olmo2", ("olmo2",), "Olmo2ForCausalLM", read, write, base.table(*base.ATTENTION, *base.QK_NORMS, *base.MLP, *POST))
