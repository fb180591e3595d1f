"""Qwen3 with experts: Qwen3's attention over a mixture of experts, each kept apart in the file; some layers may stay dense."""
from typing import Any

from llmjax.checkpoint.families import base
from llmjax.checkpoint.fields import Fields, both_ropes, read_rope
from llmjax.checkpoint.table import Row
from llmjax.core.model_config import Attention, Layer, MixtureOfExperts, Mlp, ModelConfig, Norm, QKNorm

M = base.L + "mlp."
EXPERTS = (Row(M + "gate.weight", "ffn/router", "e d -> d e"),
           *(Row(M + "experts.{e}." + theirs + ".weight", "ffn/" + ours, "o i -> i o") for theirs, ours in (("gate_proj", "gate"), ("up_proj", "up"), ("down_proj", "down"))))


def sparse(f: Fields, count: int) -> list[bool]:
    """Which layers have experts: every `decoder_sparse_step`-th, those of `mlp_only_layers` left out."""
    step, dense = f.count("decoder_sparse_step", 1), f.value("mlp_only_layers", None) or []
    return [i not in dense and (i + 1) % step == 0 for i in range(count)]


def dense_layers(config: ModelConfig) -> list[int]:
    return [i for i, layer in enumerate(config.layers) if isinstance(layer.ffn, Mlp)]


def write_experts(config: ModelConfig) -> dict[str, Any]:
    """The fields that Qwen's mixtures share; a model without experts is written as one whose layers are all dense."""
    ffns = [layer.ffn for layer in config.layers]
    experts = next((x for x in ffns if isinstance(x, MixtureOfExperts)), MixtureOfExperts(2, 1, 1))
    dense = next((x.hidden for x in ffns if isinstance(x, Mlp)), experts.hidden)
    return {"intermediate_size": dense, "moe_intermediate_size": experts.hidden, "num_experts": experts.experts, "num_experts_per_tok": experts.top_k,
            "norm_topk_prob": experts.renormalize, "decoder_sparse_step": 1, "mlp_only_layers": dense_layers(config)}


USUAL = MixtureOfExperts(128, 8, 768, renormalize=False)


def experts_of(f: Fields, activation: Any, usual: MixtureOfExperts = USUAL, **more: Any) -> MixtureOfExperts:
    """usual: what holds where the config says nothing."""
    count = "num_experts" if "num_experts" in f.values else "num_local_experts"
    f.ignore("num_experts", "num_local_experts")                                         # two names of one number
    return MixtureOfExperts(f.count(count, usual.experts), f.count("num_experts_per_tok", usual.top_k), f.count("moe_intermediate_size", usual.hidden), activation,
                            renormalize=f.flag("norm_topk_prob", usual.renormalize), **more)


def read(f: Fields) -> ModelConfig:
    dim, heads, context = f.count("hidden_size"), f.count("num_attention_heads"), f.count("max_position_embeddings", 32_768)
    norm, biased, count = Norm(eps=f.number("rms_norm_eps", 1e-6)), f.flag("attention_bias"), f.count("num_hidden_layers")
    window = f.count("sliding_window", 4096) if f.flag("use_sliding_window") and f.value("sliding_window", 4096) else None
    f.ignore("sliding_window", "max_window_layers")                                      # transformers gives every layer the window, or none
    mixer = Attention(heads, base.kv_heads(f, heads, 4), base.head_dim(f, dim, heads), read_rope(f, 10_000.0, context), window,
                      qkv_bias=biased, out_bias=biased, qk_norm=QKNorm(norm))
    activation = f.activation("hidden_act", "silu")
    whole, experts = Mlp(f.count("intermediate_size", 6144), activation), experts_of(f, activation)
    layers = [Layer(mixer, experts if mixed else whole) for mixed in sparse(f, count)]
    return base.model(f, "qwen3_moe", layers, dim=dim, norm=norm, tied=False, context=context)


def write(config: ModelConfig) -> dict:
    mixer = base.first(config).mixer
    return {**base.common(config), **write_experts(config), **both_ropes(mixer.rope), "attention_bias": mixer.qkv_bias,
            "use_sliding_window": mixer.window is not None, "sliding_window": mixer.window}


FAMILY = base.Family("qwen3_moe", ("qwen3_moe",), "Qwen3MoeForCausalLM", read, write,
                     base.table(*base.ATTENTION, *base.QK_NORMS, *EXPERTS, *base.MLP, *base.PRE), (MixtureOfExperts, Mlp))
