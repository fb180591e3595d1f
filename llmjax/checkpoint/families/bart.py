"""BART (Lewis et al. 2020): encoder and decoder of the first Transformer's wiring, learned positions from row 2 on, a norm after each embedding. mBART (Liu et al. 2020) has its norms
before each sublayer and after the last."""
import re
from dataclasses import replace
from typing import Any

from llmjax.checkpoint.families import base, encoders
from llmjax.checkpoint.fields import Fields
from llmjax.checkpoint.table import Row, Table
from llmjax.core.model_config import Attention, LanguageHead, Layer, Mlp, ModelConfig, NoHead, Norm

OFFSET = 2                     # rows of the position tables before the first position
PARTS = ("q_proj", "k_proj", "v_proj", "out_proj")


def stack(side: str, ours: str = "") -> tuple[Row, ...]:
    L, lead = f"model.{side}.layers." + "{l}.", f"{ours}/" if ours else ""
    norms = [row for suffix in ("_out", "") for theirs, name in (("self_attn_layer_norm", "mixer"), ("final_layer_norm", "ffn")) for row in encoders.norm(L + theirs, f"norm_{name}{suffix}")]
    rows = (*encoders.attention(f"{L}self_attn.{name}" for name in PARTS), *encoders.dense(L + "fc1", "ffn/up"), *encoders.dense(L + "fc2", "ffn/down"), *norms)
    return (*encoders.stacked(ours, *rows), *encoders.norm(f"model.{side}.layer_norm", f"{lead}final_norm"),
            Row(f"model.{side}.embed_positions.weight", f"{lead}positions/table"), *encoders.norm(f"model.{side}.layernorm_embedding", f"{lead}embed_norm"))


E = ("model.shared.weight", "model.decoder.embed_tokens.weight", "model.encoder.embed_tokens.weight")
D = "model.decoder.layers.{l}.encoder_attn"
TABLE = Table((
    Row(E[0], "embed/table"), Row("final_logits_bias", "head/bias", "1 v -> v"), *stack("decoder"), *stack("encoder", "encoder"),
    *encoders.attention((f"{D}.{name}" for name in PARTS), "cross"), *encoders.norm(D + "_layer_norm", "norm_cross_out"), *encoders.norm(D + "_layer_norm", "norm_cross"),
), base="model.", copies=tuple((name, E[0]) for name in ("lm_head.weight", *E[1:])))
# Untied, both sides and the head have a matrix each; files of transformers 4 hold that of both sides once, as the shared one, which transformers 5 keeps and does not use.
APART = replace(TABLE, copies=(), extras=(re.escape(E[0]),), rows=(
    Row("lm_head.weight", "head/kernel", "v d -> d v"), Row(E[1], "embed/table"), Row(E[0], "embed/table"), Row(E[2], "encoder/embed/table"), Row(E[0], "encoder/embed/table"), *TABLE.rows[1:]))


def family(name: str, prefix: str, before: bool) -> base.Family:
    """model_type `name`, classes that begin with `prefix`; norms before each sublayer, or after each sum."""
    def read(f: Fields) -> ModelConfig:
        encoders.read_head(f, {prefix + "ForConditionalGeneration": LanguageHead()})
        # num_hidden_layers repeats encoder_layers
        f.ignore("init_std", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop", "classifier_dropout", "classif_dropout", "num_hidden_layers", "save_step",
                 "force_bos_token_to_be_generated")
        # older files spell out the settings that made BART of a more general code
        f.fixed(is_decoder=False, add_bias_logits=False, add_final_layer_norm=before, normalize_before=before, normalize_embedding=True,
                static_position_embeddings=False, extra_pos_embeddings=OFFSET)
        dim, rows = f.count("d_model", 1024), f.count("max_position_embeddings", 1024) + OFFSET
        f.values.setdefault("pad_token_id", 1)
        both = dict(dim=dim, norm=Norm("layer", 1e-5, bias=True), tied=True, context=rows - OFFSET, learned_positions=rows, position_offset=OFFSET, embed_norm=True, final_norm=before,
                    embed_scale=dim ** 0.5 if f.flag("scale_embedding") else 1.0)

        def layer(side: str, causal: bool) -> Layer:
            heads = f.count(f"{side}_attention_heads", 16)
            mixer = Attention(heads, heads, dim // heads, None, causal=causal, qkv_bias=True, out_bias=True)
            ffn = Mlp(f.count(f"{side}_ffn_dim", 4096), f.activation("activation_function", "gelu"), gated=False, bias=True)
            return Layer(mixer, ffn, "pre" if before else "after_sum", cross=replace(mixer, causal=False) if causal else None)
        inner = base.model(f, name, [layer("encoder", False)] * f.count("encoder_layers", 12), head=NoHead(), **both)
        start = f.ids("decoder_start_token_id") or (None if before else 2,)                # mBART's answers start from a language's token
        return base.model(f, name, [layer("decoder", True)] * f.count("decoder_layers", 12), encoder=inner, encoder_embeds=not inner.tied, head_bias=True, decoder_start=start[0], **both)
    return base.Family(name, (name,), prefix + "ForConditionalGeneration", read, write, lambda config: APART if config.encoder_embeds else TABLE, rotary=False)


def write(config: ModelConfig) -> dict[str, Any]:
    shared, inner = base.common(config), config.encoder or config
    kept = {k: shared[k] for k in ("vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")}
    sides = {f"{side}_{name}": value for side, c in (("encoder", inner), ("decoder", config))
             for name, value in (("layers", len(c.layers)), ("attention_heads", base.first(c).mixer.heads), ("ffn_dim", base.first(c).ffn.hidden))}
    return {**kept, **sides, "d_model": config.dim, "max_position_embeddings": (config.learned_positions or 0) - OFFSET, "activation_function": encoders.activation_name(config),
            "scale_embedding": config.embed_scale != 1.0, "is_encoder_decoder": True, "decoder_start_token_id": config.decoder_start}


FAMILY = family("bart", "Bart", before=False)
