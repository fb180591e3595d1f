"""Gemma 4, the text model: Gemma 3's block with norms around 1 and on values; heads of another size in the layers that see all, whose slowest rotary pairs stand still; the last layers may
see the keys and values of earlier ones, and every layer may have an input of its own. In the mixture (26B-A4B) experts stand beside the dense MLP, with a router and norms of their own.

Of a checkpoint with pictures and sound (model_type "gemma4") the text model is read.
"""
from dataclasses import replace
from functools import partial
from typing import Any

from llmjax.checkpoint.families import base
from llmjax.checkpoint.fields import Fields, read_rope, write_rope
from llmjax.checkpoint.table import Row
from llmjax.core.errors import CheckpointError
from llmjax.core.model_config import Attention, FeedForward, Layer, LayerInputs, MixtureOfExperts, Mlp, ModelConfig, Norm, QKNorm, Wiring
from llmjax.core.positions import Proportional, Rope

NEAR, FAR = "sliding_attention", "full_attention"


def read(f: Fields) -> ModelConfig:
    dim, count, heads, context = f.count("hidden_size"), f.count("num_hidden_layers"), f.count("num_attention_heads"), f.count("max_position_embeddings", 131_072)
    norm, biased, kv, size = Norm(eps=f.number("rms_norm_eps", 1e-6)), f.flag("attention_bias"), base.kv_heads(f, heads, 4), f.count("head_dim", 256)
    if f.value("use_bidirectional_attention", None) not in (None, "vision"):          # "vision": between the tokens of one picture
        raise CheckpointError(f"{f.where}: use_bidirectional_attention={f.values['use_bidirectional_attention']!r}: this version reads decoders only")
    f.ignore("num_experts", "top_k_experts", "moe_intermediate_size", "num_global_key_value_heads", "global_head_dim", "per_layer_config")
    windows = base.layer_windows(f, count, f.count("sliding_window", 512), lambda i: bool((i + 1) % 6))
    same = f.flag("attention_k_eq_v")
    near = Attention(heads, kv, size, read_rope(f, 10_000.0, context, NEAR, ("", "")), None, qkv_bias=biased, out_bias=biased, qk_norm=QKNorm(norm), scale=1.0,
                     v_norm=replace(norm, scale=False))
    far = replace(near, rope=read_far_rope(f, context), shared_kv=same, **global_sizes(f, windows, near, same))
    hidden, activation, shared = f.count("intermediate_size", 9216), f.activation("hidden_activation", "gelu_pytorch_tanh"), f.value("num_kv_shared_layers", 0) or 0
    doubled = 2 if f.flag("use_double_wide_mlp") else 1
    mixture = MixtureOfExperts(f.count("num_experts"), f.count("top_k_experts"), f.count("moe_intermediate_size"), activation, norms=norm,
                               expert_scale=True) if f.flag("enable_moe_block") else None
    wiring: Wiring = "sandwich_open" if mixture else "sandwich"

    def ffn(width: int) -> FeedForward:
        return replace(mixture, shared=width) if mixture else Mlp(width, activation)
    first = count - shared
    layers = []
    for i, window in enumerate(windows):
        kind, mixer = (NEAR, replace(near, window=window)) if window else (FAR, far)
        last = shared and i < first and all((w is None) != (window is None) for w in windows[i + 1:first])
        mixer = replace(mixer, lends=kind if last else None, borrows=kind if i >= first else None)
        layers.append(Layer(mixer, ffn(hidden * (doubled if i >= first else 1)), wiring, output_scale=True))
    f.ignore("vocab_size_per_layer_input")
    own = LayerInputs(f.count("vocab_size_per_layer_input", 262_144), f.count("hidden_size_per_layer_input", 256)) if f.value("hidden_size_per_layer_input", 256) else None
    final = f.optional("final_logit_softcapping", None)
    return base.model(f, "gemma4", layers, dim=dim, norm=norm, tied=True, context=context, apart=bool(own or shared), embed_scale=dim ** 0.5,
                        logit_softcap=final and float(final), layer_inputs=own)


def read_far_rope(f: Fields, context: int) -> Rope:
    """The rotation of the layers that see all, with the family's own where the config says nothing."""
    if not (f.values.get("rope_parameters") or {}).get(FAR):
        return Rope(1_000_000.0, scaling=Proportional(0.25))
    return read_rope(f, 1_000_000.0, context, FAR, ("", ""))


