"""ModernBERT (Warner et al. 2024): rotary positions, gated feed-forward, most layers in a window both ways with a rotary base of their own; the first layer has no norm before its attention."""
from dataclasses import replace
from typing import Any

from llmjax.checkpoint.families import base, encoders
from llmjax.checkpoint.fields import SPELLINGS, Fields, read_rope, write_rope
from llmjax.checkpoint.table import Row, Table
from llmjax.core.errors import CheckpointError
from llmjax.core.model_config import Attention, ClassifierHead, Layer, MaskedHead, Mlp, ModelConfig, NoHead, Norm, SpanHead, TokenHead, Transform
from llmjax.core.positions import Rope

L = "model.layers.{l}."
QKV, GATED = ("mixer/q", "mixer/k", "mixer/v"), ("ffn/gate", "ffn/up")
TABLE = Table((
    Row("model.embeddings.tok_embeddings.weight", "embed/table"), *encoders.norm("model.embeddings.norm", "embed_norm"), *encoders.norm("model.final_norm", "final_norm"),
    Row(L + "attn.Wqkv.weight", QKV, "[n h] d -> d n h"), Row(L + "attn.Wqkv.bias", tuple(x + "_bias" for x in QKV), "[n h] -> n h"),
    *encoders.dense(L + "attn.Wo", "mixer/o", "d (n h) -> n h d"), *encoders.norm(L + "attn_norm", "norm_mixer"), *encoders.norm(L + "mlp_norm", "norm_ffn"),
    Row(L + "mlp.Wi.weight", GATED, "[f] d -> d f"), Row(L + "mlp.Wi.bias", tuple(x + "_bias" for x in GATED), "[f] -> f"), *encoders.dense(L + "mlp.Wo", "ffn/down"),
    *(row for head in ("masked", "classifier", "tagger", "span") for row in (*encoders.dense("head.dense", f"{head}/dense"), *encoders.norm("head.norm", f"{head}/norm"))),
    *(row for head in ("classifier", "tagger", "span") for row in encoders.dense("classifier", f"{head}/out")),
    Row("decoder.bias", "masked/bias"), Row("decoder.weight", "masked/kernel", "v d -> d v"),
), base="model.", copies=(("decoder.weight", "model.embeddings.tok_embeddings.weight"),))


def heads(transform: Transform, pooling: Any, labels: tuple[str, ...]) -> encoders.Heads:
    return {"ModernBertModel": NoHead(), "ModernBertForMaskedLM": MaskedHead(transform), "ModernBertForSequenceClassification": ClassifierHead(labels, transform, pooling),
            "ModernBertForTokenClassification": TokenHead(labels, transform), "ModernBertForQuestionAnswering": SpanHead(transform)}


def read(f: Fields) -> ModelConfig:
    # of training, and of how it is computed there; position_embedding_type and layer_norm_eps were copied from BERT and are not read
    f.ignore("deterministic_flash_attn", "reference_compile", "repad_logits_with_grad", "sparse_prediction", "sparse_pred_ignore_index", "initializer_cutoff_factor", "embedding_dropout",
             "mlp_dropout", "position_embedding_type", "layer_norm_eps")
    dim, count, layers, context = f.count("hidden_size", 768), f.count("num_attention_heads", 12), f.count("num_hidden_layers", 22), f.count("max_position_embeddings", 8192)
    every, biased = f.count("global_attn_every_n_layers", 3), f.flag("attention_bias")
    windows = base.layer_windows(f, layers, f.count("local_attention", 128) // 2 + 1, lambda i: bool(i % every))
    far = read_rope(f, 160_000.0, context, "full_attention", ("global_rope_theta", ""))
    near = read_rope(f, 10_000.0, context, "sliding_attention", ("local_rope_theta", ""))
    mixer = Attention(count, count, base.head_dim(f, dim, count), causal=False, qkv_bias=biased, out_bias=biased)
    ffn = Mlp(f.count("intermediate_size", 1152), f.activation("hidden_activation", "gelu"), bias=f.flag("mlp_bias"))
    norm = Norm("layer", f.number("norm_eps", 1e-5), bias=f.flag("norm_bias"))
    pooling = f.value("classifier_pooling", "cls")
    if pooling not in ("cls", "mean"):
        raise CheckpointError(f"{f.where}: classifier_pooling={pooling!r}: cls or mean")
    transform = Transform(f.activation("classifier_activation", "gelu"), f.flag("classifier_bias"), norm=True)
    head = encoders.read_head(f, heads(transform, "first" if pooling == "cls" else "mean", encoders.read_labels(f)))
    biased = f.flag("decoder_bias", True) and isinstance(head, MaskedHead)
    blocks = [Layer(replace(mixer, window=window, rope=near if window else far), ffn, "pre" if i else "pre_ffn") for i, window in enumerate(windows)]
    return base.model(f, "modernbert", blocks, dim=dim, norm=norm, tied=True, context=context, embed_norm=True, head=head, head_bias=biased)


def write(config: ModelConfig) -> dict:
    shared, first = base.common(config), base.first(config)
    head, transform = config.head, getattr(config.head, "transform", None) or Transform("gelu", bias=False, norm=True)
    ropes: dict[bool, Any] = {mixer.window is None: mixer.rope for mixer in base.mixers(config)}
    far, near = ropes.get(True, Rope(160_000.0)), ropes.get(False, Rope())
    kinds = base.layer_types(config)
    every = next((n for n in range(1, len(kinds) + 1) if [("sliding" if i % n else "full") + "_attention" for i in range(len(kinds))] == kinds), None)
    pooling = head.pooling if isinstance(head, ClassifierHead) else "first"
    kept = {name: x for name, x in shared.items() if name not in ("rms_norm_eps", "num_key_value_heads", "head_dim", "hidden_act")}
    return {**kept, "hidden_activation": SPELLINGS[first.ffn.activation], "norm_eps": config.norm.eps, "norm_bias": config.norm.bias, "attention_bias": first.mixer.qkv_bias,
            "mlp_bias": first.ffn.bias, "decoder_bias": config.head_bias, "classifier_pooling": "cls" if pooling == "first" else "mean", "classifier_bias": transform.bias,
            "classifier_activation": SPELLINGS[transform.activation], "local_attention": max(1, 2 * ((base.widest(config) or 65) - 1)), "layer_types": kinds,
            **({"global_attn_every_n_layers": every} if every else {}), "rope_parameters": {"full_attention": write_rope(far), "sliding_attention": write_rope(near)},
            "global_rope_theta": far.theta, "local_rope_theta": near.theta, **encoders.write_head(config, lambda labels: heads(transform, pooling, labels))}


FAMILY = base.Family("modernbert", ("modernbert",), "ModernBertForMaskedLM", read, write, TABLE)
