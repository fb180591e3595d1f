"""DeBERTa v2 and v3 (He et al. 2021): attention over content and relative positions apart; the tables of distances pass through a layer's own projections."""
from dataclasses import replace
from typing import Any, cast

from llmjax.checkpoint.families import base, encoders
from llmjax.checkpoint.fields import SPELLINGS, Fields
from llmjax.checkpoint.table import Row, Table
from llmjax.core.errors import CheckpointError
from llmjax.core.model_config import Activation, Attention, ClassifierHead, Convolution, Layer, MaskedHead, ModelConfig, NoHead, SpanHead, TokenHead, Transform, find_cycle
from llmjax.core.positions import Disentangled

L, R = "deberta.encoder.layer.{l}.attention.self.", "deberta.encoder."
SCORES = (*encoders.dense("pooler.dense", "classifier/dense"), *encoders.dense("classifier", "classifier/out"), *encoders.SCORES)
BODY = (*encoders.bert_rows("deberta.", ("query_proj", "key_proj", "value_proj")), Row(R + "rel_embeddings.weight", "relative/table"),
        *encoders.norm(R + "LayerNorm", "relative_norm"),
        *encoders.dense(R + "conv.conv", "prefix_0/convolution/kernel", "o i w -> w i o"), *encoders.norm(R + "conv.LayerNorm", "prefix_0/norm_convolution_out"),
        *(row for theirs, ours in (("pos_key_proj", "k"), ("pos_query_proj", "q")) for row in encoders.dense(L + theirs, f"mixer/position_{ours}", "(n h) d -> d n h", "(n h) -> n h")))
MORE: dict[str, Any] = dict(base="deberta.", extras=(r"mask_predictions\..*", r"deberta\.embeddings\.(position_ids|position_embeddings\.weight)",
                                                      r"deberta\.encoder\.(rel_embeddings|LayerNorm)\..*"))       # a table that no term of the attention takes
TABLE = Table((*BODY, *SCORES, *encoders.dense("lm_predictions.lm_head.dense", "masked/dense"), *encoders.norm("lm_predictions.lm_head.LayerNorm", "masked/norm"),
               Row("lm_predictions.lm_head.bias", "masked/bias")), **MORE)
LEGACY_TABLE = Table((*BODY, *encoders.dense("cls.predictions.transform.dense", "masked/dense"), *encoders.norm("cls.predictions.transform.LayerNorm", "masked/norm"),
                      Row("cls.predictions.bias", "masked/bias")), **MORE,
                     copies=(("cls.predictions.decoder.weight", "deberta.embeddings.word_embeddings.weight"), ("cls.predictions.decoder.bias", "cls.predictions.bias")))
NAME, LEGACY = "deberta-v2", "deberta-v2-legacy"


def heads(activation: Activation, pooled: Activation, labels: tuple[str, ...]) -> encoders.Heads:
    return {"DebertaV2Model": NoHead(), "DebertaV2ForMaskedLM": MaskedHead(Transform(activation, norm=True)), "DebertaV2ForSequenceClassification": ClassifierHead(labels, Transform(pooled)),
            "DebertaV2ForTokenClassification": TokenHead(labels), "DebertaV2ForQuestionAnswering": SpanHead()}


def read_relative(f: Fields, rows: int) -> Disentangled | None:
    """Raises CheckpointError for terms that are not known, or given without relative_attention."""
    kinds = f.value("pos_att_type", None) or []
    kinds = [x.strip() for x in kinds.lower().split("|")] if isinstance(kinds, str) else kinds
    given, reach, buckets = f.flag("relative_attention"), f.value("max_relative_positions", -1), f.value("position_buckets", -1)
    shared, normed = f.flag("share_att_key"), f.value("norm_rel_ebd", "none")
    if not set(kinds) <= {"c2p", "p2c"} or (kinds and not given) or normed not in ("none", "layer_norm"):
        raise CheckpointError(f"{f.where}: pos_att_type={kinds}, relative_attention={given}, norm_rel_ebd={normed!r}: c2p and p2c with relative_attention, and layer_norm or none are known")
    if not kinds:
        return None
    reach = reach if reach > 0 else rows
    if buckets // 2 >= reach - 1 and reach < rows:
        raise CheckpointError(f"{f.where}: position_buckets={buckets}: half of it leaves no distance up to max_relative_positions={reach} to share a row")
    return Disentangled(buckets if buckets > 0 else reach, reach, buckets > 0, "c2p" in kinds, "p2c" in kinds, shared, normed == "layer_norm")


def read(f: Fields) -> ModelConfig:
    # pooler_hidden_size repeats hidden_size in every release; legacy is about names alone
    f.ignore("pooler_dropout", "pooler_hidden_size", "classifier_dropout", "cls_dropout")
    f.fixed(conv_groups=1, tie_word_embeddings=True, embedding_size=f.count("hidden_size"), z_steps=0, attention_head_size=f.count("hidden_size") // f.count("num_attention_heads"))
    rows = f.count("max_position_embeddings", 512)
    head = encoders.read_head(f, heads(f.activation("hidden_act", "gelu"), f.activation("pooler_hidden_act", "gelu"), encoders.read_labels(f)))
    legacy = f.flag("legacy", True) and isinstance(head, MaskedHead)
    f.values = {"type_vocab_size": 0, "layer_norm_eps": 1e-7, **f.values}
    config = encoders.read_bert(f, LEGACY if legacy else NAME, head)
    relative, learned = read_relative(f, rows), rows if f.flag("position_biased_input", True) else None

    def layers(xs: tuple[Layer, ...]) -> tuple[Layer, ...]:
        return tuple(replace(x, mixer=replace(cast(Attention, x.mixer), relative=relative)) for x in xs)
    config = replace(config, prefix=layers(config.prefix), cycle=layers(config.cycle), suffix=layers(config.suffix), learned_positions=learned)
    width, activation = f.value("conv_kernel_size", 0), f.activation("conv_act", "tanh")
    return convolved(config, Convolution(width, activation)) if width else config


def convolved(config: ModelConfig, convolution: Convolution) -> ModelConfig:
    """The model with a convolution beside its first layer, which then stands apart."""
    first, *others = config.layers
    found = find_cycle(tuple(others))
    return replace(config, **{**found, "prefix": (replace(first, convolution=convolution), *found["prefix"])})


def write(config: ModelConfig) -> dict:
    first, head = base.first(config), config.head
    relative: Any = first.mixer.relative
    pooled = head.transform.activation if isinstance(head, ClassifierHead) else "gelu"
    out = {**encoders.write_bert(config), "max_position_embeddings": config.context, "position_biased_input": config.learned_positions is not None, "legacy": config.family == LEGACY,
           "pooler_hidden_act": SPELLINGS[pooled], "relative_attention": relative is not None, **encoders.write_head(config, lambda labels: heads(first.ffn.activation, pooled, labels))}
    if first.convolution:
        out |= {"conv_kernel_size": first.convolution.width, "conv_act": SPELLINGS[first.convolution.activation]}
    if relative:
        kinds = [name for name, there in (("p2c", relative.position_to_content), ("c2p", relative.content_to_position)) if there]
        out |= {"pos_att_type": kinds, "position_buckets": relative.span if relative.logarithmic else -1, "max_relative_positions": relative.max_distance, "share_att_key": relative.shared,
                "norm_rel_ebd": "layer_norm" if relative.norm else "none"}
    return out


FAMILY = base.Family(NAME, ("deberta-v2",), "DebertaV2ForMaskedLM", read, write, TABLE, rotary=False)
