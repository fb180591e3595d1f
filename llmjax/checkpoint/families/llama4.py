"""Llama 4, the text model: rotated layers see their own chunk, every fourth knows no positions and sees all; experts (one a token, gated on the way in) beside a shared one.

Of a checkpoint with pictures (model_type "llama4") the text model is read; the vision tower and the projector are left out.
"""
from dataclasses import replace
from functools import partial
from typing import Any

from llmjax.checkpoint.families import base
from llmjax.checkpoint.fields import Fields, both_ropes, read_rope
from llmjax.checkpoint.table import Row
from llmjax.core.errors import CheckpointError
from llmjax.core.model_config import Attention, Layer, MixtureOfExperts, Mlp, ModelConfig, Norm, QKNorm, Temperature
from llmjax.core.positions import Rope

M = base.L + "feed_forward."
EXPERTS = (Row(M + "router.weight", "ffn/router", "e d -> d e"), Row(M + "experts.gate_up_proj", ("ffn/gate", "ffn/up"), "e d [f] -> e d f"),
           Row(M + "experts.down_proj", "ffn/down", "e f d -> e f d"),
           *(Row(f"{M}shared_expert.{name}_proj.weight", f"ffn/shared/{name}", "o i -> i o") for name in ("gate", "up", "down")))
DENSE = tuple(Row(f"{M}{name}_proj.weight", f"ffn/{name}", "o i -> i o") for name in ("gate", "up", "down"))


def read(f: Fields) -> ModelConfig:
    dim, heads, context, count = f.count("hidden_size"), f.count("num_attention_heads"), f.count("max_position_embeddings", 131_072), f.count("num_hidden_layers")
    norm, biased, every, step = Norm(eps=f.number("rms_norm_eps", 1e-5)), f.flag("attention_bias"), f.count("no_rope_layer_interval", 4), f.count("interleave_moe_layer_step", 1)
    rotated = f.value("no_rope_layers", None) or [int((i + 1) % every != 0) for i in range(count)]
    mixed = f.value("moe_layers", None)
    mixed = list(range(step - 1, count, step)) if mixed is None else mixed
    chunk = f.value("attention_chunk_size", 8192) and f.count("attention_chunk_size", 8192)
    kinds = f.value("layer_types", None) or ["chunked_attention" if turned else "full_attention" for turned in rotated]
    if len(rotated) != count or len(kinds) != count or set(kinds) - {"chunked_attention", "full_attention"}:
        raise CheckpointError(f"{f.where}: no_rope_layers and layer_types name {len(rotated)} and {len(kinds)} layers, num_hidden_layers is {count}; "
                              "the types are chunked_attention and full_attention")
    tuned = f.value("attn_temperature_tuning", True)                                     # a number in older files
    warm = Temperature(float(f.number("attn_scale", 0.1)), float(f.number("floor_scale", 8192)), 1) if tuned else None
    f.ignore("for_llm_compressor", "attn_scale", "floor_scale")
    mixer = Attention(heads, base.kv_heads(f, heads, 8), f.count("head_dim", 128), read_rope(f, 500_000.0, context, interleaved=True), qkv_bias=biased, out_bias=biased)
    turns = replace(mixer, qk_norm=QKNorm(replace(norm, scale=False), rotated=True) if f.flag("use_qk_norm", True) else None)
    still = replace(mixer, rope=None, temperature=warm)
    activation, width = f.activation("hidden_act", "silu"), f.count("intermediate_size", 8192)
    dense = Mlp(f.count("intermediate_size_mlp", 16_384), activation)
    experts = MixtureOfExperts(f.count("num_local_experts", 16), f.count("num_experts_per_tok", 1), width, activation, shared=width, renormalize=False, score="sigmoid", scale_inputs=True)
    layers = []
    for i, (turned, kind) in enumerate(zip(rotated, kinds)):
        cut = dict(window=chunk, chunked=True) if chunk and kind == "chunked_attention" else {}
        layers.append(Layer(replace(turns if turned else still, **cut), experts if i in mixed else dense))
    return base.model(f, "llama4", layers, dim=dim, norm=norm, tied=False, context=context)


def write(config: ModelConfig) -> dict[str, Any]:
    mixers: list[Any] = [layer.mixer for layer in config.layers]
    ffns = [layer.ffn for layer in config.layers]
    rope = next((m.rope for m in mixers if m.rope), Rope(500_000.0, interleaved=True))
    warm, experts = next((m.temperature for m in mixers if m.temperature), None), next((x for x in ffns if isinstance(x, MixtureOfExperts)), MixtureOfExperts(2, 1, 1))
    return {**base.common(config), **both_ropes(rope), "attention_bias": mixers[0].qkv_bias, "no_rope_layers": [int(m.rope is not None) for m in mixers],
            "layer_types": ["chunked_attention" if m.chunked else "full_attention" for m in mixers], "attention_chunk_size": base.widest(config),
            "use_qk_norm": any(m.qk_norm for m in mixers), "attn_temperature_tuning": warm is not None or all(m.rope for m in mixers),
            **({"attn_scale": warm.beta, "floor_scale": int(warm.length)} if warm else {}), "moe_layers": [i for i, x in enumerate(ffns) if isinstance(x, MixtureOfExperts)],
            "intermediate_size": experts.hidden, "intermediate_size_mlp": next((x.hidden for x in ffns if isinstance(x, Mlp)), 2 * experts.hidden),
            "num_local_experts": experts.experts, "num_experts_per_tok": experts.top_k}


FAMILY = base.Family("llama4", ("llama4_text", "llama4"), "Llama4ForCausalLM", partial(base.text_part, read=read), write, base.table(
    *base.ATTENTION, *EXPERTS, *DENSE, *base.PRE, renames=((r"^language_model\.model\.", "model."), (r"^language_model\.lm_head\.", "lm_head.")),
    extras=(r"(model\.)?(vision_model|multi_modal_projector)\..*",)), (MixtureOfExperts, Mlp), rotary=None)
