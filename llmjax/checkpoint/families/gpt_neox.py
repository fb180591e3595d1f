"""GPT-NeoX and Pythia: attention and MLP beside each other, each after its own LayerNorm (or one after the other), a quarter of each head rotated; queries, keys and values of
each head lie together in one tensor."""
from llmjax.checkpoint.families import base
from llmjax.checkpoint.fields import Fields, both_ropes, read_rope
from llmjax.checkpoint.table import Row, Table
from llmjax.core.model_config import Attention, Layer, Mlp, ModelConfig, Norm

H = "gpt_neox.layers.{l}."
QKV = ("mixer/q", "mixer/k", "mixer/v")
TABLE = Table((
    Row("gpt_neox.embed_in.weight", "embed/table"), Row("embed_out.weight", "head/kernel", "v d -> d v"),
    *base.with_biases(Row("gpt_neox.final_layer_norm.weight", "final_norm/scale"), Row(H + "input_layernorm.weight", "norm_mixer/scale"),
                      Row(H + "post_attention_layernorm.weight", "norm_ffn/scale")),
    Row(H + "attention.query_key_value.weight", QKV, "(n [h]) d -> d n h"), Row(H + "attention.query_key_value.bias", tuple(x + "_bias" for x in QKV), "(n [h]) -> n h"),
    Row(H + "attention.dense.weight", "mixer/o", "d (n h) -> n h d"), Row(H + "attention.dense.bias", "mixer/o_bias"),
    *base.plain_mlp(H),
), base="gpt_neox.", extras=(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",), copies=(("embed_out.weight", "gpt_neox.embed_in.weight"),))


def read(f: Fields) -> ModelConfig:
    dim, heads, context, biased = f.count("hidden_size"), f.count("num_attention_heads"), f.count("max_position_embeddings", 2048), f.flag("attention_bias", True)
    fraction = f.number("rotary_pct", 0.25)
    mixer = Attention(heads, heads, base.head_dim(f, dim, heads), read_rope(f, 10_000.0, context, names=("rotary_emb_base", "rope_scaling"), fraction=fraction),
                      qkv_bias=biased, out_bias=biased)
    ffn = Mlp(f.count("intermediate_size"), f.activation("hidden_act", "gelu"), gated=False, bias=True)
    layer = Layer(mixer, ffn, "parallel_two_norms" if f.flag("use_parallel_residual", True) else "pre")
    f.ignore("is_decoder")                                                              # never an encoder here
    return base.model(f, "gpt_neox", [layer] * f.count("num_hidden_layers"), dim=dim, norm=Norm("layer", f.number("layer_norm_eps", 1e-5), bias=True), tied=False, context=context)


def write(config: ModelConfig) -> dict:
    shared, first = base.common(config), base.first(config)
    kept = {name: x for name, x in shared.items() if name not in ("rms_norm_eps", "num_key_value_heads", "head_dim")}
    ropes = both_ropes(first.mixer.rope, partial=True)
    old = {"rotary_emb_base": ropes.pop("rope_theta"), "rotary_pct": ropes.pop("partial_rotary_factor")}
    return {**kept, **ropes, **old, "layer_norm_eps": config.norm.eps, "attention_bias": first.mixer.qkv_bias, "use_parallel_residual": first.wiring == "parallel_two_norms"}


FAMILY = base.Family("gpt_neox", ("gpt_neox",), "GPTNeoXForCausalLM", read, write, TABLE)