def global_sizes(f: Fields, windows: list[int | None], near: Attention, same: bool) -> dict[str, Any]:
    """Head size and kv heads of the layers that see all: `global_head_dim` and `num_global_key_value_heads`, or the `per_layer_config` that transformers writes in their place.
    Raises CheckpointError where layers of one kind differ, or others than these have sizes of their own."""
    if "per_layer_config" not in f.values:
        return dict(head_dim=f.count("global_head_dim", 512), kv_heads=f.count("num_global_key_value_heads", near.kv_heads) if same else near.kv_heads)
    given = f.values["per_layer_config"] or {}
    usual = dict(head_dim=near.head_dim, num_key_value_heads=near.kv_heads)
    found = [{**usual, **given.get(str(i), given.get(i, {}))} for i in range(len(windows))]
    far = [x for x, window in zip(found, windows) if window is None]
    if any(x != far[0] for x in far) or any(x != usual for x, window in zip(found, windows) if window is not None) or any(set(x) != set(usual) for x in found):
        raise CheckpointError(f"{f.where}: per_layer_config={given}: head_dim and num_key_value_heads of the full_attention layers, all alike, are what this version reads there")
    return dict(head_dim=far[0]["head_dim"], kv_heads=far[0]["num_key_value_heads"]) if far else {}


def write(config: ModelConfig) -> dict[str, Any]:
    mixers = base.mixers(config)
    near, far = (next((m for m in mixers if (m.window is None) == wide), mixers[0]) for wide in (False, True))
    shared = sum(m.borrows is not None for m in mixers)
    ffns, own = [layer.ffn for layer in config.layers], config.layer_inputs
    widths = [ffn.shared if isinstance(ffn, MixtureOfExperts) else ffn.hidden for ffn in ffns]
    top = ffns[0]
    experts = {"num_experts": top.experts, "top_k_experts": top.top_k, "moe_intermediate_size": top.hidden} if isinstance(top, MixtureOfExperts) else {}
    return {**base.common(config, "hidden_activation", near), "sliding_window": base.widest(config) or 512, "layer_types": base.layer_types(config), "attention_bias": near.qkv_bias,
            "rope_parameters": {FAR: write_rope(far.rope), NEAR: write_rope(near.rope)}, "global_head_dim": far.head_dim,
            "num_global_key_value_heads": far.kv_heads if far.shared_kv else None, "attention_k_eq_v": far.shared_kv, "num_kv_shared_layers": shared,
            "use_double_wide_mlp": bool(shared) and widths[-1] == 2 * (widths[0] or 0), "enable_moe_block": bool(experts), **experts, "intermediate_size": widths[0],
            "final_logit_softcapping": config.logit_softcap,
            "hidden_size_per_layer_input": own.dim if own else 0, **({"vocab_size_per_layer_input": own.vocab_size} if own else {})}


L = base.L
OWN = (Row("model.embed_tokens_per_layer.weight", "layer_inputs/table", "v (l p) -> v l p"), Row("model.per_layer_model_projection.weight", "layer_inputs/projection", "(l p) d -> d l p"),
       Row("model.per_layer_projection_norm.weight", "layer_inputs/norm/scale"), Row(L + "per_layer_input_gate.weight", "input_gate", "p d -> d p"),
       Row(L + "per_layer_projection.weight", "input_projection", "d p -> p d"), Row(L + "post_per_layer_input_norm.weight", "norm_input_out/scale"), Row(L + "layer_scalar", "output_scale"))

EXPERTS = (
    Row(L + "router.proj.weight", "ffn/router", "e d -> d e"), Row(L + "router.scale", "ffn/router_norm/scale"), Row(L + "router.per_expert_scale", "ffn/expert_scale"),
    Row(L + "experts.gate_up_proj", ("ffn/gate", "ffn/up"), "e [f] d -> e d f"), Row(L + "experts.down_proj", "ffn/down", "e d f -> e f d"),
    *(Row(f"{L}mlp.{name}_proj.weight", f"ffn/shared/{name}", "o i -> i o") for name in ("gate", "up", "down")),
    *(Row(f"{L}{theirs}_feedforward_layernorm{number}.weight", f"ffn/{ours}/scale") for theirs, number, ours in
      (("pre", "", "shared_norm"), ("post", "_1", "shared_norm_out"), ("pre", "_2", "norm"), ("post", "_2", "norm_out"))))

FAMILY = base.Family("gemma4", ("gemma4_text", "gemma4"), "Gemma4ForCausalLM", partial(base.text_part, read=read), write, base.table(
    *base.ATTENTION, *base.QK_NORMS, *base.MLP, *base.SANDWICH, *OWN, *EXPERTS,
    renames=((r"^(model\.language_model\.|language_model\.model\.)", "model."), (r"^language_model\.lm_head\.", "lm_head.")),
    extras=(r"(model\.)?(vision_tower|audio_tower|embed_vision|embed_audio|multi_modal_projector)\..*",)), (Mlp, MixtureOfExperts))
