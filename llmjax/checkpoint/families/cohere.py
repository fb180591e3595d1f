"""Command-R and R+: attention and MLP beside each other after one LayerNorm without biases, neighbouring dimensions rotated in pairs, scaled logits; R+ norms each head's queries and keys."""
from llmjax.checkpoint.families import base
from llmjax.checkpoint.fields import Fields, both_ropes, read_rope
from llmjax.core.model_config import Attention, Layer, Mlp, ModelConfig, Norm, QKNorm


def read(f: Fields) -> ModelConfig:
    dim, heads, context, biased = f.count("hidden_size"), f.count("num_attention_heads"), f.count("max_position_embeddings", 8192), f.flag("attention_bias")
    norm = Norm("layer", f.number("layer_norm_eps", 1e-5))
    mixer = Attention(heads, base.kv_heads(f, heads, heads), base.head_dim(f, dim, heads), read_rope(f, 500_000.0, context, interleaved=True), qkv_bias=biased, out_bias=biased,
                      qk_norm=QKNorm(norm, "each") if f.flag("use_qk_norm") else None)
    ffn = Mlp(f.count("intermediate_size"), f.activation("hidden_act", "silu"))
    return base.model(f, "cohere", [Layer(mixer, ffn, "parallel")] * f.count("num_hidden_layers"), dim=dim, norm=norm, tied=True,
                      context=context, logit_scale=float(f.number("logit_scale", 0.0625)))


def write(config: ModelConfig) -> dict:
    mixer = base.first(config).mixer
    return {**write_cohere(config), **both_ropes(mixer.rope), "use_qk_norm": mixer.qk_norm is not None}


def write_cohere(config: ModelConfig) -> dict:
    """The fields that both Cohere families share."""
    shared = base.common(config)
    shared["layer_norm_eps"] = shared.pop("rms_norm_eps")
    return {**shared, "attention_bias": base.first(config).mixer.qkv_bias, "logit_scale": config.logit_scale}


FAMILY = base.Family("cohere", ("cohere",), "CohereForCausalLM", read, write, base.table(*base.ATTENTION, *base.QK_NORMS, *base.MLP, base.PRE[0]))
