"""GPT-J: attention and MLP beside each other after one LayerNorm, neighbouring dimensions rotated in pairs, a head with a bias."""
from llmjax.checkpoint.families import base
from llmjax.checkpoint.fields import Fields
from llmjax.checkpoint.table import Row, Table
from llmjax.core.errors import CheckpointError
from llmjax.core.model_config import Attention, Layer, Mlp, ModelConfig, Norm
from llmjax.core.positions import Rope

H = "transformer.h.{l}."
TABLE = Table((
    Row("transformer.wte.weight", "embed/table"), Row("lm_head.weight", "head/kernel", "v d -> d v"), Row("lm_head.bias", "head/bias"),
    *base.with_biases(Row("transformer.ln_f.weight", "final_norm/scale"), Row(H + "ln_1.weight", "norm_mixer/scale")),
    *(Row(f"{H}attn.{name}_proj.weight", f"mixer/{name}", "(n h) d -> d n h") for name in "qkv"), Row(H + "attn.out_proj.weight", "mixer/o", "d (n h) -> n h d"),
    *base.plain_mlp(H, "fc_in", "fc_out"),
), base="transformer.", extras=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias|embed_positions)",), copies=(("lm_head.weight", "transformer.wte.weight"),))


def read(f: Fields) -> ModelConfig:
    dim, heads, context = f.count("n_embd"), f.count("n_head"), f.count("n_positions", 2048)
    if dim % heads:
        raise CheckpointError(f"{f.where}: n_embd={dim} is not a multiple of n_head={heads}")
    f.ignore("n_ctx", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout")    # of GPT-2
    f.fixed(scale_attn_weights=True, rotary=True)
    size = dim // heads
    mixer = Attention(heads, heads, size, Rope(fraction=f.count("rotary_dim", 64) / size, interleaved=True))
    ffn = Mlp(f.count("n_inner", 4 * dim), f.activation("activation_function", "gelu_new"), gated=False, bias=True)
    norm = Norm("layer", f.number("layer_norm_epsilon", 1e-5), bias=True)
    return base.model(f, "gptj", [Layer(mixer, ffn, "parallel")] * f.count("n_layer"), dim=dim, norm=norm, tied=False, context=context, head_bias=True)


def write(config: ModelConfig) -> dict:
    shared, mixer = base.common(config), base.first(config).mixer
    kept = ("vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    return {**{k: shared[k] for k in kept}, "n_embd": config.dim, "n_head": mixer.heads, "n_layer": len(config.layers), "n_positions": config.context,
            "n_inner": shared["intermediate_size"], "rotary_dim": round(mixer.rope.fraction * mixer.head_dim), "layer_norm_epsilon": config.norm.eps,
            "activation_function": {"gelu_pytorch_tanh": "gelu_new"}.get(shared["hidden_act"], shared["hidden_act"])}


FAMILY = base.Family("gptj", ("gptj",), "GPTJForCausalLM", read, write, TABLE)
