"""A GGUF file's metadata under its architecture's name, both ways: read with a memory of what was asked for, and made out of a ModelConfig.

Keys are those of llama.cpp's gguf-py/gguf/constants.py. Numbers with a fraction are kept in float32. Not here: what belongs to one architecture (`gguf_models.py`).
"""
from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from llmjax.core.errors import CheckpointError
from llmjax.core.model_config import Attention, Layer, ModelConfig, Norm, find_cycle
from llmjax.core.positions import LinearScaling, Llama3Scaling, Rope, Yarn

# What may stand in a file without changing the answer, or is asked for only where it applies.
HARMLESS = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear", "rope.scaling.original_context_length",
            "feed_forward_length", "expert_used_count", "attention.layer_norm_epsilon")


class File(Protocol):
    """What is asked of a GGUF file before its tensors are read: `where` names it in errors, `fields` is its metadata, `shapes` maps tensor names to shapes."""
    @property
    def where(self) -> str: ...

    @property
    def fields(self) -> Mapping[str, Any]: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray: ...


@dc.dataclass(frozen=True)
class Head:
    """A file that is still to be written: its metadata, its shapes, and the few small tensors that the configuration is read from."""
    where: str
    fields: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    small: Mapping[str, np.ndarray]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.small[name]


class Meta:
    """A file's metadata under its architecture's name; it remembers what was asked for."""

    def __init__(self, file: File, arch: str):
        self.file, self.arch = file, arch
        self.asked = set(HARMLESS)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return self.file.fields.get(f"{self.arch}.{key}", default)

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise CheckpointError(f"{self.file.where}: its metadata lack {self.arch}.{key}; convert it again with a current llama.cpp")
        return value

    def one(self, key: str, default: Any = None) -> Any:
        """A number that may be given as one per layer. Raises CheckpointError where layers differ."""
        value = self.need(key) if default is None else self.get(key, default)
        if isinstance(value, list):
            if len(set(value)) > 1:
                raise CheckpointError(f"{self.file.where}: {self.arch}.{key} differs from layer to layer, which this version does not read")
            value = value[0]
        return value

    def finish(self) -> None:
        """Raises CheckpointError for a key of this architecture that nobody asked for and that is on."""
        for key, value in self.file.fields.items():
            lead, _, name = key.partition(".")
            if lead == self.arch and name not in self.asked and value not in (0, None, False, "", [], "none"):
                raise CheckpointError(f"{self.file.where}: {key}={str(value)[:60]!r} is a setting this version does not know, and it may change what the model answers")


def rope_of(m: Meta, size: int, partial: bool = False) -> Rope:
    """The rotary settings (partial: the architecture may rotate a part of each head); `rope_freqs.weight` (one divisor per frequency) is turned back into the Llama 3 scaling it was made from."""
    rotated = int(m.get("rope.dimension_count", size))
    if rotated != size and not partial:
        raise CheckpointError(f"{m.file.where}: rope.dimension_count={rotated} of heads of {size}: partial rotation is not part of this architecture")
    fraction = rotated / size
    theta = float(m.get("rope.freq_base", 10_000.0))
    kind, factor = m.get("rope.scaling.type", "none"), m.get("rope.scaling.factor", m.get("rope.scale_linear", 1.0))
    kind = "linear" if kind == "none" and m.get("rope.scale_linear", 1.0) not in (0.0, 1.0) else kind
    context = int(m.get("rope.scaling.original_context_length", 0)) or int(m.need("context_length"))
    if "rope_freqs.weight" in m.file.shapes:
        return Rope(theta, fraction, scaling=llama3(m, theta, size, m.file.read("rope_freqs.weight").astype(np.float64)))
    if kind == "none" or factor in (0.0, 1.0):
        return Rope(theta, fraction)
    if kind == "linear":
        return Rope(theta, fraction, scaling=LinearScaling(float(factor)))
    if kind == "yarn":
        return Rope(theta, fraction, scaling=Yarn(float(factor), context, float(m.get("rope.scaling.yarn_beta_fast", 32.0)), float(m.get("rope.scaling.yarn_beta_slow", 1.0))))
    raise CheckpointError(f"{m.file.where}: the rotary scaling {kind!r} is unknown; known: none, linear, yarn")


def llama3(m: Meta, theta: float, size: int, divisors: np.ndarray) -> Llama3Scaling | None:
    """The scaling whose divisors the file holds. Only its result is stored, so the published setting (1 and 4) is tried with every context until it gives these numbers."""
    if np.allclose(divisors, 1.0):
        return None
    factor = float(divisors.max())
    factor = float(round(factor)) if math.isclose(factor, round(factor), rel_tol=1e-4) else factor
    wavelengths = 2 * math.pi * theta ** (np.arange(0, size, 2) / size)
    given = m.get("rope.scaling.original_context_length")
    for context in [given] * bool(given) + [8192] + [2 ** i for i in range(4, 21)]:
        smooth = np.clip((context / wavelengths - 1.0) / 3.0, 0.0, 1.0)
        if divisors.shape == smooth.shape and np.allclose(1.0 / ((1.0 - smooth) / factor + smooth), divisors, rtol=1e-3):
            return Llama3Scaling(factor, 1.0, 4.0, int(context))
    raise CheckpointError(f"{m.file.where}: rope_freqs.weight holds divisors that no Llama 3 scaling (low 1, high 4) gives; use the Hugging Face checkpoint")


