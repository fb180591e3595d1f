"""What families of encoders share: heads by the class that config.json names, labels, and the numbers and tensors of BERT and its kin."""
from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from llmjax.checkpoint.families import base
from llmjax.checkpoint.fields import SPELLINGS, Fields
from llmjax.checkpoint.table import Row
from llmjax.core.errors import CheckpointError
from llmjax.core.model_config import Attention, ClassifierHead, Head, Layer, MaskedHead, Mlp, ModelConfig, Norm, TokenHead

Heads = Mapping[str, Head]               # the class's name -> its head
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")


def read_labels(f: Fields) -> tuple[str, ...]:
    """Names of the labels in order of their ids: id2label, or num_labels (2 unless given) of transformers' own names."""
    given = f.value("id2label", None)
    if given:
        return tuple(str(given[i]) for i in sorted(given, key=int))
    return tuple(f"LABEL_{i}" for i in range(f.count("num_labels", 2)))


def read_head(f: Fields, heads: Heads) -> Head:
    """The head of the class in `architectures`; the first of `heads` where none is named. Raises CheckpointError for another class."""
    names = f.value("architectures", None) or [next(iter(heads))]
    if names[0] not in heads:
        raise CheckpointError(f"{f.where}: the architecture {names[0]!r} is not read; of this family are {', '.join(heads)}")
    return heads[names[0]]


def write_head(config: ModelConfig, heads: Callable[[tuple[str, ...]], Heads]) -> dict[str, Any]:
    """`architectures` and the labels. Raises CheckpointError where the family has no class with such a head."""
    labels = config.head.labels if isinstance(config.head, ClassifierHead | TokenHead) else ()
    known = heads(labels)
    same = [name for name, head in known.items() if head == config.head] or [name for name, head in known.items() if type(head) is type(config.head)]
    if not same:
        raise CheckpointError(f"a {config.family} checkpoint has no class with a {type(config.head).__name__}; it has {', '.join(known)}")
    names = {"id2label": {str(i): name for i, name in enumerate(labels)}, "label2id": {name: i for i, name in enumerate(labels)}} if labels else {}
    return {"architectures": [same[0]], **names}


def read_bert(f: Fields, family: str, head: Head, offset: int = 0, **more: Any) -> ModelConfig:
    """BERT's layers: LayerNorm after each sum, biases everywhere, learned positions (of which `offset` rows are skipped) and token types."""
    dim, count, rows = f.count("hidden_size"), f.count("num_attention_heads"), f.count("max_position_embeddings", 512)
    f.ignore(*DROPOUTS, "classifier_dropout")
    f.fixed(is_decoder=False, add_cross_attention=False, position_embedding_type="absolute")
    mixer = Attention(count, count, base.head_dim(f, dim, count), None, causal=False, qkv_bias=True, out_bias=True)
    layer = Layer(mixer, Mlp(f.count("intermediate_size"), f.activation("hidden_act", "gelu"), gated=False, bias=True), "after_sum")
    norm = Norm("layer", f.number("layer_norm_eps", 1e-12), bias=True)
    return base.model(f, family, [layer] * f.count("num_hidden_layers"), dim=dim, norm=norm, tied=True, context=rows - offset, learned_positions=rows, position_offset=offset,
                      token_types=f.value("type_vocab_size", 2) or None, embed_norm=True, final_norm=False, head=head, head_bias=isinstance(head, MaskedHead), **more)


def write_bert(config: ModelConfig) -> dict[str, Any]:
    shared = base.common(config)
    kept = {name: x for name, x in shared.items() if name not in ("rms_norm_eps", "num_key_value_heads", "head_dim", "max_position_embeddings")}
    return {**kept, "max_position_embeddings": config.learned_positions, "type_vocab_size": config.token_types or 0, "layer_norm_eps": config.norm.eps,
            "hidden_act": {"gelu_pytorch_tanh": "gelu_new"}.get(shared["hidden_act"], shared["hidden_act"])}


def activation_name(config: ModelConfig) -> str:
    return SPELLINGS[base.first(config).ffn.activation]


def dense(name: str, path: str, pattern: str = "o i -> i o", bias: str = "") -> tuple[Row, ...]:
    """A torch Linear: its weight and (where the model has one) its bias. `bias`: the pattern of the bias."""
    return Row(f"{name}.weight", path, pattern), Row(f"{name}.bias", f"{path}_bias", bias)


def norm(name: str, path: str) -> tuple[Row, ...]:
    return base.with_biases(Row(f"{name}.weight", f"{path}/scale"))


def attention(names: Iterable[str], ours: str = "mixer") -> tuple[Row, ...]:
    """The four Linears of an attention: queries, keys, values, output."""
    *inputs, output = names
    rows = [row for name, letter in zip(inputs, "qkv", strict=True) for row in dense(name, f"{ours}/{letter}", "(n h) d -> d n h", "(n h) -> n h")]
    return (*rows, *dense(output, f"{ours}/o", "d (n h) -> n h d"))


def stacked(stack: str, *rows: Row) -> tuple[Row, ...]:
    """The same rows for the layers of another stack."""
    return tuple(dc.replace(row, stack=stack) for row in rows)


def bert_rows(lead: str, qkv: tuple[str, ...] = ("query", "key", "value")) -> tuple[Row, ...]:
    """Embeddings and layers of BERT and its kin; names begin with `lead`. qkv: what the three projections are called."""
    L, E = lead + "encoder.layer.{l}.", lead + "embeddings."
    return (Row(E + "word_embeddings.weight", "embed/table"), Row(E + "position_embeddings.weight", "positions/table"), Row(E + "token_type_embeddings.weight", "types/table"),
            *norm(E + "LayerNorm", "embed_norm"),
            *attention((*(L + f"attention.self.{name}" for name in qkv), L + "attention.output.dense")), *norm(L + "attention.output.LayerNorm", "norm_mixer_out"),
            *dense(L + "intermediate.dense", "ffn/up"), *dense(L + "output.dense", "ffn/down"), *norm(L + "output.LayerNorm", "norm_ffn_out"))


RENAMES = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))      # TensorFlow's names in BERT's first checkpoints
SCORES = (*dense("classifier", "tagger/out"), *dense("qa_outputs", "span/out"))
