"""StarCoder2: grouped queries and rotary positions with LayerNorm, a plain tanh-GELU MLP, biases everywhere, an optional window on every layer."""
from llmjax.checkpoint.families import base
from llmjax.checkpoint.fields import Fields, both_ropes, read_rope
from llmjax.checkpoint.table import Row
from llmjax.core.model_config import Attention, Layer, Mlp, ModelConfig, Norm

ROWS = tuple(row for theirs, ours in (("c_fc", "up"), ("c_proj", "down"))
             for row in (Row(f"{base.L}mlp.{theirs}.weight", f"ffn/{ours}", "o i -> i o"), Row(f"{base.L}mlp.{theirs}.bias", f"ffn/{ours}_bias")))


def read(f: Fields) -> ModelConfig:
    dim, heads, context, biased = f.count("hidden_size"), f.count("num_attention_heads"), f.count("max_position_embeddings", 4096), f.flag("use_bias", True)
    window = f.value("sliding_window", None) and f.count("sliding_window", None)
    f.ignore("residual_dropout", "embedding_dropout", "activation_function")          # of training; hidden_act is the one that is used
    f.fixed(norm_type="layer_norm", mlp_type="default")
    mixer = Attention(heads, base.kv_heads(f, heads, 2), base.head_dim(f, dim, heads), read_rope(f, 10_000.0, context), window, qkv_bias=biased, out_bias=biased)
    ffn = Mlp(f.count("intermediate_size"), f.activation("hidden_act", "gelu_pytorch_tanh"), gated=False, bias=biased)
    norm = Norm("layer", f.number("norm_epsilon", 1e-5), bias=True)
    return base.model(f, "starcoder2", [Layer(mixer, ffn)] * f.count("num_hidden_layers"), dim=dim, norm=norm, tied=True, context=context)


def write(config: ModelConfig) -> dict:
    shared, mixer = base.common(config), base.first(config).mixer
    shared["norm_epsilon"] = shared.pop("rms_norm_eps")
    return {**shared, **both_ropes(mixer.rope), "sliding_window": mixer.window, "use_bias": mixer.qkv_bias}


FAMILY = base.Family("starcoder2", ("starcoder2",), "Starcoder2ForCausalLM", read, write,
                     base.table(*base.ATTENTION, *ROWS, *base.with_biases(*base.PRE, base.TOP[1])))
