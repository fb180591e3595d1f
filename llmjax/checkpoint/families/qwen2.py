"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values; the layers from max_window_layers on may slide."""
from dataclasses import replace

from llmjax.checkpoint.families import base
from llmjax.checkpoint.fields import Fields, both_ropes, read_rope
from llmjax.core.model_config import Attention, Layer, Mlp, ModelConfig, Norm


def windows(f: Fields, count: int) -> list[int | None]:
    """The window of each layer of a Qwen2 or Qwen3 model."""
    window = f.count("sliding_window", 4096) if f.value("sliding_window", 4096) else None          # null, and 0 in mixtures: none
    first = f.value("max_window_layers", 28)
    return base.layer_windows(f, count, window if f.flag("use_sliding_window") else None, lambda i: bool(f.flag("use_sliding_window") and window and i >= first))


def write_windows(config: ModelConfig) -> dict:
    kinds = base.layer_types(config)
    slides = "sliding_attention" in kinds
    return {"layer_types": kinds, "use_sliding_window": slides, "sliding_window": base.widest(config),
            "max_window_layers": kinds.index("sliding_attention") if slides else len(kinds)}


def read(f: Fields) -> ModelConfig:
    dim, heads, context = f.count("hidden_size"), f.count("num_attention_heads"), f.count("max_position_embeddings", 32_768)
    mixer = Attention(heads, base.kv_heads(f, heads, 32), base.head_dim(f, dim, heads), read_rope(f, 10_000.0, context), qkv_bias=True)
    ffn = Mlp(f.count("intermediate_size"), f.activation("hidden_act", "silu"))
    layers = [Layer(replace(mixer, window=window), ffn) for window in windows(f, f.count("num_hidden_layers"))]
    return base.model(f, "qwen2", layers, dim=dim, norm=Norm(eps=f.number("rms_norm_eps", 1e-6)), tied=False, context=context)


def write(config: ModelConfig) -> dict:
    return {**base.common(config), **both_ropes(base.first(config).mixer.rope), **write_windows(config)}


FAMILY = base.Family("qwen2", ("qwen2",), "Qwen2ForCausalLM", read, write, base.table(*base.ATTENTION, *base.MLP, *base.PRE))
