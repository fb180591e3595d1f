"""DistilBERT (Sanh et al. 2019): six layers of BERT without token types and pooler."""
from llmjax.checkpoint.families import base, encoders
from llmjax.checkpoint.fields import Fields
from llmjax.checkpoint.table import Row, Table
from llmjax.core.model_config import Activation, Attention, ClassifierHead, Layer, MaskedHead, Mlp, ModelConfig, NoHead, Norm, SpanHead, TokenHead, Transform

L, E = "distilbert.transformer.layer.{l}.", "distilbert.embeddings."
TABLE = Table((
    Row(E + "word_embeddings.weight", "embed/table"), Row(E + "position_embeddings.weight", "positions/table"), *encoders.norm(E + "LayerNorm", "embed_norm"),
    *encoders.attention(L + f"attention.{name}_lin" for name in ("q", "k", "v", "out")), *encoders.norm(L + "sa_layer_norm", "norm_mixer_out"),
    *encoders.dense(L + "ffn.lin1", "ffn/up"), *encoders.dense(L + "ffn.lin2", "ffn/down"), *encoders.norm(L + "output_layer_norm", "norm_ffn_out"),
    *encoders.dense("vocab_transform", "masked/dense"), *encoders.norm("vocab_layer_norm", "masked/norm"),
    Row("vocab_projector.bias", "masked/bias"), Row("vocab_projector.weight", "masked/kernel", "v d -> d v"),
    *encoders.dense("pre_classifier", "classifier/dense"), *encoders.dense("classifier", "classifier/out"), *encoders.SCORES,
), base="distilbert.", renames=encoders.RENAMES, extras=(r"distilbert\.embeddings\.position_ids",), copies=(("vocab_projector.weight", E + "word_embeddings.weight"),))


def heads(activation: Activation, labels: tuple[str, ...]) -> encoders.Heads:
    return {"DistilBertModel": NoHead(), "DistilBertForMaskedLM": MaskedHead(Transform(activation, norm=True)), "DistilBertForSequenceClassification": ClassifierHead(labels, Transform("relu")),
            "DistilBertForTokenClassification": TokenHead(labels), "DistilBertForQuestionAnswering": SpanHead()}


def read(f: Fields) -> ModelConfig:
    # sinusoidal_pos_embds: whether the table began as sinusoids; it is a table either way
    f.ignore("qa_dropout", "seq_classif_dropout", "sinusoidal_pos_embds")
    activation, dim, count, rows = f.activation("activation", "gelu"), f.count("dim", 768), f.count("n_heads", 12), f.count("max_position_embeddings", 512)
    mixer = Attention(count, count, dim // count, None, causal=False, qkv_bias=True, out_bias=True)
    layer = Layer(mixer, Mlp(f.count("hidden_dim", 3072), activation, gated=False, bias=True), "after_sum")
    head = encoders.read_head(f, heads(activation, encoders.read_labels(f)))
    return base.model(f, "distilbert", [layer] * f.count("n_layers", 6), dim=dim, norm=Norm("layer", 1e-12, bias=True), tied=True, context=rows, learned_positions=rows, embed_norm=True,
                      final_norm=False, head=head, head_bias=isinstance(head, MaskedHead))


def write(config: ModelConfig) -> dict:
    shared, first = base.common(config), base.first(config)
    kept = {name: shared[name] for name in ("vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")}
    return {**kept, "dim": config.dim, "n_heads": first.mixer.heads, "n_layers": len(config.layers), "hidden_dim": first.ffn.hidden, "activation": encoders.activation_name(config),
            "max_position_embeddings": config.learned_positions, **encoders.write_head(config, lambda labels: heads(first.ffn.activation, labels))}


FAMILY = base.Family("distilbert", ("distilbert",), "DistilBertForMaskedLM", read, write, TABLE, rotary=False)
