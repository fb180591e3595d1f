"""Falcon: one to a few key heads; attention and MLP beside each other after one LayerNorm or two (7B, 40B, 180B), or one after the other with ALiBi (RW). Queries, keys and values of
each key head lie together in one tensor."""
from typing import Any

from llmjax.checkpoint.families import base
from llmjax.checkpoint.fields import Fields, both_ropes, read_rope
from llmjax.checkpoint.table import Row, Table
from llmjax.core.errors import CheckpointError
from llmjax.core.model_config import Attention, Layer, Mlp, ModelConfig, Norm
from llmjax.core.positions import Alibi

H = "transformer.h.{l}."
QKV = ("mixer/q", "mixer/k", "mixer/v")


def rows(config: ModelConfig) -> Table:
    two = base.first(config).wiring == "parallel_two_norms"
    norms = ("ln_attn", "ln_mlp") if two else ("input_layernorm", "post_attention_layernorm")
    return Table((
        Row("transformer.word_embeddings.weight", "embed/table"), Row("lm_head.weight", "head/kernel", "v d -> d v"),
        *base.with_biases(Row("transformer.ln_f.weight", "final_norm/scale"), *(Row(f"{H}{name}.weight", f"{ours}/scale") for name, ours in zip(norms, ("norm_mixer", "norm_ffn")))),
        Row(H + "self_attention.query_key_value.weight", QKV, "(k [g h]) d -> d (k g) h", sizes=(("k", "mixer/k", 1),)),
        Row(H + "self_attention.query_key_value.bias", tuple(x + "_bias" for x in QKV), "(k [g h]) -> (k g) h", sizes=(("k", "mixer/k_bias", 0),)),
        Row(H + "self_attention.dense.weight", "mixer/o", "d (n h) -> n h d"), Row(H + "self_attention.dense.bias", "mixer/o_bias"), *base.plain_mlp(H),
    ), base="transformer.", copies=(("lm_head.weight", "transformer.word_embeddings.weight"),))


def read(f: Fields) -> ModelConfig:
    dim, heads, context, biased = f.count("hidden_size"), f.count("num_attention_heads"), f.count("max_position_embeddings", 2048), f.flag("bias")
    size, new, parallel = base.head_dim(f, dim, heads), f.flag("new_decoder_architecture"), f.flag("parallel_attn", True)
    several, single = f.count("num_kv_heads", heads), f.flag("multi_query", True)
    kv_heads = several if new or not single else 1
    norms = f.count("num_ln_in_parallel_attn", 2 if new else 1)
    if new and not parallel:
        raise CheckpointError(f"{f.where}: new_decoder_architecture with parallel_attn=false is not a Falcon that was published")
    if f.flag("alibi"):
        where: dict[str, Any] = dict(rope=None, alibi=Alibi(scale=size ** -0.5, rounded=True))
        f.ignore("rope_parameters", "rope_theta", "rope_scaling")                        # not applied beside ALiBi
    else:
        where = dict(rope=read_rope(f, 10_000.0, context))
    mixer = Attention(heads, kv_heads, size, qkv_bias=biased, out_bias=biased, **where)
    ffn = Mlp(f.count("ffn_hidden_size", 4 * dim), f.activation("activation", "gelu"), gated=False, bias=biased)
    layer = Layer(mixer, ffn, ("parallel_two_norms" if new and norms == 2 else "parallel") if parallel else "pre")
    norm = Norm("layer", f.number("layer_norm_epsilon", 1e-5), bias=True)
    return base.model(f, "falcon", [layer] * f.count("num_hidden_layers"), dim=dim, norm=norm, tied=True, context=context)


def write(config: ModelConfig) -> dict[str, Any]:
    shared, first = base.common(config, "activation"), base.first(config)
    mixer, new = first.mixer, first.wiring == "parallel_two_norms" or (first.wiring == "parallel" and 1 < first.mixer.kv_heads < first.mixer.heads)
    kept = {k: v for k, v in shared.items() if k not in ("rms_norm_eps", "num_key_value_heads", "intermediate_size", "head_dim")}
    return {**kept, "layer_norm_epsilon": config.norm.eps, "ffn_hidden_size": first.ffn.hidden, "num_kv_heads": mixer.kv_heads, "new_decoder_architecture": new,
            "multi_query": mixer.kv_heads == 1 and not new, "parallel_attn": first.wiring != "pre", "num_ln_in_parallel_attn": 2 if first.wiring == "parallel_two_norms" else 1,
            "bias": mixer.qkv_bias, "alibi": mixer.alibi is not None, **(both_ropes(mixer.rope) if mixer.rope else {})}


FAMILY = base.Family("falcon", ("falcon",), "FalconForCausalLM", read, write, rows, rotary=None)
