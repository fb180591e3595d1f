"""nanochat: norms without scales (on the embedding too), queries and keys normed after a rotation by minus the angle, an MLP of squared ReLUs, capped logits."""
from typing import Any

from llmjax.checkpoint.families import base
from llmjax.checkpoint.fields import Fields, both_ropes, read_rope
from llmjax.checkpoint.table import Row
from llmjax.core.model_config import Attention, Layer, Mlp, ModelConfig, Norm, QKNorm

MLP = (Row(base.L + "mlp.fc1.weight", "ffn/up", "f d -> d f"), Row(base.L + "mlp.fc2.weight", "ffn/down", "d f -> f d"))


def read(f: Fields) -> ModelConfig:
    dim, heads, context, biased = f.count("hidden_size"), f.count("num_attention_heads"), f.count("max_position_embeddings", 2048), f.flag("attention_bias")
    norm, cap = Norm(eps=f.number("rms_norm_eps", 1e-6), scale=False), f.optional("final_logit_softcapping", 15.0)
    mixer = Attention(heads, base.kv_heads(f, heads, heads), base.head_dim(f, dim, heads), read_rope(f, 10_000.0, context, reverse=True), qkv_bias=biased, out_bias=biased,
                      qk_norm=QKNorm(norm, rotated=True))
    ffn = Mlp(f.count("intermediate_size"), f.activation("hidden_act", "relu2"), gated=False)
    return base.model(f, "nanochat", [Layer(mixer, ffn)] * f.count("num_hidden_layers"), dim=dim, norm=norm, tied=False, context=context, embed_norm=True,
                      logit_softcap=cap and float(cap))


def write(config: ModelConfig) -> dict[str, Any]:
    mixer = base.first(config).mixer
    return {**base.common(config), **both_ropes(mixer.rope), "attention_bias": mixer.qkv_bias, "final_logit_softcapping": config.logit_softcap}


FAMILY = base.Family("nanochat", ("nanochat",), "NanoChatForCausalLM", read, write, base.table(*base.ATTENTION, *MLP))
