"""DeepSeek-V2 and V2-Lite: latent attention; experts beside shared ones, chosen by softmax, in V2 among the best groups; the first layers dense."""
from typing import Any

from llmjax.checkpoint.families import base
from llmjax.checkpoint.families.deepseek_v3 import LATENT, SHARED, latent_attention, layers, write_latent, write_layers
from llmjax.checkpoint.families.qwen3_moe import EXPERTS
from llmjax.checkpoint.fields import Fields
from llmjax.core.errors import CheckpointError
from llmjax.core.model_config import Groups, LatentAttention, MixtureOfExperts, Mlp, ModelConfig, Norm

METHODS = {"greedy": False, "group_limited_greedy": True}


def read(f: Fields) -> ModelConfig:
    dim, context, activation, width = f.count("hidden_size"), f.count("max_position_embeddings", 2048), f.activation("hidden_act", "silu"), f.count("moe_intermediate_size", 1407)
    method = f.choice("topk_method", list(METHODS), "greedy")
    f.fixed(scoring_func="softmax", mlp_bias=False, norm_topk_prob=False)
    f.ignore("ep_size", "aux_loss_alpha", "seq_aux")                                     # how it was trained
    groups = f.count("n_group", None), f.count("topk_group", None)
    if METHODS[method] and None in groups:
        raise CheckpointError(f"{f.where}: topk_method={method!r} needs n_group and topk_group")
    experts = MixtureOfExperts(f.count("n_routed_experts", 64), f.count("num_experts_per_tok", 6), width, activation, shared=width * f.count("n_shared_experts", 2),
                               renormalize=False, scale=float(f.number("routed_scaling_factor", 1.0)), groups=Groups(*groups) if METHODS[method] else None)
    stack = layers(f, latent_attention(f), Mlp(f.count("intermediate_size"), activation), experts, 0)
    return base.model(f, "deepseek_v2", stack, dim=dim, norm=Norm(eps=f.number("rms_norm_eps", 1e-6)), tied=False, context=context)


def write(config: ModelConfig) -> dict[str, Any]:
    grouped = any(isinstance(layer.ffn, MixtureOfExperts) and layer.ffn.groups for layer in config.layers)
    return {**base.common(config), **write_latent(config), **write_layers(config), "topk_method": "group_limited_greedy" if grouped else "greedy"}


FAMILY = base.Family("deepseek_v2", ("deepseek_v2",), "DeepseekV2ForCausalLM", read, write,
                     base.table(*LATENT, *EXPERTS, *SHARED, *base.MLP, *base.PRE), (MixtureOfExperts, Mlp), mixer=LatentAttention)
