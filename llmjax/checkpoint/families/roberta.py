"""RoBERTa (Liu et al. 2019): BERT whose positions start after the padding token's row, and whose classifier has a dense layer of its own."""
from llmjax.checkpoint.families import base, encoders
from llmjax.checkpoint.fields import Fields
from llmjax.checkpoint.table import Row, Table
from llmjax.core.model_config import ClassifierHead, MaskedHead, ModelConfig, NoHead, SpanHead, TokenHead, Transform

TABLE = Table((
    *encoders.bert_rows("roberta."), *encoders.SCORES,
    *encoders.dense("classifier.dense", "classifier/dense"), *encoders.dense("classifier.out_proj", "classifier/out"), *encoders.dense("roberta.pooler.dense", "pooler/dense"),
    *encoders.dense("lm_head.dense", "masked/dense"), *encoders.norm("lm_head.layer_norm", "masked/norm"),
    Row("lm_head.bias", "masked/bias"), Row("lm_head.decoder.weight", "masked/kernel", "v d -> d v"), Row("lm_head.decoder.bias", "masked/out_bias"),
), base="roberta.", extras=(r"roberta\.embeddings\.position_ids", r"roberta\.pooler\..*"),
   copies=(("lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"), ("lm_head.decoder.bias", "lm_head.bias")))


def heads(prefix: str, tied: bool, labels: tuple[str, ...]) -> encoders.Heads:
    pooler = Transform("tanh")
    kinds: encoders.Heads = {"Model": NoHead(pooler), "ForMaskedLM": MaskedHead(Transform("gelu", norm=True), spare_bias=not tied), "ForSequenceClassification": ClassifierHead(labels, pooler),
             "ForTokenClassification": TokenHead(labels), "ForQuestionAnswering": SpanHead()}
    return {prefix + name: head for name, head in kinds.items()}


def family(name: str, prefix: str) -> base.Family:
    """RoBERTa under another name: model_type `name`, classes that begin with `prefix`."""
    def read(f: Fields) -> ModelConfig:
        head = encoders.read_head(f, heads(prefix, f.flag("tie_word_embeddings", True), encoders.read_labels(f)))
        start = f.ids("pad_token_id") or (1,)
        return encoders.read_bert(f, name, head, offset=start[0] + 1)

    def write(config: ModelConfig) -> dict:
        return {**encoders.write_bert(config), **encoders.write_head(config, lambda labels: heads(prefix, config.tied, labels))}
    return base.Family(name, (name,), prefix + "ForMaskedLM", read, write, TABLE, rotary=False)


FAMILY = family("roberta", "Roberta")
