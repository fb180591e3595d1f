"""What a checkpoint is: sum types for layers, no arrays, no computing choices (those are `Compute`) and no mesh (that is `Layout`).

A model is a tuple of layers: `prefix`, then `cycle` repeated `repeats` times (scanned), then `suffix`. A layer is a mixer, a feed-forward and a wiring. New numbers make a
row of data; a new kind of layer makes a dataclass here and a module in `models/`.
"""
from __future__ import annotations

import dataclasses as dc
from typing import Literal, get_args

from llmjax.core.errors import ConfigError, nearest

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu_squared", "tanh"]


@dc.dataclass(frozen=True)
class Norm:
    """RMSNorm (Zhang & Sennrich 2019) or LayerNorm (Ba et al. 2016). The scale applied is `offset + parameter` (Gemma keeps its scales around 0 and has offset 1)."""
    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    offset: float = 0.0
    scale: bool = True
    bias: bool = False


@dc.dataclass(frozen=True)
class LinearScaling:
    """Positions divided by `factor` (Chen et al. 2023)."""
    factor: float


@dc.dataclass(frozen=True)
class DynamicNtk:
    """The rotary base grows with the sequence once it is longer than `context` (dynamic NTK; as in transformers)."""
    factor: float
    context: int


@dc.dataclass(frozen=True)
class Yarn:
    """NTK-by-parts interpolation with a temperature on attention (Peng et al. 2023, arXiv:2309.00071)."""
    factor: float
    context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dc.dataclass(frozen=True)
class Llama3Scaling:
    """Long wavelengths are divided by `factor`, short ones kept, a ramp between (Llama 3.1)."""
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    context: int


RopeScaling = LinearScaling | DynamicNtk | Yarn | Llama3Scaling


@dc.dataclass(frozen=True)
class Rope:
    """Rotary positions (Su et al. 2021) on the first `fraction` of each head; pairs are (i, i + d/2), or neighbours when `interleaved`."""
    theta: float = 10_000.0
    fraction: float = 1.0
    interleaved: bool = False
    scaling: RopeScaling | None = None


@dc.dataclass(frozen=True)
class QKNorm:
    """A norm on queries and keys before the rotation, over each head or over all heads at once."""
    norm: Norm = Norm()
    over: Literal["head", "full"] = "head"


@dc.dataclass(frozen=True)
class RelativeBuckets:
    """One learned number per head and bucket of key position - query position, added to the scores; one table for all layers of a stack (T5; Raffel et al. 2020, section 2.1).
    Near distances have a bucket each, far ones share logarithmically; where attention is not causal, half of the buckets look ahead."""
    buckets: int = 32
    max_distance: int = 128


@dc.dataclass(frozen=True)
class Disentangled:
    """DeBERTa's attention (He et al. 2021, eq. 4): content to position and position to content beside content to content, all over sqrt(head_dim × number of terms).
    2 × `span` learned rows stand for the distances, near ones a row each; from span / 2 on they share logarithmically up to `max_distance` where `logarithmic`."""
    span: int
    max_distance: int
    logarithmic: bool = True
    content_to_position: bool = True
    position_to_content: bool = True
    shared: bool = True                # the rows pass through the layer's own query and key projections
    norm: bool = True                  # a norm on the rows

    @property
    def terms(self) -> int:
        return 1 + self.content_to_position + self.position_to_content


Relative = RelativeBuckets | Disentangled


@dc.dataclass(frozen=True)
class Attention:
    """Multi-head, grouped-query (kv_heads < heads) or multi-query (kv_heads = 1) attention."""
    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope | None = Rope()
    window: int | None = None          # a query sees this many positions, its own included
    causal: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: QKNorm | None = None
    scale: float | None = None         # None: head_dim ** -0.5
    softcap: float | None = None       # cap * tanh(score / cap)
    sinks: bool = False                # one learned logit per head that takes part in the softmax and carries no value
    relative: Relative | None = None


