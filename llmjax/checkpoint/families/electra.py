"""ELECTRA (Clark et al. 2020), generator and discriminator: BERT with narrow embeddings and a projection after them. The discriminator's head says of every token whether it was replaced."""
from llmjax.checkpoint.families import base, encoders
from llmjax.checkpoint.fields import Fields
from llmjax.checkpoint.table import Row, Table
from llmjax.core.model_config import Activation, ClassifierHead, MaskedHead, ModelConfig, NoHead, ReplacedHead, SpanHead, TokenHead, Transform

TABLE = Table((
    *encoders.bert_rows("electra."), Row("electra.embeddings_project.weight", "embed_proj/kernel", "d e -> e d"), Row("electra.embeddings_project.bias", "embed_proj/bias"),
    *encoders.dense("generator_predictions.dense", "masked/dense"), *encoders.norm("generator_predictions.LayerNorm", "masked/norm"),
    Row("generator_lm_head.bias", "masked/bias"), Row("generator_lm_head.weight", "masked/kernel", "v d -> d v"),
    *encoders.dense("classifier.dense", "classifier/dense"), *encoders.dense("classifier.out_proj", "classifier/out"),
    *encoders.dense("discriminator_predictions.dense", "detector/dense"), *encoders.dense("discriminator_predictions.dense_prediction", "detector/out"), *encoders.SCORES,
), base="electra.", renames=encoders.RENAMES, extras=(r"electra\.embeddings\.position_ids",),
   copies=(("generator_lm_head.weight", "electra.embeddings.word_embeddings.weight"),))


def heads(activation: Activation, labels: tuple[str, ...]) -> encoders.Heads:
    return {"ElectraModel": NoHead(), "ElectraForMaskedLM": MaskedHead(Transform("gelu", norm=True)), "ElectraForPreTraining": ReplacedHead(Transform(activation)),
            "ElectraForSequenceClassification": ClassifierHead(labels, Transform("gelu")), "ElectraForTokenClassification": TokenHead(labels), "ElectraForQuestionAnswering": SpanHead()}


def read(f: Fields) -> ModelConfig:
    # of a summary that multiple choice alone has
    f.ignore("summary_type", "summary_use_proj", "summary_activation", "summary_last_dropout", "summary_first_dropout")
    head = encoders.read_head(f, heads(f.activation("hidden_act", "gelu"), encoders.read_labels(f)))
    narrow, dim = f.count("embedding_size", 128), f.count("hidden_size")
    return encoders.read_bert(f, "electra", head, embed_dim=None if narrow == dim else narrow, embed_proj_bias=narrow != dim)


def write(config: ModelConfig) -> dict:
    activation = base.first(config).ffn.activation
    return {**encoders.write_bert(config), "embedding_size": config.embed_dim or config.dim, **encoders.write_head(config, lambda labels: heads(activation, labels))}


FAMILY = base.Family("electra", ("electra",), "ElectraForMaskedLM", read, write, TABLE, rotary=False)
