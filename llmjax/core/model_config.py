"""What a checkpoint is: sum types for layers, no arrays, no computing choices (those are `Compute`) and no mesh (that is `Layout`).

A model is a tuple of layers: `prefix`, then `cycle` repeated `repeats` times (scanned), then `suffix`. A layer is a mixer, a feed-forward and a wiring. New numbers make a
row of data; a new kind of layer makes a dataclass here and a module in `models/`.
"""
from __future__ import annotations

import dataclasses as dc
from typing import Literal, get_args

from llmjax.core.errors import ConfigError, nearest
from llmjax.core.positions import Alibi, LongRope, Relative, Rope

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu_squared", "tanh"]
MAX_CHUNKS = 1 << 12                   # chunks of a chunked layer in one sequence: a segment id and a chunk share 31 bits


@dc.dataclass(frozen=True)
class Norm:
    """RMSNorm (Zhang & Sennrich 2019) or LayerNorm (Ba et al. 2016). The scale applied is `offset + parameter` (Gemma keeps its scales around 0 and has offset 1)."""
    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    offset: float = 0.0
    scale: bool = True
    bias: bool = False


@dc.dataclass(frozen=True)
class QKNorm:
    """A norm on queries and keys: over a head with the scales shared by all heads ("head") or its own ("each"), or over all heads at once ("full")."""
    norm: Norm = Norm()
    over: Literal["head", "each", "full"] = "head"
    rotated: bool = False              # after the rotation, not before


@dc.dataclass(frozen=True)
class Temperature:
    """Queries times 1 + beta · log(1 + floor((position + offset) / length)): attention stays sharp over long texts (Nakanishi 2025, arXiv:2501.19399; Llama 4, Ministral 3)."""
    beta: float
    length: float
    offset: int = 0


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
    chunked: bool = False              # of the window only what lies in the query's own chunk: positions are cut into chunks of `window` (Llama 4)
    clip: float | None = None          # queries, keys and values are held within ± clip
    alibi: Alibi | None = None
    temperature: Temperature | None = None
    relative: Relative | None = None
    gate: bool = False                 # what a head answers, times sigmoid of a projection of the layer's input
    v_norm: Norm | None = None         # on values, over each head
    shared_kv: bool = False            # one projection makes keys and values (before their norms)
    lends: str | None = None           # the name under which later layers may see its keys and values
    borrows: str | None = None         # it has no keys and values but those that an earlier layer lends under this name
    globals: int | None = None         # with a window: so many tokens at the start of a document see, and are seen by, all of it (Longformer, BigBird)


@dc.dataclass(frozen=True)
class LatentAttention:
    """Keys and values of all heads out of one small latent vector a token, which is what a cache keeps (DeepSeek-V2, arXiv:2405.04434, section 2.1). A head's query and key are
    `nope_dim` numbers without and `rope_dim` with rotary positions, the latter of keys shared by all heads; `query_rank`: queries come out of a latent vector too."""
    heads: int
    latent: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    rope: Rope = Rope(interleaved=True)
    query_rank: int | None = None
    bias: bool = False                 # on the products into the latents and out of the heads
    scale: float | None = None         # None: (nope_dim + rope_dim) ** -0.5
    norm: Norm = Norm()                # of the latents
    window: int | None = None
    causal: bool = True
    softcap, chunked, globals = None, False, None          # of other attention; no fields

    @property
    def head_dim(self) -> int:
        """Of a query: what scores cost."""
        return self.nope_dim + self.rope_dim

    @property
    def kv_heads(self) -> int:
        """One latent serves all heads."""
        return 1


@dc.dataclass(frozen=True)
class GatedDelta:
    """Gated delta net (Yang et al. 2024, arXiv:2412.06464): a causal convolution on queries, keys and values, the gated delta rule, a gated RMS norm on each head."""
    heads: int                         # of values and states
    key_heads: int                     # of queries and keys: each serves heads / key_heads of them
    key_dim: int
    value_dim: int
    width: int = 4                     # of the convolution
    activation: Activation = "silu"    # after the convolution


@dc.dataclass(frozen=True)
class LinearAttention:
    """Attention with the features elu(x) + 1 in place of the exponential (Katharopoulos et al. 2020, arXiv:2006.16236): no scores, a state of constant size."""
    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope | None = None


@dc.dataclass(frozen=True)
class Mlp:
    hidden: int
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False


@dc.dataclass(frozen=True)
class Groups:
    """Experts are chosen among the best `top` of `count` groups; a group is as good as its best `by` experts together (DeepSeek-V2: 1, V3: 2)."""
    count: int
    top: int
    by: int = 1


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
    score: Literal["softmax", "sigmoid"] = "softmax"
    groups: Groups | None = None
    selection_bias: bool = False       # added to the scores for choosing alone (DeepSeek-V3's balance without a loss)
    router_bias: bool = False
    bias: bool = False                 # on each expert's products
    scale_inputs: bool = False         # the gate multiplies what an expert sees, not what it answers (Llama 4)
    limit: float | None = None         # gate at most limit, up within ± limit, then (up + 1) · gate · sigmoid(1.702 gate) (gpt-oss)
    norms: Norm | None = None          # router, experts and shared MLP see the input through a norm each, the router's times dim ** -0.5; so are their two answers normed (Gemma 4)
    expert_scale: bool = False         # a learned number times each expert's gate, once the gates sum to 1