@dc.dataclass(frozen=True)
class Mlp:
    hidden: int
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False


@dc.dataclass(frozen=True)
class MixtureOfExperts:
    """Top-k routing over `experts` gated MLPs of width `hidden`; `shared` is the width of an MLP every token passes (None: there is none)."""
    experts: int
    top_k: int
    hidden: int
    activation: Activation = "silu"
    shared: int | None = None
    shared_gate: bool = False          # the shared MLP's output times sigmoid(x @ w)
    renormalize: bool = True           # the chosen experts' probabilities sum to 1
    scale: float = 1.0


Mixer = Attention
FeedForward = Mlp | MixtureOfExperts
Wiring = Literal["pre", "post", "sandwich", "parallel", "parallel_two_norms", "after_sum", "pre_ffn"]


@dc.dataclass(frozen=True)
class Layer:
    mixer: Mixer
    ffn: FeedForward
    wiring: Wiring = "pre"
    residual_scale: float = 1.0
    cross: Attention | None = None     # attention to an encoder's output, between mixer and feed-forward, with a norm of its own


@dc.dataclass(frozen=True)
class Transform:
    """A dense layer of the model's width, an activation and perhaps a norm: what stands before the last matrix of many heads."""
    activation: Activation
    bias: bool = True
    norm: bool = False


@dc.dataclass(frozen=True)
class LanguageHead:
    """Logits of the vocabulary; its numbers (tied, head_bias, logit_scale, logit_softcap) stand in ModelConfig."""


@dc.dataclass(frozen=True)
class MaskedHead:
    """Logits of the vocabulary for every token after a transform (BERT); ModelConfig.tied and head_bias say how. spare_bias: a second bias that is kept and changes nothing."""
    transform: Transform
    spare_bias: bool = False


@dc.dataclass(frozen=True)
class ClassifierHead:
    """Scores of `labels` for a whole text, out of its first token or the mean of all."""
    labels: tuple[str, ...]
    transform: Transform
    pooling: Literal["first", "mean"] = "first"


@dc.dataclass(frozen=True)
class TokenHead:
    """Scores of `labels` for every token."""
    labels: tuple[str, ...]
    transform: Transform | None = None


@dc.dataclass(frozen=True)
class SpanHead:
    """For every token, the scores that an answer starts and that it ends there."""
    transform: Transform | None = None


@dc.dataclass(frozen=True)
class ReplacedHead:
    """For every token, the score that it was replaced by another (ELECTRA's discriminator)."""
    transform: Transform


@dc.dataclass(frozen=True)
class NoHead:
    """Hidden states; a pooler's output (of the first token) goes to `aux`."""
    pooler: Transform | None = None


Head = LanguageHead | MaskedHead | ClassifierHead | TokenHead | SpanHead | ReplacedHead | NoHead


