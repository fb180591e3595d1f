"""SmolLM3: Llama where every fourth layer knows no positions; layers may slide."""
from dataclasses import replace

from llmjax.checkpoint.families import base
from llmjax.checkpoint.fields import Fields, both_ropes, read_rope
from llmjax.core.errors import CheckpointError
from llmjax.core.model_config import Attention, Layer, Mlp, ModelConfig, Norm
from llmjax.core.positions import Rope


def read(f: Fields) -> ModelConfig:
    dim, heads, context = f.count("hidden_size"), f.count("num_attention_heads"), f.count("max_position_embeddings", 32_768)
    biased, count, every = f.flag("attention_bias"), f.count("num_hidden_layers"), f.count("no_rope_layer_interval", 4)
    rotated = f.value("no_rope_layers", None) or [int((i + 1) % every != 0) for i in range(count)]
    if len(rotated) != count:
        raise CheckpointError(f"{f.where}: no_rope_layers names {len(rotated)} layers, num_hidden_layers is {count}")
    f.ignore("max_window_layers")                                                        # layer_types says which layers slide
    slides = f.flag("use_sliding_window")
    window = f.count("sliding_window", None) if slides and f.value("sliding_window", None) else None
    mixer = Attention(heads, base.kv_heads(f, heads, 4), base.head_dim(f, dim, heads), read_rope(f, 2_000_000.0, context), qkv_bias=biased, out_bias=biased)
    ffn = Mlp(f.count("intermediate_size"), f.activation("hidden_act", "silu"), bias=f.flag("mlp_bias"))
    windows = base.layer_windows(f, count, window, lambda i: bool(window and not rotated[i]))
    layers = [Layer(replace(mixer, window=w, rope=mixer.rope if turns else None), ffn) for w, turns in zip(windows, rotated)]
    return base.model(f, "smollm3", layers, dim=dim, norm=Norm(eps=f.number("rms_norm_eps", 1e-6)), tied=True, context=context)


def write(config: ModelConfig) -> dict:
    first, window = base.first(config), base.widest(config)
    rope = next((mixer.rope for mixer in base.mixers(config) if mixer.rope), Rope())
    return {**base.common(config), **both_ropes(rope), "attention_bias": first.mixer.qkv_bias, "mlp_bias": first.ffn.bias, "layer_types": base.layer_types(config),
            "no_rope_layers": [int(mixer.rope is not None) for mixer in base.mixers(config)], "use_sliding_window": window is not None, "sliding_window": window}


FAMILY = base.Family("smollm3", ("smollm3",), "SmolLM3ForCausalLM", read, write, base.table(*base.ATTENTION, *base.MLP, *base.PRE), rotary=None)
