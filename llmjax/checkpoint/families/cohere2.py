"""Command-R7B and Command-A: Command-R whose sliding layers rotate and whose full layers know no positions."""
from dataclasses import replace

from llmjax.checkpoint.families import base
from llmjax.checkpoint.families.cohere import write_cohere
from llmjax.checkpoint.fields import Fields, both_ropes, read_rope
from llmjax.core.model_config import Attention, Layer, Mlp, ModelConfig, Norm
from llmjax.core.positions import Rope


def read(f: Fields) -> ModelConfig:
    dim, heads, context, biased = f.count("hidden_size"), f.count("num_attention_heads"), f.count("max_position_embeddings", 8192), f.flag("attention_bias")
    mixer = Attention(heads, base.kv_heads(f, heads, heads), base.head_dim(f, dim, heads), read_rope(f, 10_000.0, context, interleaved=True), qkv_bias=biased, out_bias=biased)
    ffn, every = Mlp(f.count("intermediate_size"), f.activation("hidden_act", "silu")), f.count("sliding_window_pattern", 4)
    f.ignore("_sliding_window_pattern")           # what layer_types was made of
    f.fixed(order_of_interleaved_layers="local_attn_first", position_embedding_type="rope_gptj", rotary_pct=1.0, use_gated_activation=True, use_embedding_sharing=True,
            use_parallel_block=True, layer_switch=every)
    windows = base.layer_windows(f, f.count("num_hidden_layers"), f.count("sliding_window", 4096), lambda i: (i + 1) % every != 0)
    layers = [Layer(replace(mixer, window=window, rope=mixer.rope if window else None), ffn, "parallel") for window in windows]
    return base.model(f, "cohere2", layers, dim=dim, norm=Norm("layer", f.number("layer_norm_eps", 1e-5)), tied=True, context=context,
                      logit_scale=float(f.number("logit_scale", 0.0625)))


def write(config: ModelConfig) -> dict:
    rope = next((mixer.rope for mixer in base.mixers(config) if mixer.rope), Rope(interleaved=True))
    return {**write_cohere(config), **both_ropes(rope), "sliding_window": base.widest(config) or 4096, "layer_types": base.layer_types(config)}


FAMILY = base.Family("cohere2", ("cohere2",), "Cohere2ForCausalLM", read, write, base.table(*base.ATTENTION, *base.MLP, base.PRE[0]), rotary=None)