def finish(m: Meta, family: str, layers: list[Layer], norm: Norm, **more: Any) -> ModelConfig:
    """The ModelConfig of these layers with what every architecture says alike."""
    fields, embed = m.file.fields, m.file.shapes.get("token_embd.weight")
    if embed is None:
        raise CheckpointError(f"{m.file.where}: it has no token_embd.weight; only whole models are read")
    known = {name: fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "eom", "padding")}
    ends = tuple(dict.fromkeys(i for i in (known["eos"], known["eot"], known["eom"]) if i is not None))
    return ModelConfig(embed[0], int(m.need("embedding_length")), **find_cycle(tuple(layers)), norm=norm, tied="output.weight" not in m.file.shapes,
                       context=int(m.need("context_length")), bos_token=known["bos"], end_tokens=ends, pad_token=known["padding"], family=family, **more)


def mixer_of(m: Meta, partial: bool = False, fused: bool = False, **more: Any) -> Attention:
    """The attention of every layer. fused: queries, keys and values lie in one tensor."""
    heads, dim = int(m.one("attention.head_count")), int(m.need("embedding_length"))
    size = int(m.get("attention.key_length", dim // heads))
    if m.get("attention.value_length", size) != size:
        raise CheckpointError(f"{m.file.where}: keys of {size} and values of {m.get('attention.value_length')} numbers per head are not part of this architecture")
    return Attention(heads, int(m.one("attention.head_count_kv", heads)), size, rope_of(m, size, partial), qkv_bias=f"blk.0.attn_{'qkv' if fused else 'q'}.bias" in m.file.shapes,
                     out_bias="blk.0.attn_output.bias" in m.file.shapes, **more)


def norm_of(m: Meta, offset: float = 0.0) -> Norm:
    return Norm(eps=float(f"{m.need('attention.layer_norm_rms_epsilon'):.6g}"), offset=offset)     # the file keeps 1e-5 in float32


def layer_norm_of(m: Meta) -> Norm:
    return Norm("layer", float(f"{m.need('attention.layer_norm_epsilon'):.6g}"), bias=True)


# The way back: fields without the architecture's name.

def decoder_fields(config: ModelConfig) -> dict[str, Any]:
    """What every architecture says alike, out of the first layer (reading the written fields back finds it if others differ)."""
    layer = config.layers[0]
    mixer: Any = layer.mixer
    norm = "attention.layer_norm_rms_epsilon" if config.norm.kind == "rms" else "attention.layer_norm_epsilon"
    return {"context_length": config.context, "embedding_length": config.dim, "block_count": len(config.layers), "feed_forward_length": layer.ffn.hidden,
            "attention.head_count": mixer.heads, "attention.head_count_kv": mixer.kv_heads, "attention.key_length": mixer.head_dim, "attention.value_length": mixer.head_dim,
            norm: config.norm.eps, "vocab_size": config.vocab_size, **(rope_fields(mixer.rope, mixer.head_dim) if mixer.rope else {})}


def rope_fields(rope: Rope, size: int) -> dict[str, Any]:
    """Rotary settings; a scaling without a name in GGUF is left out, and found missing when the fields are read back."""
    scale, out = rope.scaling, {"rope.freq_base": rope.theta, "rope.dimension_count": int(size * rope.fraction)}
    if isinstance(scale, LinearScaling):
        return out | {"rope.scaling.type": "linear", "rope.scaling.factor": scale.factor}
    if isinstance(scale, Yarn):
        return out | {"rope.scaling.type": "yarn", "rope.scaling.factor": scale.factor, "rope.scaling.original_context_length": scale.context,
                      "rope.scaling.yarn_beta_fast": scale.beta_fast, "rope.scaling.yarn_beta_slow": scale.beta_slow}
    return out | ({"rope.scaling.original_context_length": scale.context} if isinstance(scale, Llama3Scaling) else {})


def divisors_of(rope: Rope | None, size: int) -> dict[str, np.ndarray]:
    """Llama 3's scaling as the tensor llama.cpp reads: one divisor per rotated pair, float32 [size / 2]."""
    if rope is None or not isinstance(rope.scaling, Llama3Scaling):
        return {}
    s, wavelengths = rope.scaling, 2 * math.pi * rope.theta ** (np.arange(0, size, 2) / size)
    smooth = np.clip((s.context / wavelengths - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0.0, 1.0)
    return {"rope_freqs.weight": (1.0 / ((1.0 - smooth) / s.factor + smooth)).astype(np.float32)}
