"""Qwen3-Next: three gated delta nets to one attention layer, whose heads are gated; norms around 1; every layer a mixture of experts with a shared one.

A file holds the delta net's projections together: queries, keys, values and output gates, each key head's own next to each other, and beta beside the decay in the same way.
"""
from collections.abc import Sequence
from typing import Any

from llmjax.checkpoint.families import base
from llmjax.checkpoint.families.qwen2_moe import SHARED
from llmjax.checkpoint.families.qwen3_moe import EXPERTS, experts_of, sparse, write_experts
from llmjax.checkpoint.fields import Fields, both_ropes, read_rope
from llmjax.checkpoint.table import Row
from llmjax.core.errors import CheckpointError
from llmjax.core.model_config import Attention, FeedForward, GatedDelta, Layer, MixtureOfExperts, Mlp, ModelConfig, Norm, QKNorm
from llmjax.core.positions import Rope

D = base.L + "linear_attn."
GATED = (Row(base.L + "self_attn.q_proj.weight", ("mixer/q", "mixer/gate"), "(n [h]) d -> d n h"),
         Row(base.L + "self_attn.q_proj.bias", ("mixer/q_bias", "mixer/gate_bias"), "(n [h]) -> n h"),
         *(row for row in base.ATTENTION if "q_proj" not in row.name), *base.QK_NORMS)
DELTA = (Row(D + "conv1d.weight", ("mixer/q_conv", "mixer/k_conv", "mixer/v_conv"), "[k h] 1 w -> w k h"), Row(D + "norm.weight", "mixer/norm/scale"),
         Row(D + "A_log", "mixer/rate_log", "(k r) -> k r"), Row(D + "dt_bias", "mixer/decay_bias", "(k r) -> k r"), Row(D + "out_proj.weight", "mixer/o", "d (k h) -> k h d", beside="mixer/z"))
TOGETHER = (Row(D + "in_proj_qkvz.weight", ("mixer/q", "mixer/k", "mixer/v", "mixer/z"), "(k [h]) d -> d k h"), Row(D + "in_proj_ba.weight", ("mixer/beta", "mixer/decay"), "(k [r]) d -> d k r"))


def read_mixers(f: Fields, dim: int, norm: Norm, context: int, usual_kv: int) -> list[Attention | GatedDelta]:
    """The mixer of each layer: `layer_types`, or an attention layer every `full_attention_interval`. Raises CheckpointError for unknown types or another number of layers."""
    heads, count, biased, every = f.count("num_attention_heads"), f.count("num_hidden_layers"), f.flag("attention_bias"), f.count("full_attention_interval", 4)
    far = Attention(heads, base.kv_heads(f, heads, usual_kv), f.count("head_dim", 256), read_rope(f, 10_000.0, context, fraction=0.25), qkv_bias=biased, out_bias=biased,
                    qk_norm=QKNorm(norm), gate=True)
    near = GatedDelta(f.count("linear_num_value_heads", 32), f.count("linear_num_key_heads", 16), f.count("linear_key_head_dim", 128), f.count("linear_value_head_dim", 128),
                      f.count("linear_conv_kernel_dim", 4), f.activation("hidden_act", "silu"))
    kinds = f.value("layer_types", None) or ["full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(count)]
    known: dict[str, Attention | GatedDelta] = {"full_attention": far, "linear_attention": near}
    if len(kinds) != count or not set(kinds) <= set(known):
        raise CheckpointError(f"{f.where}: layer_types={kinds}: {count} of {', '.join(known)} are expected")
    return [known[kind] for kind in kinds]


def write_mixers(config: ModelConfig) -> dict[str, Any]:
    """What read_mixers reads, and the fields all families have. A model without one kind of mixer says numbers that no layer has."""
    mixers = [layer.mixer for layer in config.layers]
    near = next((m for m in mixers if isinstance(m, GatedDelta)), GatedDelta(1, 1, 1, 1))
    far: Attention = next((m for m in mixers if isinstance(m, Attention)), Attention(1, 1, 8, gate=True))
    shared = base.common(config, mixer=far)
    return {**shared, **both_ropes(far.rope or Rope(), partial=True), "attention_bias": far.qkv_bias, "linear_num_value_heads": near.heads, "linear_num_key_heads": near.key_heads,
            "linear_key_head_dim": near.key_dim, "linear_value_head_dim": near.value_dim, "linear_conv_kernel_dim": near.width,
            "layer_types": ["full_attention" if isinstance(m, Attention) else "linear_attention" for m in mixers]}


def model(f: Fields, family: str, mixers: Sequence[Attention | GatedDelta], ffns: Sequence[FeedForward], **more: Any) -> ModelConfig:
    return base.model(f, family, [Layer(mixer, ffn) for mixer, ffn in zip(mixers, ffns)], tied=False, **more)


def read(f: Fields) -> ModelConfig:
    dim, norm, context = f.count("hidden_size"), Norm(eps=f.number("rms_norm_eps", 1e-6), offset=1.0), f.count("max_position_embeddings", 32_768)
    mixers, activation = read_mixers(f, dim, norm, context, 2), f.activation("hidden_act", "silu")
    whole = Mlp(f.count("intermediate_size", 5632), activation)
    experts = experts_of(f, activation, MixtureOfExperts(512, 10, 512), shared=f.count("shared_expert_intermediate_size", 512), shared_gate=True)
    return model(f, "qwen3_next", mixers, [experts if mixed else whole for mixed in sparse(f, len(mixers))], dim=dim, norm=norm, context=context)


def write(config: ModelConfig) -> dict[str, Any]:
    shared = next((layer.ffn.shared for layer in config.layers if isinstance(layer.ffn, MixtureOfExperts)), None)
    return {**write_mixers(config), **write_experts(config), "shared_expert_intermediate_size": shared}


FAMILY = base.Family("qwen3_next", ("qwen3_next",), "Qwen3NextForCausalLM", read, write,
                     base.table(*TOGETHER, *DELTA, *GATED, *EXPERTS, *SHARED, *base.MLP, *base.PRE, extras=(r"mtp\..*",)), (MixtureOfExperts, Mlp), mixer=(Attention, GatedDelta))
