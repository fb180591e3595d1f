"""GPT-2: learned positions, LayerNorm with biases, one tensor for queries, keys and values, kernels stored [in, out]."""
import itertools
from typing import Any

from llmjax.checkpoint.families import base
from llmjax.checkpoint.fields import Fields
from llmjax.checkpoint.table import Row, Table
from llmjax.core.errors import CheckpointError
from llmjax.core.model_config import Attention, Layer, Mlp, ModelConfig, Norm

H = "transformer.h.{l}."
QKV, QKV_BIAS = ("mixer/q", "mixer/k", "mixer/v"), ("mixer/q_bias", "mixer/k_bias", "mixer/v_bias")
NORMS = tuple(Row(f"{name}.{theirs}", f"{ours}/{part}") for name, ours in ((H + "ln_1", "norm_mixer"), (H + "ln_2", "norm_ffn"), ("transformer.ln_f", "final_norm"))
              for theirs, part in (("weight", "scale"), ("bias", "bias")))
TABLE = Table((
    Row("transformer.wte.weight", "embed/table"), Row("transformer.wpe.weight", "positions/table"), *NORMS, Row("lm_head.weight", "head/kernel", "v d -> d v"),
    Row(H + "attn.c_attn.weight", QKV, "d [n h] -> d n h"), Row(H + "attn.c_attn.bias", QKV_BIAS, "[n h] -> n h"),
    Row(H + "attn.c_proj.weight", "mixer/o", "(n h) d -> n h d"), Row(H + "attn.c_proj.bias", "mixer/o_bias"),
    Row(H + "mlp.c_fc.weight", "ffn/up"), Row(H + "mlp.c_fc.bias", "ffn/up_bias"), Row(H + "mlp.c_proj.weight", "ffn/down"), Row(H + "mlp.c_proj.bias", "ffn/down_bias"),
), base="transformer.", extras=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",), copies=(("lm_head.weight", "transformer.wte.weight"),))


def scales(size: int, count: int, scaled: bool, by_layer: bool) -> list[float]:
    return [(size ** -0.5 if scaled else 1.0) / (float(i + 1) if by_layer else 1.0) for i in range(count)]


def read(f: Fields) -> ModelConfig:
    dim, heads, count, context = f.count("n_embd"), f.count("n_head"), f.count("n_layer"), f.count("n_positions", 1024)
    if dim % heads:
        raise CheckpointError(f"{f.where}: n_embd={dim} is not a multiple of n_head={heads}")
    # n_ctx repeats n_positions; the summary head belongs to another class
    f.ignore("n_ctx", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout")
    ffn = Mlp(f.count("n_inner", 4 * dim), f.activation("activation_function", "gelu_new"), gated=False, bias=True)
    size = dim // heads
    layers = [Layer(Attention(heads, heads, size, None, qkv_bias=True, out_bias=True, scale=base.scale_of(scale, size)), ffn)
              for scale in scales(size, count, f.flag("scale_attn_weights", True), f.flag("scale_attn_by_inverse_layer_idx"))]
    norm = Norm("layer", f.number("layer_norm_epsilon", 1e-5), bias=True)
    return base.model(f, "gpt2", layers, dim=dim, norm=norm, tied=True, context=context, learned_positions=context)


def write(config: ModelConfig) -> dict[str, Any]:
    shared, size = base.common(config), base.first(config).mixer.head_dim
    told = [mixer.scale or size ** -0.5 for mixer in base.mixers(config)]
    scaled, by_layer = next((flags for flags in itertools.product((True, False), (False, True)) if scales(size, len(told), *flags) == told), (True, False))
    activation = {"gelu_pytorch_tanh": "gelu_new"}.get(shared["hidden_act"], shared["hidden_act"])
    kept = ("vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    return {**{k: shared[k] for k in kept}, "n_embd": config.dim, "n_head": base.first(config).mixer.heads,
            "n_layer": len(config.layers), "n_positions": config.learned_positions, "n_inner": shared["intermediate_size"], "activation_function": activation,
            "layer_norm_epsilon": config.norm.eps, "scale_attn_weights": scaled, "scale_attn_by_inverse_layer_idx": by_layer}


FAMILY = base.Family("gpt2", ("gpt2",), "GPT2LMHeadModel", read, write, TABLE, rotary=False)
