"""What a checkpoint is: sum types for layers, no arrays, no computing choices (those are `Compute`) and no mesh (that is `Layout`).

A model is a tuple of layers: `prefix`, then `cycle` repeated `repeats` times (scanned), then `suffix`. A layer is a mixer, a feed-forward and a wiring. New numbers make a
row of data; a new kind of layer makes a dataclass here and a module in `models/`.
"""
from __future__ import annotations

import dataclasses as dc
from typing import Literal, get_args

from llmjax.core.errors import ConfigError, nearest

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu_squared"]


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


@dc.dataclass(frozen=True)
class Proportional:
    """The slowest pairs of each head stand still: the first `fraction` of the frequencies of the whole head, the others 0; all divided by `factor` (Gemma 4; as in transformers)."""
    fraction: float
    factor: float = 1.0


RopeScaling = LinearScaling | DynamicNtk | Yarn | Llama3Scaling | Proportional


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
    gate: bool = False                 # what a head answers, times sigmoid of a projection of the layer's input
    v_norm: Norm | None = None         # on values, over each head
    shared_kv: bool = False            # one projection makes keys and values (before their norms)
    lends: str | None = None           # the name under which later layers may see its keys and values
    borrows: str | None = None         # it has no keys and values but those that an earlier layer lends under this name
    globals: int | None = None         # with a window: so many tokens at the start of a document see, and are seen by, all of it (Longformer, BigBird)


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


Recurrent = GatedDelta | LinearAttention       # what they remember is a state, not every token
Mixer = Attention | Recurrent
FeedForward = Mlp | MixtureOfExperts
Wiring = Literal["pre", "post", "sandwich", "parallel", "parallel_two_norms"]


@dc.dataclass(frozen=True)
class Layer:
    mixer: Mixer
    ffn: FeedForward
    wiring: Wiring = "pre"
    residual_scale: float = 1.0
    output_scale: bool = False         # a learned number times all that the layer answers


@dc.dataclass(frozen=True)
class LayerInputs:
    """Every layer gets an input of its own: a row of a second embedding of width `dim` per layer, and a projection of the first (Gemma 3n and 4)."""
    vocab_size: int
    dim: int


@dc.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only language model. Layers in order: prefix, cycle × repeats, suffix."""
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
    layer_inputs: LayerInputs | None = None

    def __post_init__(self):
        if not self.layers:
            raise ConfigError("a model needs at least one layer: give cycle and repeats, or prefix")
        if bool(self.cycle) != bool(self.repeats):
            raise ConfigError(f"cycle has {len(self.cycle)} layers and repeats is {self.repeats}: give both or neither")
        for i, layer in enumerate(self.prefix + self.cycle + self.suffix):
            check_layer(layer, f"layer {i}")
        check_lending(self)

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
    if isinstance(mixer, GatedDelta):
        if mixer.heads % mixer.key_heads:
            raise ConfigError(f"{where}: heads={mixer.heads} is not a multiple of key_heads={mixer.key_heads}")
        if mixer.width < 2:
            raise ConfigError(f"{where}: width={mixer.width}; the convolution needs at least 2 tokens")
        if mixer.activation not in get_args(Activation):
            raise ConfigError(f"{where}: activation {mixer.activation!r} is unknown" + nearest(mixer.activation, get_args(Activation)))
    elif mixer.heads % mixer.kv_heads:
        raise ConfigError(f"{where}: heads={mixer.heads} is not a multiple of kv_heads={mixer.kv_heads}")
    if not isinstance(mixer, GatedDelta) and mixer.rope and int(mixer.head_dim * mixer.rope.fraction) % 2:
        raise ConfigError(f"{where}: rotary positions need an even number of dimensions, head_dim={mixer.head_dim} × fraction={mixer.rope.fraction} has {int(mixer.head_dim * mixer.rope.fraction)}")
    if isinstance(mixer, Attention) and mixer.globals is not None and (mixer.globals < 1 or mixer.window is None or mixer.sinks):
        raise ConfigError(f"{where}: globals={mixer.globals} with window={mixer.window}, sinks={mixer.sinks}: global tokens go with a window, without sinks, and there is at least one")
    if isinstance(layer.ffn, MixtureOfExperts) and not 1 <= layer.ffn.top_k <= layer.ffn.experts:
        raise ConfigError(f"{where}: top_k={layer.ffn.top_k} must lie between 1 and experts={layer.ffn.experts}")


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
    return dc.replace(config, prefix=config.layers, cycle=(), repeats=0, suffix=())
