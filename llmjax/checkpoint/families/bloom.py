"""BLOOM: ALiBi, a LayerNorm on the embedding, biases everywhere; queries, keys and values of each head lie together in one tensor."""
from typing import Any

from llmjax.checkpoint.families import base
from llmjax.checkpoint.fields import Fields
from llmjax.checkpoint.table import Row, Table
from llmjax.core.errors import CheckpointError
from llmjax.core.model_config import Attention, Layer, Mlp, ModelConfig, Norm
from llmjax.core.positions import Alibi

H = "transformer.h.{l}."
QKV = ("mixer/q", "mixer/k", "mixer/v")
TABLE = Table((
    Row("transformer.word_embeddings.weight", "embed/table"), Row("lm_head.weight", "head/kernel", "v d -> d v"),
    *base.with_biases(Row("transformer.word_embeddings_layernorm.weight", "embed_norm/scale"), Row("transformer.ln_f.weight", "final_norm/scale"),
                      Row(H + "input_layernorm.weight", "norm_mixer/scale"), Row(H + "post_attention_layernorm.weight", "norm_ffn/scale")),
    Row(H + "self_attention.query_key_value.weight", QKV, "(n [h]) d -> d n h"), Row(H + "self_attention.query_key_value.bias", tuple(x + "_bias" for x in QKV), "(n [h]) -> n h"),
    Row(H + "self_attention.dense.weight", "mixer/o", "d (n h) -> n h d"), Row(H + "self_attention.dense.bias", "mixer/o_bias"), *base.plain_mlp(H),
), base="transformer.", copies=(("lm_head.weight", "transformer.word_embeddings.weight"),))


def read(f: Fields) -> ModelConfig:
    wide = "n_embed" if "n_embed" in f.values else "hidden_size"                         # two names of one number, as are those below
    heads, count = ("num_attention_heads" if "num_attention_heads" in f.values else "n_head"), ("num_hidden_layers" if "num_hidden_layers" in f.values else "n_layer")
    dim, n, context = f.count(wide), f.count(heads), f.count("seq_length", 2048)
    # the first is how products were cut up in training, the others how they were once fused; the last says that ALiBi's values are kept as tokens move, which they are here too
    if f.flag("slow_but_exact") and f.count("pretraining_tp", 1) > 1:
        raise CheckpointError(f"{f.where}: slow_but_exact=True with pretraining_tp={f.values['pretraining_tp']}: transformers then leaves the biases of the two output products out; "
                              "set slow_but_exact to false to have them")
    f.ignore("bias_dropout_fusion", "masked_softmax_fusion", "skip_bias_add", "skip_bias_add_qkv", "attention_softmax_in_fp32", "hidden_size", "offset_alibi", "n_inner")
    f.fixed(apply_residual_connection_post_layernorm=False)
    mixer = Attention(n, n, base.head_dim(f, dim, n), None, qkv_bias=True, out_bias=True, alibi=Alibi())
    norm = Norm("layer", f.number("layer_norm_epsilon", 1e-5), bias=True)
    layer = Layer(mixer, Mlp(4 * dim, "gelu_tanh", gated=False, bias=True))
    return base.model(f, "bloom", [layer] * f.count(count), dim=dim, norm=norm, tied=True, context=context, embed_norm=True)


def write(config: ModelConfig) -> dict[str, Any]:
    shared = base.common(config)
    kept = ("vocab_size", "hidden_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    return {**{k: shared[k] for k in kept}, "n_head": base.first(config).mixer.heads, "n_layer": len(config.layers), "seq_length": config.context,
            "layer_norm_epsilon": config.norm.eps}


FAMILY = base.Family("bloom", ("bloom",), "BloomForCausalLM", read, write, TABLE, rotary=False)
