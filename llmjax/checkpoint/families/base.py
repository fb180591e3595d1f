"""What every family file is made of: the `Family` record, the rows most decoders share, and the two ends of a config.json that they have in common."""
from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Callable, Sequence
from typing import Any

from llmjax.checkpoint.fields import SPELLINGS, Fields
from llmjax.checkpoint.table import Row, Table
from llmjax.core.errors import CheckpointError
from llmjax.core.model_config import Attention, LatentAttention, Layer, Mlp, ModelConfig, Norm, find_cycle, unrolled


@dc.dataclass(frozen=True)
class Family:
    """One family of checkpoints.

    name: what ModelConfig.family says. model_types: what config.json's model_type may say (the first is written). architecture: the class written.
    read: Fields of config.json -> ModelConfig. write: ModelConfig -> config.json's fields (numbers that this family cannot say are found by reading it back).
    table: the rows, or what makes them of a ModelConfig. mixer, ffn: the kind, or kinds, of mixer and feed-forward its layers have.
    rotary: whether its attention rotates (None: some may).
    """
    name: str
    model_types: tuple[str, ...]
    architecture: str
    read: Callable[[Fields], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    table: Table | Callable[[ModelConfig], Table]
    ffn: type | tuple[type, ...] = Mlp
    rotary: bool | None = True
    mixer: type | tuple[type, ...] = Attention

    def rows(self, config: ModelConfig) -> Table:
        """The table of a model of this family."""
        return self.table if isinstance(self.table, Table) else self.table(config)


L = "model.layers.{l}."
TOP = (Row("model.embed_tokens.weight", "embed/table"), Row("model.norm.weight", "final_norm/scale"), Row("lm_head.weight", "head/kernel", "v d -> d v"))
ATTENTION = (
    Row(L + "self_attn.q_proj.weight", "mixer/q", "(n h) d -> d n h"),
    Row(L + "self_attn.k_proj.weight", "mixer/k", "(k h) d -> d k h"),
    Row(L + "self_attn.v_proj.weight", "mixer/v", "(k h) d -> d k h"),
    Row(L + "self_attn.o_proj.weight", "mixer/o", "d (n h) -> n h d"),
    Row(L + "self_attn.q_proj.bias", "mixer/q_bias", "(n h) -> n h"),
    Row(L + "self_attn.k_proj.bias", "mixer/k_bias", "(k h) -> k h"),
    Row(L + "self_attn.v_proj.bias", "mixer/v_bias", "(k h) -> k h"),
    Row(L + "self_attn.o_proj.bias", "mixer/o_bias"),
)
QK_NORMS = (Row(L + "self_attn.q_norm.weight", "mixer/q_norm/scale"), Row(L + "self_attn.k_norm.weight", "mixer/k_norm/scale"))
MLP = (
    Row(L + "mlp.gate_proj.weight", "ffn/gate", "f d -> d f"), Row(L + "mlp.gate_proj.bias", "ffn/gate_bias"),
    Row(L + "mlp.up_proj.weight", "ffn/up", "f d -> d f"), Row(L + "mlp.up_proj.bias", "ffn/up_bias"),
    Row(L + "mlp.down_proj.weight", "ffn/down", "d f -> f d"), Row(L + "mlp.down_proj.bias", "ffn/down_bias"),
)
PRE = (Row(L + "input_layernorm.weight", "norm_mixer/scale"), Row(L + "post_attention_layernorm.weight", "norm_ffn/scale"))
SANDWICH = (Row(L + "input_layernorm.weight", "norm_mixer/scale"), Row(L + "post_attention_layernorm.weight", "norm_mixer_out/scale"),
            Row(L + "pre_feedforward_layernorm.weight", "norm_ffn/scale"), Row(L + "post_feedforward_layernorm.weight", "norm_ffn_out/scale"))


def plain_mlp(lead: str, up: str = "dense_h_to_4h", down: str = "dense_4h_to_h") -> tuple[Row, ...]:
    """An MLP without a gate, its biases with it, under lead + "mlp."."""
    return tuple(row for theirs, ours in ((up, "up"), (down, "down"))
                 for row in (Row(f"{lead}mlp.{theirs}.weight", f"ffn/{ours}", "o i -> i o"), Row(f"{lead}mlp.{theirs}.bias", f"ffn/{ours}_bias")))


def with_biases(*rows: Row) -> tuple[Row, ...]:
    """Norms with their biases: each row "….weight" of a scale, and the row of its bias."""
    return tuple(x for row in rows for x in (row, Row(row.name.removesuffix("weight") + "bias", str(row.path).removesuffix("scale") + "bias")))


def inverse(function: Callable[[float], float], guess: float, value: float) -> float:
    """The number near `guess` that function turns into exactly `value` (guess itself where none does); whole where it can be."""
    return next((x for x in (round(guess), guess, math.nextafter(guess, 0), math.nextafter(guess, math.inf)) if x and function(x) == value), guess)


def table(*rows: Row, **more: Any) -> Table:
    """The table of a decoder whose checkpoints start with "model.": old rotary buffers hold nothing, and a tied head may stand beside the embedding it repeats."""
    return Table((*TOP, *rows), base="model.", extras=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", *more.pop("extras", ())),
                 copies=(("lm_head.weight", "model.embed_tokens.weight"),), **more)


def model(f: Fields, family: str, layers: Sequence[Layer], *, dim: int, norm: Norm, tied: bool, context: int, apart: bool = False, **more: Any) -> ModelConfig:
    """The ModelConfig of these layers, with the vocabulary and the ids that config.json names; apart: of layers that know of each other, which cannot be scanned."""
    start, pad = f.ids("bos_token_id"), f.ids("pad_token_id")
    return ModelConfig(f.count("vocab_size"), dim, **(dict(prefix=tuple(layers)) if apart else find_cycle(tuple(layers))), norm=norm, tied=f.flag("tie_word_embeddings", tied), context=context,
                       bos_token=start[0] if start else None, end_tokens=f.ids("eos_token_id"), pad_token=pad[0] if pad else None, family=family, **more)


def head_dim(f: Fields, dim: int, heads: int) -> int:
    """The field head_dim, or hidden_size / heads where it is absent. Raises CheckpointError where that is not a whole number."""
    if dim % heads and f.values.get("head_dim") is None:
        raise CheckpointError(f"{f.where}: hidden_size={dim} is not a multiple of num_attention_heads={heads}, and there is no head_dim")
    return f.count("head_dim", dim // heads)


def kv_heads(f: Fields, heads: int, usual: int) -> int:
    """num_key_value_heads: as many as queries have where it is null, `usual` where it is absent."""
    return f.count("num_key_value_heads", heads if "num_key_value_heads" in f.values else usual)


def scale_of(scale: float, size: int) -> float | None:
    """An attention scale as ModelConfig keeps it: None where it is the usual one."""
    return None if scale == size ** -0.5 else scale


def layer_windows(f: Fields, count: int, window: int | None, usual: Callable[[int], bool]) -> list[int | None]:
    """The window of each layer, by `layer_types` or else by usual(layer). Raises CheckpointError for unknown types, another number of layers, or a window that is not given."""
    kinds = f.value("layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if usual(i) else "full_attention" for i in range(count)]
    if len(kinds) != count:
        raise CheckpointError(f"{f.where}: layer_types names {len(kinds)} layers, num_hidden_layers is {count}")
    for kind in kinds:
        if kind not in ("sliding_attention", "full_attention"):
            raise CheckpointError(f"{f.where}: the layer type {kind!r} is unknown; known: full_attention, sliding_attention")
        if kind == "sliding_attention" and window is None:
            raise CheckpointError(f"{f.where}: layer_types names sliding layers, but sliding_window is null")
    return [window if kind == "sliding_attention" else None for kind in kinds]


def mixers(config: ModelConfig) -> list[Any]:
    """The mixer of each layer; of which kinds they are the family has said (Family.mixer)."""
    return [layer.mixer for layer in config.layers]


def layer_types(config: ModelConfig) -> list[str]:
    return ["full_attention" if mixer.window is None else "sliding_attention" for mixer in mixers(config)]


def widest(config: ModelConfig) -> int | None:
    """The window of the sliding layers (reading the written config back finds it if they differ)."""
    return next((mixer.window for mixer in mixers(config) if mixer.window is not None), None)


def first(config: ModelConfig) -> Any:
    """The layer whose numbers are written (reading the written config back finds it if others differ)."""
    return config.layers[0]


def text_part(f: Fields, read: Callable[[Fields], ModelConfig]) -> ModelConfig:
    """The text model of a config.json that holds one beside a vision tower, as `text_config`; of one that does not, the whole."""
    if "text_config" not in f.values:
        return read(f)
    outer = {k: v for k, v in f.values.items() if k in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")}
    text = Fields({**outer, **f.value("text_config")}, f"{f.where}: text_config")
    f.ignore(*f.values)                     # what stands beside text_config is about pictures
    config = read(text)
    text.finish()
    return config


def common(config: ModelConfig, activation: str = "hidden_act", mixer: Attention | None = None) -> dict[str, Any]:
    """The fields that most families write; mixer: the attention whose heads are written (the first layer's unless given)."""
    top = first(config)
    mixer = mixer or top.mixer
    ends = list(config.end_tokens)
    return {"vocab_size": config.vocab_size, "hidden_size": config.dim, "intermediate_size": top.ffn.hidden, "num_hidden_layers": len(config.layers),
            "num_attention_heads": mixer.heads, "num_key_value_heads": mixer.kv_heads, "head_dim": mixer.head_dim, activation: SPELLINGS[top.ffn.activation],
            "rms_norm_eps": config.norm.eps, "max_position_embeddings": config.context, "tie_word_embeddings": config.tied,
            "bos_token_id": config.bos_token, "eos_token_id": ends[0] if len(ends) == 1 else ends or None, "pad_token_id": config.pad_token}


def plain(config: ModelConfig) -> ModelConfig:
    """The same model in one spelling: layers apart, an attention scale of head_dim ** -0.5 as None."""
    def layer(x: Layer) -> Layer:
        mixer = x.mixer
        if not isinstance(mixer, Attention | LatentAttention) or mixer.scale is None:
            return x
        return dc.replace(x, mixer=dc.replace(mixer, scale=scale_of(mixer.scale, mixer.head_dim)))
    return dc.replace(unrolled(config), prefix=tuple(layer(x) for x in config.layers), encoder=config.encoder and plain(config.encoder))

