"""Gemma 3, the text model: Gemma 2's block with a norm on queries and keys; five sliding layers with their own rotary base to one that sees all.
EmbeddingGemma is the same block whose tokens see each other both ways, without a head.

Of a checkpoint with pictures (model_type "gemma3") the text model is read; the vision tower and the projector are left out.
"""
from dataclasses import replace
from functools import partial
from typing import Any

from llmjax.checkpoint.families import base, encoders
from llmjax.checkpoint.families.gemma2 import write_gemma
from llmjax.checkpoint.fields import Fields, read_rope, write_rope
from llmjax.core.model_config import Attention, LanguageHead, Layer, Mlp, ModelConfig, NoHead, Norm, QKNorm
from llmjax.core.positions import Rope


def read(f: Fields) -> ModelConfig:
    dim, heads, context, size = f.count("hidden_size"), f.count("num_attention_heads"), f.count("max_position_embeddings", 131_072), f.count("head_dim", 256)
    norm, biased = Norm(eps=f.number("rms_norm_eps", 1e-6), offset=1.0), f.flag("attention_bias")
    final = f.optional("final_logit_softcapping", None)
    f.ignore("attn_logit_softcapping")                    # the reference implementations carry the field and never apply it
    f.ignore("hidden_act", "_sliding_window_pattern")     # the one beside hidden_activation is not used; the other is what layer_types was made of
    every = f.count("sliding_window_pattern", 6)
    both_ways, window = f.flag("use_bidirectional_attention"), f.value("sliding_window", 4096) and f.count("sliding_window", 4096)
    if both_ways:
        encoders.read_head(f, {"Gemma3TextModel": NoHead()})
        window = window and window // 2 + 1                # the field counts both sides
    windows = base.layer_windows(f, f.count("num_hidden_layers"), window, lambda i: bool((i + 1) % every))
    far = read_rope(f, 1_000_000.0, context, "full_attention")
    near = read_rope(f, 10_000.0, context, "sliding_attention", ("rope_local_base_freq", ""))
    mixer = Attention(heads, base.kv_heads(f, heads, 4), size, causal=not both_ways, qkv_bias=biased, out_bias=biased, qk_norm=QKNorm(norm),
                      scale=base.scale_of(f.number("query_pre_attn_scalar", 256) ** -0.5, size))
    ffn = Mlp(f.count("intermediate_size"), f.activation("hidden_activation", "gelu_pytorch_tanh"))
    layers = [Layer(replace(mixer, window=window, rope=near if window else far), ffn, "sandwich") for window in windows]
    return base.model(f, "gemma3", layers, dim=dim, norm=norm, tied=True, context=context, embed_scale=dim ** 0.5, logit_softcap=final and float(final),
                      head=NoHead() if both_ways else LanguageHead())


def write(config: ModelConfig) -> dict:
    ropes: dict[bool, Any] = {mixer.window is None: mixer.rope for mixer in base.mixers(config)}
    far, near = ropes.get(True, Rope(1_000_000.0)), ropes.get(False, Rope(10_000.0))
    old = {k: v for k, v in write_rope(far).items() if k != "rope_theta"} if far.scaling else None
    wide = base.widest(config)
    two_way = {"architectures": ["Gemma3TextModel"], "use_bidirectional_attention": True, **({"sliding_window": 2 * (wide - 1)} if wide else {})} if isinstance(config.head, NoHead) else {}
    return {**write_gemma(config), **two_way, "attn_logit_softcapping": None, "rope_parameters": {"full_attention": write_rope(far), "sliding_attention": write_rope(near)},
            "rope_theta": far.theta, "rope_local_base_freq": near.theta, **({"rope_scaling": old} if old else {})}


FAMILY = base.Family("gemma3", ("gemma3_text", "gemma3"), "Gemma3ForCausalLM", partial(base.text_part, read=read), write, base.table(
    *base.ATTENTION, *base.QK_NORMS, *base.MLP, *base.SANDWICH,
    renames=((r"^(model\.language_model\.|language_model\.model\.)", "model."), (r"^language_model\.lm_head\.", "lm_head.")),
    extras=(r"(model\.)?(vision_tower|multi_modal_projector)\..*",)))
