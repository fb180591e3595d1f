"""DeepSeek-V3 and R1: latent attention; experts beside a shared one, chosen by sigmoids in groups with a bias that only choosing sees; the first layers dense.

The layers behind the last one that predict further tokens (num_nextn_predict_layers) are left out.
"""
from typing import Any

from llmjax.checkpoint.families import base
from llmjax.checkpoint.families.qwen3_moe import EXPERTS, M
from llmjax.checkpoint.fields import Fields, both_ropes, read_rope
from llmjax.checkpoint.table import Row, Table
from llmjax.core.model_config import Groups, LatentAttention, Layer, MixtureOfExperts, Mlp, ModelConfig, Norm
from llmjax.core.positions import Rope, Yarn

A = base.L + "self_attn."
LATENT = (
    Row(A + "q_proj.weight", "mixer/q", "(n h) d -> d n h"),
    Row(A + "q_a_proj.weight", "mixer/q_down", "r d -> d r"), Row(A + "q_a_proj.bias", "mixer/q_down_bias"), Row(A + "q_a_layernorm.weight", "mixer/q_norm/scale"),
    Row(A + "q_b_proj.weight", "mixer/q_up", "(n h) r -> r n h"),
    Row(A + "kv_a_proj_with_mqa.weight", ("mixer/kv_down", "mixer/k_rope"), "[r] d -> d r"), Row(A + "kv_a_proj_with_mqa.bias", ("mixer/kv_down_bias", "mixer/k_rope_bias"), "[r] -> r"),
    Row(A + "kv_a_layernorm.weight", "mixer/kv_norm/scale"), Row(A + "kv_b_proj.weight", ("mixer/k_up", "mixer/v_up"), "(n [h]) r -> r n h"),
    base.ATTENTION[3], base.ATTENTION[7],
)
SHARED = tuple(Row(f"{M}shared_experts.{name}_proj.weight", f"ffn/shared/{name}", "o i -> i o") for name in ("gate", "up", "down"))
SELECTION = Row(M + "gate.e_score_correction_bias", "ffn/selection_bias")


def rows(config: ModelConfig) -> Table:
    return base.table(*LATENT, *EXPERTS, SELECTION, *SHARED, *base.MLP, *base.PRE, extras=(rf"model\.layers\.{len(config.layers)}\..*",))


def latent_attention(f: Fields, *, interleaved: bool = True, usual_rank: int | None = 1536) -> LatentAttention:
    """The fields of latent attention; long contexts (YaRN's mscale_all_dim) make its scores sharper."""
    context, nope, turned = f.count("max_position_embeddings", 4096), f.count("qk_nope_head_dim", 128), f.count("qk_rope_head_dim", 64)
    rope, scale = read_rope(f, 10_000.0, context, interleaved=interleaved), None
    if isinstance(rope.scaling, Yarn) and rope.scaling.mscale_all_dim:
        scale = (nope + turned) ** -0.5 * rope.scaling.temperature(rope.scaling.mscale_all_dim) ** 2
    f.ignore("head_dim", "qk_head_dim", "num_key_value_heads")                          # follow from the others
    rank = f.count("q_lora_rank", usual_rank) if f.value("q_lora_rank", usual_rank) else None
    return LatentAttention(f.count("num_attention_heads"), f.count("kv_lora_rank", 512), nope, turned, f.count("v_head_dim", 128), rope, rank, f.flag("attention_bias"), scale)


def write_latent(config: ModelConfig) -> dict[str, Any]:
    mixer = base.first(config).mixer
    return {**both_ropes(mixer.rope), "num_key_value_heads": mixer.heads, "head_dim": mixer.rope_dim, "kv_lora_rank": mixer.latent, "q_lora_rank": mixer.query_rank,
            "qk_nope_head_dim": mixer.nope_dim, "qk_rope_head_dim": mixer.rope_dim, "v_head_dim": mixer.value_dim, "attention_bias": mixer.bias}


def layers(f: Fields, mixer: Any, dense: Mlp, experts: MixtureOfExperts, usual: int) -> list[Layer]:
    """The first `first_k_dense_replace` layers dense, the others with experts."""
    f.fixed(moe_layer_freq=1)
    first = f.value("first_k_dense_replace", usual) or 0
    return [Layer(mixer, dense if i < first else experts) for i in range(f.count("num_hidden_layers"))]


def write_layers(config: ModelConfig) -> dict[str, Any]:
    """The fields of a mixture behind dense layers; a model without experts is written as one whose layers are all dense."""
    ffns = [layer.ffn for layer in config.layers]
    experts = next((x for x in ffns if isinstance(x, MixtureOfExperts)), MixtureOfExperts(8, 2, 1, shared=1))
    groups = experts.groups or Groups(1, 1)
    return {"intermediate_size": next((x.hidden for x in ffns if isinstance(x, Mlp)), experts.hidden), "moe_intermediate_size": experts.hidden, "n_routed_experts": experts.experts,
            "num_experts_per_tok": experts.top_k, "n_shared_experts": (experts.shared or 0) // experts.hidden or None, "n_group": groups.count, "topk_group": groups.top,
            "routed_scaling_factor": experts.scale, "norm_topk_prob": experts.renormalize, "first_k_dense_replace": sum(isinstance(x, Mlp) for x in ffns)}


def sigmoid_experts(f: Fields, activation: Any, *, experts: int, top_k: int, groups: tuple[int, int], scale: float, hidden: int) -> MixtureOfExperts:
    """DeepSeek-V3's mixture; one group is none."""
    width, count, best = f.count("moe_intermediate_size", hidden), f.count("n_group", groups[0]), f.count("topk_group", groups[1])
    f.fixed(topk_method="noaux_tc", scoring_func="sigmoid")
    return MixtureOfExperts(f.count("n_routed_experts", experts), f.count("num_experts_per_tok", top_k), width, activation, shared=width * f.count("n_shared_experts", 1),
                            renormalize=f.flag("norm_topk_prob", True), scale=float(f.number("routed_scaling_factor", scale)), score="sigmoid",
                            groups=Groups(count, best, 2) if count > 1 else None, selection_bias=True)


def read(f: Fields) -> ModelConfig:
    dim, context, activation = f.count("hidden_size"), f.count("max_position_embeddings", 4096), f.activation("hidden_act", "silu")
    mixer = latent_attention(f, interleaved=f.flag("rope_interleave", True))
    experts = sigmoid_experts(f, activation, experts=256, top_k=8, groups=(8, 4), scale=2.5, hidden=2048)
    f.ignore("num_nextn_predict_layers", "num_mtp_layers", "ep_size", "aux_loss_alpha", "seq_aux")       # layers that are left out; how it was trained
    stack = layers(f, mixer, Mlp(f.count("intermediate_size"), activation), experts, 3)
    return base.model(f, "deepseek_v3", stack, dim=dim, norm=Norm(eps=f.number("rms_norm_eps", 1e-6)), tied=False, context=context)


def write(config: ModelConfig) -> dict[str, Any]:
    rope: Rope = base.first(config).mixer.rope
    return {**base.common(config), **write_latent(config), **write_layers(config), "rope_interleave": rope.interleaved}


FAMILY = base.Family("deepseek_v3", ("deepseek_v3",), "DeepseekV3ForCausalLM", read, write, rows, (MixtureOfExperts, Mlp), mixer=LatentAttention)
