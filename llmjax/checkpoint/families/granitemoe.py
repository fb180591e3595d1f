"""Granite with experts: Granite's multipliers over a mixture of experts, all of them in one tensor for gate and up and one for down."""
from typing import Any

from llmjax.checkpoint.families import base
from llmjax.checkpoint.families.granite import read_granite, write_granite
from llmjax.checkpoint.fields import Fields
from llmjax.checkpoint.table import Row
from llmjax.core.model_config import MixtureOfExperts, ModelConfig

M = base.L + "block_sparse_moe."
EXPERTS = (Row(M + "router.layer.weight", "ffn/router", "e d -> d e"), Row(M + "input_linear.weight", ("ffn/gate", "ffn/up"), "e [f] d -> e d f"),
           Row(M + "output_linear.weight", "ffn/down", "e d f -> e f d"))


def read(f: Fields) -> ModelConfig:
    ffn = MixtureOfExperts(f.count("num_local_experts", 8), f.count("num_experts_per_tok", 2), f.count("intermediate_size"), f.activation("hidden_act", "silu"))
    return read_granite(f, "granitemoe", ffn)


def write(config: ModelConfig) -> dict[str, Any]:
    ffn = base.first(config).ffn
    return {**write_granite(config), "num_local_experts": ffn.experts, "num_experts_per_tok": ffn.top_k}


FAMILY = base.Family("granitemoe", ("granitemoe",), "GraniteMoeForCausalLM", read, write, base.table(*base.ATTENTION, *EXPERTS, *base.PRE), MixtureOfExperts)
