"""Qwen3.5 with experts: every layer a mixture with a shared expert; in the file each expert apart, or all of them stacked with gate and up in one tensor."""
from functools import partial
from typing import Any

from llmjax.checkpoint.families import base
from llmjax.checkpoint.families.qwen2_moe import SHARED
from llmjax.checkpoint.families.qwen3_5 import APART, PICTURES
from llmjax.checkpoint.families.qwen3_moe import EXPERTS, M, experts_of, write_experts
from llmjax.checkpoint.families.qwen3_next import DELTA, GATED, model, read_mixers, write_mixers
from llmjax.checkpoint.fields import Fields
from llmjax.checkpoint.table import Row
from llmjax.core.model_config import Attention, GatedDelta, MixtureOfExperts, ModelConfig, Norm

STACKED = (Row(M + "experts.gate_up_proj", ("ffn/gate", "ffn/up"), "e [f] d -> e d f"), Row(M + "experts.down_proj", "ffn/down", "e d f -> e f d"))


def read(f: Fields) -> ModelConfig:
    dim, norm, context = f.count("hidden_size"), Norm(eps=f.number("rms_norm_eps", 1e-6), offset=1.0), f.count("max_position_embeddings", 32_768)
    mixers = read_mixers(f, dim, norm, context, 2)
    f.fixed(norm_topk_prob=True)
    experts = experts_of(f, f.activation("hidden_act", "silu"), MixtureOfExperts(256, 8, 512), shared=f.count("shared_expert_intermediate_size", 512), shared_gate=True)
    f.ignore("intermediate_size")                         # no layer is dense
    return model(f, "qwen3_5_moe", mixers, [experts] * len(mixers), dim=dim, norm=norm, context=context)


def write(config: ModelConfig) -> dict[str, Any]:
    written = {**write_mixers(config), **write_experts(config), "shared_expert_intermediate_size": base.first(config).ffn.shared}
    return {k: v for k, v in written.items() if k not in ("intermediate_size", "decoder_sparse_step", "mlp_only_layers", "norm_topk_prob")}


FAMILY = base.Family("qwen3_5_moe", ("qwen3_5_moe_text", "qwen3_5_moe"), "Qwen3_5MoeForCausalLM", partial(base.text_part, read=read), write,
                     base.table(*APART, *DELTA, *GATED, *EXPERTS, *STACKED, *SHARED, *base.PRE, **PICTURES), MixtureOfExperts, mixer=(Attention, GatedDelta))
