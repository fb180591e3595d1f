"""GGUF models: metadata -> ModelConfig, and the tensor table of each architecture (the naming of llama.cpp's gguf-py/gguf/constants.py).

What differs from the Hugging Face layout: llama keeps the two halves of each rotated pair as neighbours (rows of q and k are un-permuted here), Gemma's norm scales are kept
as 1 + w, Llama 3's rotary scaling is a tensor of factors, a tied head is an absent `output.weight`, and what llama.cpp fixes in its source stands here as numbers.
"""
from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from llmjax.checkpoint.families.base import scale_of
from llmjax.checkpoint.gguf_file import Gguf
from llmjax.checkpoint.table import Row, Table
from llmjax.core.errors import CheckpointError, ConfigError
from llmjax.core.model_config import Attention, Layer, LinearScaling, Llama3Scaling, MixtureOfExperts, Mlp, ModelConfig, Norm, QKNorm, Rope, Yarn, find_cycle

B = "blk.{l}."


def top(added: float = 0.0) -> tuple[Row, ...]:
    return (Row("token_embd.weight", "embed/table"), Row("output_norm.weight", "final_norm/scale", added=added), Row("output.weight", "head/kernel", "v d -> d v"))


def attention(pairs: bool) -> tuple[Row, ...]:
    """pairs: whether the rows of q and k are kept as neighbouring pairs (architecture llama)."""
    rows = [Row(B + "attn_v.weight", "mixer/v", "(k h) d -> d k h"), Row(B + "attn_v.bias", "mixer/v_bias", "(k h) -> k h"),
            Row(B + "attn_output.weight", "mixer/o", "d (n h) -> n h d"), Row(B + "attn_output.bias", "mixer/o_bias")]
    for c in "qk":
        rows += [Row(B + f"attn_{c}.weight", f"mixer/{c}", "(n p 2) d -> d n (2 p)" if pairs else "(n h) d -> d n h"),
                 Row(B + f"attn_{c}.bias", f"mixer/{c}_bias", "(n p 2) -> n (2 p)" if pairs else "(n h) -> n h")]
    return tuple(rows)


def norms(added: float = 0.0, /, **names: str) -> tuple[Row, ...]:
    return tuple(Row(f"{B}{theirs}.weight", f"{ours}/scale", added=added) for theirs, ours in names.items())


MLP = (*(Row(f"{B}ffn_{c}.weight", f"ffn/{c}", "f d -> d f") for c in ("gate", "up")), *(Row(f"{B}ffn_{c}.bias", f"ffn/{c}_bias") for c in ("gate", "up", "down")),
       Row(B + "ffn_down.weight", "ffn/down", "d f -> f d"))
EXPERTS = (Row(B + "ffn_gate_inp.weight", "ffn/router", "e d -> d e"),
           *(Row(f"{B}ffn_{c}_exps.weight", f"ffn/{c}", "e f d -> e d f") for c in ("gate", "up")), Row(B + "ffn_down_exps.weight", "ffn/down", "e d f -> e f d"),
           *(Row(f"{B}ffn_{c}.{{e}}.weight", f"ffn/{c}", "f d -> d f") for c in ("gate", "up")), Row(B + "ffn_down.{e}.weight", "ffn/down", "d f -> f d"))
PRE = dict(attn_norm="norm_mixer", ffn_norm="norm_ffn")
SANDWICH = dict(attn_norm="norm_mixer", post_attention_norm="norm_mixer_out", ffn_norm="norm_ffn", post_ffw_norm="norm_ffn_out")
QK = dict(attn_q_norm="mixer/q_norm", attn_k_norm="mixer/k_norm")
UNUSED = (r"rope_freqs\.weight", r"blk\.\d+\.attn_rot_embd", r"rope_freqs")       # read into the configuration, or buffers of old files
HARMLESS = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear", "rope.scaling.original_context_length",
            "feed_forward_length", "expert_used_count", "attention.layer_norm_epsilon")