@dc.dataclass(frozen=True)
class ModelConfig:
    """A model over tokens. Layers in order: prefix, cycle × repeats, suffix. With the language head it is a decoder, with an encoder too an encoder-decoder, with any other head an
    encoder."""
    vocab_size: int
    dim: int
    cycle: tuple[Layer, ...] = ()
    repeats: int = 0
    prefix: tuple[Layer, ...] = ()
    suffix: tuple[Layer, ...] = ()
    norm: Norm = Norm()
    tied: bool = False                 # the head is the embedding
    embed_scale: float = 1.0
    embed_norm: bool = False
    learned_positions: int | None = None    # rows of a learned position table
    final_norm: bool = True
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    head_bias: bool = False
    context: int = 2048                # the longest sequence the model is meant for
    bos_token: int | None = None
    end_tokens: tuple[int, ...] = ()   # generation stops after any of them
    pad_token: int | None = None
    family: str = "llama"              # which checkpoint table writes it
    head: Head = LanguageHead()
    token_types: int | None = None     # rows of a table of segment types (BERT); type 0 unless given
    position_offset: int = 0           # rows of the learned position table that are skipped (RoBERTa, BART)
    embed_dim: int | None = None       # width of the embeddings where a projection follows them (ELECTRA); None: dim
    embed_proj_bias: bool = False
    encoder: ModelConfig | None = None    # what the layers' cross-attention looks at; it shares the embedding
    decoder_start: int | None = None   # the token an encoder-decoder's answer starts from

    def __post_init__(self):
        if not self.layers:
            raise ConfigError("a model needs at least one layer: give cycle and repeats, or prefix")
        if bool(self.cycle) != bool(self.repeats):
            raise ConfigError(f"cycle has {len(self.cycle)} layers and repeats is {self.repeats}: give both or neither")
        for i, layer in enumerate(self.prefix + self.cycle + self.suffix):
            check_layer(layer, f"layer {i}")
            if layer.cross and not self.encoder:
                raise ConfigError(f"layer {i}: cross-attention looks at an encoder, and the model has none: give `encoder`, or leave `cross` out")
        kinds = {layer.mixer.relative for layer in self.layers if layer.mixer.relative}
        if len(kinds) > 1 or any(layer.mixer.window for layer in self.layers if layer.mixer.relative):
            raise ConfigError("relative positions are of one kind in a stack, and its layers have no window")

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.prefix + self.cycle * self.repeats + self.suffix


def check_layer(layer: Layer, where: str) -> None:
    """Raises ConfigError where numbers cannot go together or a name is unknown."""
    if layer.wiring not in get_args(Wiring):
        raise ConfigError(f"{where}: wiring {layer.wiring!r} is unknown" + nearest(layer.wiring, get_args(Wiring)))
    if layer.ffn.activation not in get_args(Activation):
        raise ConfigError(f"{where}: activation {layer.ffn.activation!r} is unknown" + nearest(layer.ffn.activation, get_args(Activation)))
    mixer = layer.mixer
    if layer.cross and layer.wiring not in ("pre", "after_sum"):
        raise ConfigError(f"{where}: wiring {layer.wiring!r} has no place for cross-attention; pre and after_sum have")
    if mixer.heads % mixer.kv_heads:
        raise ConfigError(f"{where}: heads={mixer.heads} is not a multiple of kv_heads={mixer.kv_heads}")
    if mixer.rope and int(mixer.head_dim * mixer.rope.fraction) % 2:
        raise ConfigError(f"{where}: rotary positions need an even number of dimensions, head_dim={mixer.head_dim} × fraction={mixer.rope.fraction} has {int(mixer.head_dim * mixer.rope.fraction)}")
    if isinstance(layer.ffn, MixtureOfExperts) and not 1 <= layer.ffn.top_k <= layer.ffn.experts:
        raise ConfigError(f"{where}: top_k={layer.ffn.top_k} must lie between 1 and experts={layer.ffn.experts}")


def find_cycle(layers: tuple[Layer, ...], longest: int = 16) -> dict:
    """Splits layers into prefix, cycle, repeats and suffix such that the most layers are scanned in the shortest cycle. -> fields of ModelConfig."""
    best = dict(prefix=tuple(layers), cycle=(), repeats=0, suffix=())
    covered = 0
    for length in range(1, min(longest, len(layers)) + 1):
        for start in range(len(layers) - length + 1):
            cycle, repeats = tuple(layers[start:start + length]), 1
            while tuple(layers[start + repeats * length:start + (repeats + 1) * length]) == cycle:
                repeats += 1
            if repeats * length > covered and (repeats > 1 or len(layers) == 1):
                covered = repeats * length
                best = dict(prefix=tuple(layers[:start]), cycle=cycle, repeats=repeats, suffix=tuple(layers[start + repeats * length:]))
    return best


def unrolled(config: ModelConfig) -> ModelConfig:
    """The same model with every layer apart (nothing scanned): the form decoding wants."""
    return dc.replace(config, prefix=config.layers, cycle=(), repeats=0, suffix=(), encoder=config.encoder and unrolled(config.encoder))
