"""StableLM 2: Llama with LayerNorms and a quarter of each head rotated; attention and MLP may stand beside each other."""
from llmjax.checkpoint.families import base
from llmjax.checkpoint.fields import Fields, both_ropes, read_rope
from llmjax.core.errors import CheckpointError
from llmjax.core.model_config import Attention, Layer, Mlp, ModelConfig, Norm


def read(f: Fields) -> ModelConfig:
    dim, heads, context = f.count("hidden_size"), f.count("num_attention_heads"), f.count("max_position_embeddings", 4096)
    if f.flag("qk_layernorm"):
        raise CheckpointError(f"{f.where}: qk_layernorm=true: a norm of its own for each head is not supported")
    mixer = Attention(heads, base.kv_heads(f, heads, heads), base.head_dim(f, dim, heads), read_rope(f, 10_000.0, context, fraction=0.25), qkv_bias=f.flag("use_qkv_bias"))
    ffn = Mlp(f.count("intermediate_size"), f.activation("hidden_act", "silu"))
    layer = Layer(mixer, ffn, "parallel" if f.flag("use_parallel_residual") else "pre")
    return base.model(f, "stablelm", [layer] * f.count("num_hidden_layers"), dim=dim, norm=Norm("layer", f.number("layer_norm_eps", 1e-5), bias=True), tied=False, context=context)


def write(config: ModelConfig) -> dict:
    shared, first = base.common(config), base.first(config)
    shared["layer_norm_eps"] = shared.pop("rms_norm_eps")
    return {**shared, **both_ropes(first.mixer.rope, partial=True), "use_qkv_bias": first.mixer.qkv_bias, "use_parallel_residual": first.wiring == "parallel"}


FAMILY = base.Family("stablelm", ("stablelm",), "StableLmForCausalLM", read, write, base.table(*base.ATTENTION, *base.MLP, *base.with_biases(*base.PRE, base.TOP[1])))