Recurrent = GatedDelta | LinearAttention       # what they remember is a state, not every token
Mixer = Attention | LatentAttention | Recurrent
FeedForward = Mlp | MixtureOfExperts
Wiring = Literal["pre", "post", "sandwich", "sandwich_open", "parallel", "parallel_two_norms", "after_sum", "pre_ffn"]


@dc.dataclass(frozen=True)
class Convolution:
    """Over `width` tokens of a layer's input, the middle one its own, then an activation; added to what the layer answers, with a norm on the sum (DeBERTa-v2's first layer)."""
    width: int
    activation: Activation


@dc.dataclass(frozen=True)
class Layer:
    mixer: Mixer
    ffn: FeedForward
    wiring: Wiring = "pre"
    residual_scale: float = 1.0
    cross: Attention | None = None     # attention to an encoder's output, between mixer and feed-forward, with a norm of its own
    output_scale: bool = False         # a learned number times all that the layer answers
    convolution: Convolution | None = None


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
class ClassifierHead:
    """Scores of `labels` for a whole text, out of its first token or the mean of all."""
    labels: tuple[str, ...]
    transform: Transform
    pooling: Literal["first", "mean"] = "first"


@dc.dataclass(frozen=True)
class MaskedHead:
    """Logits of the vocabulary for every token after a transform (BERT); ModelConfig.tied and head_bias say how. spare_bias: a second bias that is kept and changes nothing.
    text: of the whole text scores as well, which go to `aux` as `scores` (BERT's next sentence)."""
    transform: Transform
    spare_bias: bool = False
    text: ClassifierHead | None = None


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
class LayerInputs:
    """Every layer gets an input of its own: a row of a second embedding of width `dim` per layer, and a projection of the first (Gemma 3n and 4)."""
    vocab_size: int
    dim: int


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
    embed_proj_first: bool = False     # positions are added after the projection (OPT-350m), not before
    encoder: ModelConfig | None = None    # what the layers' cross-attention looks at; it shares the embedding unless encoder_embeds
    encoder_embeds: bool = False       # the encoder has an embedding of its own
    decoder_start: int | None = None   # the token an encoder-decoder's answer starts from
    layer_inputs: LayerInputs | None = None

    def __post_init__(self):
        if not self.layers:
            raise ConfigError("a model needs at least one layer: give cycle and repeats, or prefix")
        if bool(self.cycle) != bool(self.repeats):
            raise ConfigError(f"cycle has {len(self.cycle)} layers and repeats is {self.repeats}: give both or neither")
        for i, layer in enumerate(self.prefix + self.cycle + self.suffix):
            check_layer(layer, f"layer {i}")
            if layer.cross and not self.encoder:
                raise ConfigError(f"layer {i}: cross-attention looks at an encoder, and the model has none: give `encoder`, or leave `cross` out")
        mixers = self.relative_mixers
        if len({mixer.relative for mixer in mixers}) > 1 or any(mixer.window for mixer in mixers):
            raise ConfigError("relative positions are of one kind in a stack, and its layers have no window")
        check_lending(self)

    @property
    def relative_mixers(self) -> list[Attention]:
        """The attentions with relative positions, which share what they know of them."""
        return [layer.mixer for layer in self.layers if isinstance(layer.mixer, Attention) and layer.mixer.relative]

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
    if isinstance(mixer, GatedDelta):
        if mixer.heads % mixer.key_heads:
            raise ConfigError(f"{where}: heads={mixer.heads} is not a multiple of key_heads={mixer.key_heads}")
        if mixer.width < 2:
            raise ConfigError(f"{where}: width={mixer.width}; the convolution needs at least 2 tokens")
        if mixer.activation not in get_args(Activation):
            raise ConfigError(f"{where}: activation {mixer.activation!r} is unknown" + nearest(mixer.activation, get_args(Activation)))
    elif mixer.heads % mixer.kv_heads:
        raise ConfigError(f"{where}: heads={mixer.heads} is not a multiple of kv_heads={mixer.kv_heads}")
    rope, size = rotation(mixer)
    if rope and int(size * rope.fraction) % 2:
        raise ConfigError(f"{where}: rotary positions need an even number of dimensions, head_dim={size} × fraction={rope.fraction} has {int(size * rope.fraction)}")
    if rope and isinstance(rope.scaling, LongRope):
        for name, factors in (("short", rope.scaling.short), ("long", rope.scaling.long)):
            if len(factors) != int(size * rope.fraction) // 2:
                raise ConfigError(f"{where}: LongRope has {len(factors)} {name} factors, the {int(size * rope.fraction)} rotated dimensions need {int(size * rope.fraction) // 2}")
    if isinstance(mixer, Attention):
        check_attention(mixer, where)
    if layer.cross:
        check_cross(layer.cross, where)
    if layer.convolution and (layer.convolution.width < 1 or layer.convolution.width % 2 == 0):
        raise ConfigError(f"{where}: a convolution over {layer.convolution.width} tokens has no middle; give an odd width")
    if layer.convolution and (not isinstance(mixer, Attention) or mixer.causal):
        raise ConfigError(f"{where}: the convolution beside a layer sees the next tokens; it goes with attention that is not causal")
    if isinstance(layer.ffn, MixtureOfExperts):
        check_experts(layer.ffn, where)


