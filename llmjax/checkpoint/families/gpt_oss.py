"""gpt-oss: every other layer slides, sinks and biases in attention, a mixture of experts with biases and a clamped gate, gate and up interleaved in one tensor."""
from dataclasses import replace
from typing import Any

from llmjax.checkpoint.families import base
from llmjax.checkpoint.fields import Fields, both_ropes, read_rope
from llmjax.checkpoint.table import Row
from llmjax.core.model_config import Attention, Layer, MixtureOfExperts, ModelConfig, Norm

M = base.L + "mlp."
INTO = ("ffn/gate", "ffn/up")
EXPERTS = (
    Row(M + "router.weight", "ffn/router", "e d -> d e"), Row(M + "router.bias", "ffn/router_bias"),
    Row(M + "experts.gate_up_proj", INTO, "e d (f [1]) -> e d f"), Row(M + "experts.gate_up_proj_bias", tuple(x + "_bias" for x in INTO), "e (f [1]) -> e f"),
    Row(M + "experts.down_proj", "ffn/down"), Row(M + "experts.down_proj_bias", "ffn/down_bias"),
)
YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 4096}


def read(f: Fields) -> ModelConfig:
    dim, heads, context, biased = f.count("hidden_size"), f.count("num_attention_heads"), f.count("max_position_embeddings", 131_072), f.flag("attention_bias", True)
    if f.value("rope_parameters", None) is None and f.value("rope_scaling", None) is None:
        f.values["rope_parameters"] = YARN
    f.fixed(swiglu_alpha=1.702, hidden_act="silu")
    f.ignore("initial_context_length", "experts_per_token")                              # what the rotary scaling says as well; another name of num_experts_per_tok
    mixer = Attention(heads, base.kv_heads(f, heads, 8), f.count("head_dim", 64), read_rope(f, 150_000.0, context), qkv_bias=biased, out_bias=biased, sinks=True)
    ffn = MixtureOfExperts(f.count("num_local_experts", 128), f.count("num_experts_per_tok", 4), f.count("intermediate_size", 2880), router_bias=True, bias=True,
                           limit=float(f.number("swiglu_limit", 7.0)))
    windows = base.layer_windows(f, f.count("num_hidden_layers"), f.value("sliding_window", 128) and f.count("sliding_window", 128), lambda i: i % 2 == 0)
    layers = [Layer(replace(mixer, window=window), ffn) for window in windows]
    return base.model(f, "gpt_oss", layers, dim=dim, norm=Norm(eps=f.number("rms_norm_eps", 1e-5)), tied=False, context=context)


def write(config: ModelConfig) -> dict[str, Any]:
    first = base.first(config)
    return {**base.common(config), **both_ropes(first.mixer.rope), "attention_bias": first.mixer.qkv_bias, "num_local_experts": first.ffn.experts,
            "num_experts_per_tok": first.ffn.top_k, "swiglu_limit": first.ffn.limit, "swiglu_alpha": 1.702, "sliding_window": base.widest(config),
            "layer_types": base.layer_types(config)}


FAMILY = base.Family("gpt_oss", ("gpt_oss",), "GptOssForCausalLM", read, write,
                     base.table(*base.ATTENTION, Row(base.L + "self_attn.sinks", "mixer/sinks"), *EXPERTS, *base.PRE), MixtureOfExperts)
