"""MPT: ALiBi, LayerNorms and products without biases, queries, keys and values in one tensor, which may be clipped."""
from typing import Any

from llmjax.checkpoint.families import base
from llmjax.checkpoint.fields import Fields
from llmjax.checkpoint.table import Row, Table
from llmjax.core.model_config import Attention, Layer, Mlp, ModelConfig, Norm
from llmjax.core.positions import Alibi

H = "transformer.blocks.{l}."
TABLE = Table((
    Row("transformer.wte.weight", "embed/table"), Row("lm_head.weight", "head/kernel", "v d -> d v"), Row("transformer.norm_f.weight", "final_norm/scale"),
    Row(H + "norm_1.weight", "norm_mixer/scale"), Row(H + "norm_2.weight", "norm_ffn/scale"), Row(H + "attn.Wqkv.weight", ("mixer/q", "mixer/k", "mixer/v"), "[n h] d -> d n h"),
    Row(H + "attn.out_proj.weight", "mixer/o", "d (n h) -> n h d"), Row(H + "ffn.up_proj.weight", "ffn/up", "f d -> d f"), Row(H + "ffn.down_proj.weight", "ffn/down", "d f -> f d"),
), base="transformer.", copies=(("lm_head.weight", "transformer.wte.weight"),))


def read(f: Fields) -> ModelConfig:
    dim, heads, context = f.count("d_model"), f.count("n_heads"), f.count("max_seq_len", 2048)
    attention = Fields(f.value("attn_config", None) or {}, f"{f.where}: attn_config")
    attention.fixed(alibi=True, qk_ln=False, prefix_lm=False, attn_type="multihead_attention", attn_uses_sequence_id=False)
    attention.fixed(alibi_bias_max=8)                      # the model's own code applies another, transformers 8 whatever is said; all published files say 8
    attention.ignore("attn_impl", "attn_pdrop")                                          # which kernel; training
    f.fixed(no_bias=True, norm_type="low_precision_layernorm", embedding_fraction=1.0, logit_scale=None)
    f.ignore("learned_pos_emb", "init_device", "init_config", "resid_pdrop", "emb_pdrop", "verbose", "num_key_value_heads")      # ALiBi replaces the first; how it was made
    clip, scale, size = attention.number("clip_qkv", None), attention.number("softmax_scale", None), base.head_dim(f, dim, heads)
    mixer = Attention(heads, heads, size, None, scale=scale and base.scale_of(float(scale), size), clip=clip and float(clip), alibi=Alibi())
    attention.finish()
    ffn = Mlp(int(f.number("expansion_ratio", 4) * dim), "gelu", gated=False)
    return base.model(f, "mpt", [Layer(mixer, ffn)] * f.count("n_layers"), dim=dim, norm=Norm("layer", f.number("layer_norm_epsilon", 1e-5)), tied=True, context=context)


def write(config: ModelConfig) -> dict[str, Any]:
    shared, first = base.common(config), base.first(config)
    kept, alibi = ("vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"), first.mixer.alibi
    bias = (lambda x: int(x) if x == int(x) else x)(alibi.max_bias)                      # transformers wants a whole number; reading it back refuses all but 8
    return {**{k: shared[k] for k in kept}, "d_model": config.dim, "n_heads": first.mixer.heads, "n_layers": len(config.layers), "max_seq_len": config.context,
            "expansion_ratio": first.ffn.hidden // config.dim, "layer_norm_epsilon": config.norm.eps,
            "attn_config": {"alibi": True, "alibi_bias_max": bias, "clip_qkv": first.mixer.clip, "softmax_scale": first.mixer.scale}}


FAMILY = base.Family("mpt", ("mpt",), "MptForCausalLM", read, write, TABLE, rotary=False)
