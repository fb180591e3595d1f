"""DBRX: LayerNorms without biases, clipped queries, keys and values in one tensor, a mixture of experts of which one tensor each holds all gates, ups and downs."""
from typing import Any

from llmjax.checkpoint.families import base
from llmjax.checkpoint.fields import ACTIVATIONS, SPELLINGS, Fields, both_ropes, read_rope
from llmjax.checkpoint.table import Row, Table
from llmjax.core.errors import CheckpointError
from llmjax.core.model_config import Attention, Layer, MixtureOfExperts, ModelConfig, Norm

H = "transformer.blocks.{l}."
A, E = H + "norm_attn_norm.", H + "ffn.experts.mlp."
TABLE = Table((
    Row("transformer.wte.weight", "embed/table"), Row("lm_head.weight", "head/kernel", "v d -> d v"), Row("transformer.norm_f.weight", "final_norm/scale"),
    Row(A + "norm_1.weight", "norm_mixer/scale"), Row(A + "norm_2.weight", "norm_ffn/scale"), Row(A + "attn.Wqkv.weight", ("mixer/q", "mixer/k", "mixer/v"), "[n h] d -> d n h"),
    Row(A + "attn.out_proj.weight", "mixer/o", "d (n h) -> n h d"), Row(H + "ffn.router.layer.weight", "ffn/router", "e d -> d e"),
    Row(E + "w1", "ffn/gate", "(e f) d -> e d f"), Row(E + "v1", "ffn/up", "(e f) d -> e d f"), Row(E + "w2", "ffn/down", "(e f) d -> e f d"),
), base="transformer.")


def read(f: Fields) -> ModelConfig:
    dim, heads, context = f.count("d_model"), f.count("n_heads"), f.count("max_seq_len", 2048)
    attention, ffn = (Fields(f.value(name, None) or {}, f"{f.where}: {name}") for name in ("attn_config", "ffn_config"))
    f.ignore("resid_pdrop", "emb_pdrop", "num_key_value_heads")                          # training; stands in attn_config
    attention.ignore("attn_pdrop")
    ffn.ignore("moe_jitter_eps", "moe_loss_weight", "uniform_expert_assignment", "hidden_size")          # training; repeats d_model
    normed = ffn.value("moe_normalize_expert_weights", 1.0) is not None
    if normed:
        ffn.fixed(moe_normalize_expert_weights=1.0)
    size, clip, theta = base.head_dim(f, dim, heads), attention.number("clip_qkv", None), attention.number("rope_theta", 10_000.0)
    mixer = Attention(heads, attention.count("kv_n_heads", 1), size, read_rope(f, float(theta), context), clip=clip and float(clip))
    activation = (ffn.value("ffn_act_fn", None) or {}).get("name", "silu")
    if activation not in ACTIVATIONS:
        raise CheckpointError(f"{ffn.where}: ffn_act_fn={activation!r} is an activation this version does not know")
    experts = MixtureOfExperts(ffn.count("moe_num_experts", 4), ffn.count("moe_top_k", 1), ffn.count("ffn_hidden_size", 3584), ACTIVATIONS[activation],       # type: ignore[arg-type]
                               renormalize=normed)
    attention.finish()
    ffn.finish()
    return base.model(f, "dbrx", [Layer(mixer, experts)] * f.count("n_layers"), dim=dim, norm=Norm("layer", 1e-5), tied=False, context=context)


def write(config: ModelConfig) -> dict[str, Any]:
    shared, (mixer, ffn) = base.common(config), (base.first(config).mixer, base.first(config).ffn)
    kept, ropes = ("vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"), both_ropes(mixer.rope)
    return {**{k: shared[k] for k in kept}, **ropes, "d_model": config.dim, "n_heads": mixer.heads, "n_layers": len(config.layers), "max_seq_len": config.context,
            "attn_config": {"clip_qkv": mixer.clip, "kv_n_heads": mixer.kv_heads, "rope_theta": mixer.rope.theta},
            "ffn_config": {"ffn_act_fn": {"name": SPELLINGS[ffn.activation]}, "ffn_hidden_size": ffn.hidden, "moe_num_experts": ffn.experts, "moe_top_k": ffn.top_k,
                           "moe_normalize_expert_weights": 1.0 if ffn.renormalize else None, "hidden_size": config.dim}}


FAMILY = base.Family("dbrx", ("dbrx",), "DbrxForCausalLM", read, write, TABLE, MixtureOfExperts)
