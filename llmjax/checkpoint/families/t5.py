"""T5 (Raffel et al. 2020), and T5 v1.1, Flan-T5, UL2 (gated, the head its own matrix): RMSNorm, no biases, no attention scale, one table of relative positions per stack.
T5EncoderModel (Sentence-T5, the text part of picture models) is the encoder alone."""
from dataclasses import replace
from typing import Any

from llmjax.checkpoint.families import base, encoders
from llmjax.checkpoint.fields import ACTIVATIONS, SPELLINGS, Fields
from llmjax.checkpoint.table import Row, Table
from llmjax.core.errors import CheckpointError, nearest
from llmjax.core.model_config import Attention, LanguageHead, Layer, Mlp, ModelConfig, NoHead, Norm
from llmjax.core.positions import RelativeBuckets


def stack(side: str, last: int, ours: str = "") -> tuple[Row, ...]:
    """The rows of one side, whose feed-forward is sublayer `last` of a block."""
    B, lead = side + ".block.{l}.layer.", f"{ours}/" if ours else ""
    ffn = f"{B}{last}.DenseReluDense."
    rows = (*encoders.attention(f"{B}0.SelfAttention.{name}" for name in "qkvo"), Row(B + "0.layer_norm.weight", "norm_mixer/scale"),
            Row(f"{B}{last}.layer_norm.weight", "norm_ffn/scale"),
            Row(ffn + "wi.weight", "ffn/up", "f d -> d f", without="ffn/gate"), Row(ffn + "wi_0.weight", "ffn/gate", "f d -> d f"), Row(ffn + "wi_1.weight", "ffn/up", "f d -> d f"),
            Row(ffn + "wo.weight", "ffn/down", "d f -> f d"))
    return (*encoders.stacked(ours, *rows), Row(f"{side}.final_layer_norm.weight", f"{lead}final_norm/scale"),
            Row(f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", f"{lead}relative/table"))


COPIES = tuple((name, "shared.weight") for name in ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"))
ENCODER = Table((Row("shared.weight", "embed/table"), *stack("encoder", 1)), copies=COPIES[1:2])
D = "decoder.block.{l}.layer."
TABLE = Table((
    Row("shared.weight", "embed/table"), Row("lm_head.weight", "head/kernel", "v d -> d v"), *stack("decoder", 2), *stack("encoder", 1, "encoder"),
    *encoders.attention((f"{D}1.EncDecAttention.{name}" for name in "qkvo"), "cross"), Row(D + "1.layer_norm.weight", "norm_cross/scale"),
    # a table in the first release's cross-attention that was never used
), extras=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
    copies=COPIES)
HEADS: encoders.Heads = {"T5ForConditionalGeneration": LanguageHead(), "T5EncoderModel": NoHead()}


def read(f: Fields) -> ModelConfig:
    head = encoders.read_head(f, HEADS)
    f.ignore("dropout_rate", "initializer_factor", "classifier_dropout")
    f.fixed(is_decoder=False)
    dim, size, heads, layers = f.count("d_model", 512), f.count("d_kv", 64), f.count("num_heads", 8), f.count("num_layers", 6)
    kind = f.value("feed_forward_proj", "relu")
    name = {"gated-gelu": "gated-gelu_new"}.get(kind, kind).removeprefix("gated-")
    if name not in ACTIVATIONS:
        raise CheckpointError(f"{f.where}: feed_forward_proj={kind!r} is not known" + nearest(str(kind), ["relu", "gated-gelu", "gated-silu"]))
    # these two usually repeat feed_forward_proj, and win where they do not
    ffn = Mlp(f.count("d_ff", 2048), f.activation("dense_act_fn", name), gated=f.flag("is_gated_act", kind.startswith("gated-")))
    mixer = Attention(heads, heads, size, None, scale=1.0, relative=RelativeBuckets(f.count("relative_attention_num_buckets", 32), f.count("relative_attention_max_distance", 128)))
    both = dict(dim=dim, norm=Norm(eps=f.number("layer_norm_epsilon", 1e-6)), tied=True, context=f.count("n_positions", 512))
    inner = base.model(f, "t5", [Layer(replace(mixer, causal=False), ffn)] * layers, head=NoHead(), **both)
    if isinstance(head, NoHead):
        f.ignore("num_decoder_layers", "scale_decoder_outputs")
        return inner
    # where the head is the embedding its logits are scaled; transformers 5 says so apart from being tied
    scaled = f.flag("scale_decoder_outputs", inner.tied)
    start = f.ids("decoder_start_token_id") or (inner.pad_token or 0,)
    return base.model(f, "t5", [Layer(mixer, ffn, cross=replace(mixer, relative=None, causal=False))] * f.count("num_decoder_layers", layers), **both, encoder=inner,
                      logit_scale=dim ** -0.5 if scaled else 1.0, decoder_start=start[0])


def write(config: ModelConfig) -> dict[str, Any]:
    shared, first, inner = base.common(config), base.first(config), config.encoder or config
    name = {"gelu_pytorch_tanh": "gelu_new"}.get(SPELLINGS[first.ffn.activation], SPELLINGS[first.ffn.activation])
    spec = first.mixer.relative or RelativeBuckets()
    kept = {k: shared[k] for k in ("vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")}
    return {**kept, **encoders.write_head(config, lambda _: HEADS), "d_model": config.dim, "d_kv": first.mixer.head_dim, "d_ff": first.ffn.hidden, "num_heads": first.mixer.heads,
            "num_layers": len(inner.layers), "num_decoder_layers": len(config.layers), "layer_norm_epsilon": config.norm.eps,
            "feed_forward_proj": ("gated-" if first.ffn.gated else "") + name, "dense_act_fn": name, "is_gated_act": first.ffn.gated,
            "relative_attention_num_buckets": spec.buckets, "relative_attention_max_distance": spec.max_distance, "n_positions": config.context,
            "is_encoder_decoder": config.encoder is not None, "scale_decoder_outputs": config.logit_scale != 1.0, "decoder_start_token_id": config.decoder_start}


FAMILY = base.Family("t5", ("t5",), "T5ForConditionalGeneration", read, write, lambda config: TABLE if config.encoder else ENCODER, rotary=False)