COPIES = (("output.weight", "token_embd.weight"),)


class Meta:
    """A file's metadata under its architecture's name; it remembers what was asked for."""

    def __init__(self, file: Gguf, arch: str):
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


def to_model_config(file: Gguf) -> ModelConfig:
    """The ModelConfig of a GGUF file. Raises CheckpointError for an unknown architecture, missing metadata and what the architecture's reader does not know."""
    reader = architecture(file).read
    meta = Meta(file, file.fields["general.architecture"])
    try:
        config = reader(meta)
        meta.finish()
        return config
    except ConfigError as error:
        raise CheckpointError(f"{file.where}: {error}") from error


def table(file: Gguf) -> Table:
    arch = architecture(file)
    return arch.experts if file.fields.get(f"{file.fields['general.architecture']}.expert_count") and arch.experts else arch.table


def architecture(file: Gguf) -> Architecture:
    name = file.fields.get("general.architecture")
    if name not in ARCHITECTURES:
        raise CheckpointError(f"{file.where}: the GGUF architecture {name!r} is not read by this version; known: {', '.join(sorted(ARCHITECTURES))}")
    return ARCHITECTURES[name]


def rope_of(m: Meta, size: int, swapped: str = "") -> Rope:
    """The rotary settings; `rope_freqs.weight` (one divisor per frequency) is turned back into the Llama 3 scaling it was made from."""
    if m.get("rope.dimension_count", size) != size:
        raise CheckpointError(f"{m.file.where}: rope.dimension_count={m.get('rope.dimension_count')} of heads of {size}: partial rotation is not part of this architecture")
    theta = float(m.get("rope.freq_base", 10_000.0))
    kind, factor = m.get("rope.scaling.type", "none"), m.get("rope.scaling.factor", m.get("rope.scale_linear", 1.0))
    kind = "linear" if kind == "none" and m.get("rope.scale_linear", 1.0) not in (0.0, 1.0) else kind
    context = int(m.get("rope.scaling.original_context_length", 0)) or int(m.need("context_length"))
    if "rope_freqs.weight" in m.file.shapes:
        return Rope(theta, scaling=llama3(m, theta, size, m.file.read("rope_freqs.weight").astype(np.float64)))
    if kind == "none" or factor in (0.0, 1.0):
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, scaling=LinearScaling(float(factor)))
    if kind == "yarn":
        return Rope(theta, scaling=Yarn(float(factor), context, float(m.get("rope.scaling.yarn_beta_fast", 32.0)), float(m.get("rope.scaling.yarn_beta_slow", 1.0))))
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