def check_attention(mixer: Attention, where: str) -> None:
    if mixer.chunked and not mixer.window:
        raise ConfigError(f"{where}: chunked attention needs a window, the length of a chunk")
    if mixer.globals is not None and (mixer.globals < 1 or mixer.window is None):
        raise ConfigError(f"{where}: globals={mixer.globals} with window={mixer.window}: global tokens go with a window, and there is at least one")
    for one, others in (("globals", ("sinks", "alibi", "relative", "chunked")), ("alibi", ("rope", "softcap", "relative")), ("borrows", ("relative",))):
        beside = next((name for name in others if getattr(mixer, one) and getattr(mixer, name)), None)
        if beside:
            raise ConfigError(f"{where}: {one}={getattr(mixer, one)} and {beside}={getattr(mixer, beside)} cannot go together")


def check_cross(mixer: Attention, where: str) -> None:
    """Cross-attention knows heads, biases and a scale; raises ConfigError for anything else."""
    plain = Attention(mixer.heads, mixer.kv_heads, mixer.head_dim, None, causal=mixer.causal, qkv_bias=mixer.qkv_bias, out_bias=mixer.out_bias, scale=mixer.scale)
    other = next((f.name for f in dc.fields(Attention) if getattr(mixer, f.name) != getattr(plain, f.name)), None)
    if other:
        raise ConfigError(f"{where}: cross-attention has no {other}; it is {getattr(mixer, other)!r}")


def check_experts(ffn: MixtureOfExperts, where: str) -> None:
    if ffn.norms and not ffn.shared:
        raise ConfigError(f"{where}: experts with norms of their own stand beside a shared MLP: give `shared`, its width, or leave `norms` out")
    if not 1 <= ffn.top_k <= ffn.experts:
        raise ConfigError(f"{where}: top_k={ffn.top_k} must lie between 1 and experts={ffn.experts}")
    groups = ffn.groups
    if groups and (ffn.experts % groups.count or not 1 <= groups.top <= groups.count or ffn.experts // groups.count * groups.top < ffn.top_k or groups.by > ffn.experts // groups.count):
        raise ConfigError(f"{where}: {ffn.experts} experts do not divide into {groups.count} groups of which {groups.top} hold the {ffn.top_k} chosen ones")


def rotation(mixer: Mixer) -> tuple[Rope | None, int]:
    """(rotary positions, how many numbers of a query they are a part of)."""
    if isinstance(mixer, GatedDelta):
        return None, 0
    return mixer.rope, mixer.rope_dim if isinstance(mixer, LatentAttention) else mixer.head_dim


def check_lending(config: ModelConfig) -> None:
    """Raises ConfigError where a layer borrows what no earlier layer lends, or of other numbers, and where layers that know of each other would be scanned."""
    lent: dict[str, Attention] = {}
    for i, mixer in enumerate(layer.mixer for layer in config.layers):
        if not isinstance(mixer, Attention) or not (mixer.lends or mixer.borrows):
            continue
        if config.cycle:
            raise ConfigError(f"layer {i} lends or borrows keys and values: such layers stand apart, in prefix, not in cycle")
        if mixer.borrows:
            lender = lent.get(mixer.borrows)
            if lender is None:
                raise ConfigError(f"layer {i} borrows {mixer.borrows!r}, which no layer before it lends" + nearest(mixer.borrows, lent))
            for name in ("kv_heads", "head_dim", "window", "rope", "causal"):
                if getattr(mixer, name) != getattr(lender, name):
                    raise ConfigError(f"layer {i} borrows {mixer.borrows!r}: its {name}={getattr(mixer, name)} is not the lender's {getattr(lender, name)}")
            if mixer.lends:
                raise ConfigError(f"layer {i} borrows {mixer.borrows!r} and cannot lend it on")
        elif mixer.lends in lent:
            raise ConfigError(f"layer {i}: {mixer.lends!r} is lent by an earlier layer already")
        elif mixer.lends:
            lent[mixer.lends] = mixer
    if config.layer_inputs and config.cycle:
        raise ConfigError("layer_inputs differ from layer to layer: the layers stand apart, in prefix, not in cycle")


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
