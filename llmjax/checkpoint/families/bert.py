"""BERT (Devlin et al. 2019) and what says model_type "bert": MiniLM, BGE, E5, all-MiniLM-L6-v2."""
from dataclasses import replace

from llmjax.checkpoint.families import base, encoders
from llmjax.checkpoint.fields import Fields
from llmjax.checkpoint.table import Row, Table
from llmjax.core.model_config import Activation, ClassifierHead, MaskedHead, ModelConfig, NoHead, SpanHead, TokenHead, Transform

TABLE = Table((
    *encoders.bert_rows("bert."), *encoders.SCORES,
    *encoders.dense("bert.pooler.dense", "classifier/dense"), *encoders.dense("classifier", "classifier/out"), *encoders.dense("bert.pooler.dense", "pooler/dense"),
    *encoders.dense("bert.pooler.dense", "masked/text/dense"), *encoders.dense("cls.seq_relationship", "masked/text/out"),
    *encoders.dense("cls.predictions.transform.dense", "masked/dense"), *encoders.norm("cls.predictions.transform.LayerNorm", "masked/norm"),
    Row("cls.predictions.bias", "masked/bias"), Row("cls.predictions.decoder.weight", "masked/kernel", "v d -> d v"), Row("cls.predictions.decoder.bias", "masked/out_bias"),
), base="bert.", renames=encoders.RENAMES, extras=(r"bert\.embeddings\.position_ids", r"bert\.pooler\..*", r"cls\.seq_relationship\..*"),
   copies=(("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"), ("cls.predictions.decoder.bias", "cls.predictions.bias")))


NEXT = ("next", "random")              # whether the second text follows the first


def heads(activation: Activation, tied: bool, labels: tuple[str, ...]) -> encoders.Heads:
    pooler, masked = Transform("tanh"), MaskedHead(Transform(activation, norm=True), spare_bias=not tied)
    return {"BertModel": NoHead(pooler), "BertForMaskedLM": masked, "BertForPreTraining": replace(masked, text=ClassifierHead(NEXT, pooler)),
            "BertForSequenceClassification": ClassifierHead(labels, pooler), "BertForTokenClassification": TokenHead(labels), "BertForQuestionAnswering": SpanHead()}


def read(f: Fields) -> ModelConfig:
    # settings of a pooler that the first multilingual checkpoints name and nothing reads
    f.ignore("directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type")
    head = encoders.read_head(f, heads(f.activation("hidden_act", "gelu"), f.flag("tie_word_embeddings", True), encoders.read_labels(f)))
    return encoders.read_bert(f, "bert", head)


def write(config: ModelConfig) -> dict:
    return {**encoders.write_bert(config), **encoders.write_head(config, lambda labels: heads(base.first(config).ffn.activation, config.tied, labels))}


FAMILY = base.Family("bert", ("bert",), "BertForMaskedLM", read, write, TABLE, rotary=False)