def mixer_of(m: Meta, rope: bool = True, **more: Any) -> Attention:
    heads, dim = int(m.one("attention.head_count")), int(m.need("embedding_length"))
    size = int(m.get("attention.key_length", dim // heads))
    if m.get("attention.value_length", size) != size:
        raise CheckpointError(f"{m.file.where}: keys of {size} and values of {m.get('attention.value_length')} numbers per head are not part of this architecture")
    return Attention(heads, int(m.one("attention.head_count_kv", heads)), size, rope_of(m, size), qkv_bias="blk.0.attn_q.bias" in m.file.shapes,
                     out_bias="blk.0.attn_output.bias" in m.file.shapes, **more)


def norm_of(m: Meta, offset: float = 0.0) -> Norm:
    return Norm(eps=float(f"{m.need('attention.layer_norm_rms_epsilon'):.6g}"), offset=offset)     # the file keeps 1e-5 in float32


def read_llama(m: Meta) -> ModelConfig:
    norm, mixer = norm_of(m), mixer_of(m)
    experts = m.get("expert_count", 0)
    ffn: Any = MixtureOfExperts(int(experts), int(m.need("expert_used_count")), int(m.one("feed_forward_length"))) if experts else \
        Mlp(int(m.one("feed_forward_length")), bias="blk.0.ffn_up.bias" in m.file.shapes)
    return finish(m, "mixtral" if experts else "llama", [Layer(mixer, ffn)] * int(m.need("block_count")), norm)


def read_qwen(m: Meta) -> ModelConfig:
    norm = norm_of(m)
    mixer = mixer_of(m, qk_norm=QKNorm(norm) if m.arch == "qwen3" else None)
    return finish(m, m.arch, [Layer(mixer, Mlp(int(m.one("feed_forward_length"))))] * int(m.need("block_count")), norm)


def gemma_scale(m: Meta, size: int, large: int) -> float | None:
    """The attention scale that llama.cpp takes: of the model's 27 B size (known by its depth) from dim / heads, else from the head."""
    heads = int(m.one("attention.head_count"))
    return scale_of((int(m.need("embedding_length")) / heads) ** -0.5 if m.need("block_count") == large else size ** -0.5, size)


def read_gemma2(m: Meta) -> ModelConfig:
    norm, mixer = norm_of(m, 1.0), mixer_of(m, softcap=float(m.get("attn_logit_softcapping", 50.0)))
    mixer, window = replace(mixer, scale=gemma_scale(m, mixer.head_dim, 46)), int(m.get("attention.sliding_window", 4096))
    ffn = Mlp(int(m.one("feed_forward_length")), "gelu_tanh")
    layers = [Layer(replace(mixer, window=None if i % 2 else window), ffn, "sandwich") for i in range(int(m.need("block_count")))]
    return finish(m, "gemma2", layers, norm, embed_scale=int(m.need("embedding_length")) ** 0.5, logit_softcap=float(m.get("final_logit_softcapping", 30.0)))


def read_gemma3(m: Meta) -> ModelConfig:
    norm, every = norm_of(m, 1.0), int(m.get("attention.sliding_window_pattern", 6))
    mixer, window = mixer_of(m, qk_norm=QKNorm(norm)), m.get("attention.sliding_window")
    far = rope_of(m, mixer.head_dim)
    mixer = replace(mixer, scale=gemma_scale(m, mixer.head_dim, 62), rope=far if m.get("rope.freq_base") else replace(far, theta=1_000_000.0))
    near, ffn = Rope(float(m.get("rope.freq_base_swa", 10_000.0))), Mlp(int(m.one("feed_forward_length")), "gelu_tanh")
    slides = [bool(window) and bool((i + 1) % every) for i in range(int(m.need("block_count")))]
    layers = [Layer(replace(mixer, window=int(window) if s else None, rope=near if s else mixer.rope), ffn, "sandwich") for s in slides]
    cap = m.get("final_logit_softcapping")
    return finish(m, "gemma3", layers, norm, embed_scale=int(m.need("embedding_length")) ** 0.5, logit_softcap=cap and float(cap))


@dc.dataclass(frozen=True)
class Architecture:
    """read: metadata -> ModelConfig. table: its tensors; experts: those of its mixture-of-experts models."""
    read: Callable[[Meta], ModelConfig]
    table: Table
    experts: Table | None = None


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(read_llama, Table((*top(), *attention(True), *MLP, *norms(**PRE)), extras=UNUSED, copies=COPIES),
                          Table((*top(), *attention(True), *EXPERTS, *norms(**PRE)), extras=UNUSED, copies=COPIES)),
    "qwen2": Architecture(read_qwen, Table((*top(), *attention(False), *MLP, *norms(**PRE)), extras=UNUSED, copies=COPIES)),
    "qwen3": Architecture(read_qwen, Table((*top(), *attention(False), *MLP, *norms(**PRE), *norms(**QK)), extras=UNUSED, copies=COPIES)),
    "gemma2": Architecture(read_gemma2, Table((*top(1.0), *attention(False), *MLP, *norms(1.0, **SANDWICH)), copies=COPIES)),
    "gemma3": Architecture(read_gemma3, Table((*top(1.0), *attention(False), *MLP, *norms(1.0, **SANDWICH), *norms(1.0, **QK)), copies=COPIES)),
}
