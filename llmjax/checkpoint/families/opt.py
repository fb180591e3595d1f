"""OPT: learned positions (two rows of the table are never used), LayerNorms and biases, an MLP of ReLUs; the 350M has its norms after each sum and a narrower embedding."""
from typing import Any

from llmjax.checkpoint.families import base, encoders
from llmjax.checkpoint.fields import Fields
from llmjax.checkpoint.table import Row, Table
from llmjax.core.model_config import Attention, Layer, Mlp, ModelConfig, Norm

D = "model.decoder."
L, OFFSET = D + "layers.{l}.", 2


def rows(config: ModelConfig) -> Table:
    out = "" if base.first(config).wiring == "pre" else "_out"
    return Table((
        Row(D + "embed_tokens.weight", "embed/table"), Row(D + "embed_positions.weight", "positions/table"), Row("lm_head.weight", "head/kernel", "v d -> d v"),
        Row(D + "project_in.weight", "embed_proj/kernel", "d e -> e d"), Row(D + "project_out.weight", "head/narrow", "e d -> d e"), *encoders.norm(D + "final_layer_norm", "final_norm"),
        *encoders.attention(f"{L}self_attn.{name}_proj" for name in ("q", "k", "v", "out")), *encoders.norm(L + "self_attn_layer_norm", "norm_mixer" + out),
        *encoders.dense(L + "fc1", "ffn/up"), *encoders.dense(L + "fc2", "ffn/down"), *encoders.norm(L + "final_layer_norm", "norm_ffn" + out),
    ), base="model.", renames=((r"^decoder\.", "model.decoder."),), copies=(("lm_head.weight", D + "embed_tokens.weight"),))


def read(f: Fields) -> ModelConfig:
    dim, heads, context = f.count("hidden_size"), f.count("num_attention_heads"), f.count("max_position_embeddings", 2048)
    before, biased = f.flag("do_layer_norm_before", True), f.flag("enable_bias", True)
    f.fixed(layer_norm_elementwise_affine=True)
    f.ignore("layerdrop", "init_std", "activation_dropout", "prefix")                    # training
    mixer = Attention(heads, heads, base.head_dim(f, dim, heads), None, qkv_bias=biased, out_bias=biased)
    layer = Layer(mixer, Mlp(f.count("ffn_dim", 4 * dim), f.activation("activation_function", "relu"), gated=False, bias=biased), "pre" if before else "after_sum")
    width = f.count("word_embed_proj_dim", dim)
    return base.model(f, "opt", [layer] * f.count("num_hidden_layers"), dim=dim, norm=Norm("layer", bias=True, eps=1e-5), tied=True, context=context, learned_positions=context + OFFSET,
                      position_offset=OFFSET, embed_dim=None if width == dim else width, embed_proj_first=width != dim, final_norm=before and not f.flag("_remove_final_layer_norm"))


def write(config: ModelConfig) -> dict[str, Any]:
    shared, first = base.common(config), base.first(config)
    kept = {k: shared[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")}
    before = first.wiring == "pre"
    return {**kept, "max_position_embeddings": config.context, "ffn_dim": first.ffn.hidden, "activation_function": shared["hidden_act"], "do_layer_norm_before": before,
            "enable_bias": first.mixer.qkv_bias, "word_embed_proj_dim": config.embed_dim or config.dim, "_remove_final_layer_norm": before and not config.final_norm}


FAMILY = base.Family("opt", ("opt",), "OPTForCausalLM", read, write, rows, rotary=False)
