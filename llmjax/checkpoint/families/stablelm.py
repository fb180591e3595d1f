"""StableLM 2: Llama with LayerNorms and a quarter of each head rotated; attention and MLP may stand beside each other; the 12B norms each head's queries and keys."""
from dataclasses import replace

from llmjax.checkpoint.families import base
from llmjax.checkpoint.fields import Fields, both_ropes, read_rope
from llmjax.checkpoint.table import Row
from llmjax.core.model_config import Attention, Layer, Mlp, ModelConfig, Norm, QKNorm

HEAD_NORMS = tuple(Row(base.L + f"self_attn.{name}_layernorm.norms.{{e}}.weight", f"mixer/{name}_norm/scale") for name in "qk")          # one tensor a head


def read(f: Fields) -> ModelConfig:
    dim, heads, context = f.count("hidden_size"), f.count("num_attention_heads"), f.count("max_position_embeddings", 4096)
    norm = Norm("layer", f.number("layer_norm_eps", 1e-5), bias=True)
    mixer = Attention(heads, base.kv_heads(f, heads, heads), base.head_dim(f, dim, heads), read_rope(f, 10_000.0, context, fraction=0.25), qkv_bias=f.flag("use_qkv_bias"),
                      qk_norm=QKNorm(replace(norm, bias=False), "each") if f.flag("qk_layernorm") else None)
    ffn = Mlp(f.count("intermediate_size"), f.activation("hidden_act", "silu"))
    layer = Layer(mixer, ffn, "parallel" if f.flag("use_parallel_residual") else "pre")
    return base.model(f, "stablelm", [layer] * f.count("num_hidden_layers"), dim=dim, norm=norm, tied=False, context=context)


def write(config: ModelConfig) -> dict:
    shared, first = base.common(config), base.first(config)
    shared["layer_norm_eps"] = shared.pop("rms_norm_eps")
    return {**shared, **both_ropes(first.mixer.rope, partial=True), "use_qkv_bias": first.mixer.qkv_bias,
            "use_parallel_residual": first.wiring == "parallel", "qk_layernorm": first.mixer.qk_norm is not None}


FAMILY = base.Family("stablelm", ("stablelm",), "StableLmForCausalLM", read, write, base.table(*base.ATTENTION, *HEAD_NORMS, *base.MLP, *base.with_biases(*base.PRE, base.TOP[1])))
