"""Phi 1, 1.5 and 2: attention and a plain MLP beside each other after one LayerNorm, biases everywhere (the head's too), half of each head rotated."""
from llmjax.checkpoint.families import base
from llmjax.checkpoint.fields import Fields, both_ropes, read_rope
from llmjax.checkpoint.table import Row, Table
from llmjax.core.model_config import Attention, Layer, Mlp, ModelConfig, Norm, QKNorm

L = base.L
TABLE = Table((
    base.TOP[0], base.TOP[2], Row("lm_head.bias", "head/bias"), *base.with_biases(Row("model.final_layernorm.weight", "final_norm/scale"), base.PRE[0]),
    *base.ATTENTION[:3], *base.ATTENTION[4:7], Row(L + "self_attn.dense.weight", "mixer/o", "d (n h) -> n h d"), Row(L + "self_attn.dense.bias", "mixer/o_bias"),
    *base.with_biases(Row(L + "self_attn.q_layernorm.weight", "mixer/q_norm/scale"), Row(L + "self_attn.k_layernorm.weight", "mixer/k_norm/scale")),
    *base.plain_mlp(L, "fc1", "fc2"),
), base="model.", extras=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",), copies=(("lm_head.weight", "model.embed_tokens.weight"),))


def read(f: Fields) -> ModelConfig:
    dim, heads, context = f.count("hidden_size"), f.count("num_attention_heads"), f.count("max_position_embeddings", 2048)
    norm = Norm("layer", f.number("layer_norm_eps", 1e-5), bias=True)
    mixer = Attention(heads, base.kv_heads(f, heads, heads), base.head_dim(f, dim, heads), read_rope(f, 10_000.0, context, fraction=0.5), qkv_bias=True, out_bias=True,
                      qk_norm=QKNorm(norm) if f.flag("qk_layernorm") else None)
    ffn = Mlp(f.count("intermediate_size"), f.activation("hidden_act", "gelu_new"), gated=False, bias=True)
    return base.model(f, "phi", [Layer(mixer, ffn, "parallel")] * f.count("num_hidden_layers"), dim=dim, norm=norm, tied=False, context=context, head_bias=True)


def write(config: ModelConfig) -> dict:
    shared, mixer = base.common(config), base.first(config).mixer
    shared["layer_norm_eps"] = shared.pop("rms_norm_eps")
    shared["hidden_act"] = {"gelu_pytorch_tanh": "gelu_new"}.get(shared["hidden_act"], shared["hidden_act"])      # as published
    return {**shared, **both_ropes(mixer.rope, partial=True), "qk_layernorm": mixer.qk_norm is not None}


FAMILY = base.Family("phi", ("phi",), "PhiForCausalLM", read, write, TABLE)
