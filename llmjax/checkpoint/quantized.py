"""Quantised Hugging Face folders, dequantised while they are read: GPTQ, AWQ, FP8 and MXFP4 in blocks. A `Source` around another one; neither table nor model knows of it.

Read are the layouts published with AutoGPTQ / GPTQModel (`qweight, qzeros, scales, g_idx`), AutoAWQ's "gemm", DeepSeek-V3 (`weight_scale_inv`) and gpt-oss (`…_blocks`, `…_scales`);
every setting in config.json's quantization_config is either understood, known to matter only while quantising, or refused by name.
"""
from __future__ import annotations

import dataclasses as dc
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from llmjax.checkpoint.fields import Fields
from llmjax.checkpoint.table import Source
from llmjax.core.errors import CheckpointError

# Settings of the quantiser, of its runtime, or lists of modules (which the tensors' names tell): they do not change what the stored numbers mean.
WHILE_QUANTISING = frozenset("""
    damp_percent damp_auto_increment true_sequential static_groups sym model_name_or_path model_file_base_name tokenizer dataset batch_size pad_token_id model_seqlen max_input_length
    cache_block_outputs block_name_to_quantize module_name_preceding_first_block modules_in_block_to_quantize use_exllama exllama_config disable_exllama use_cuda_fp16 backend meta mse
    act_group_aware version modules_to_not_convert ignored_layers do_fuse fuse_max_seq_len modules_to_fuse activation_scheme dequantize lm_head
""".split())  # noqa: SIM905
WORD = 32


@dc.dataclass(frozen=True)
class Gptq:
    """Unsigned `bits` packed into int32 along the input, zero points along the output (AutoGPTQ, GPTQModel).

    group: inputs that share a scale (None: all). offset: what version 1 stores less than the zero point (1; version 2: 0). ordered: the inputs were sorted (desc_act), `g_idx` says
    into which groups.
    """
    bits: int
    group: int | None
    offset: int
    ordered: bool
    key = "qweight"
    label = "GPTQ"
    joint, ending = ".", ".weight"

    @property
    def parts(self) -> tuple[str, ...]:
        return ("qweight", "qzeros", "scales", *(["g_idx"] if self.ordered else []))

    optional = ("g_idx",)

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        words, outputs = shapes["qweight"]
        return outputs, words * WORD // self.bits

    def expected(self, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
        groups = -(-inputs // (self.group or inputs))
        return {"scales": (groups, outputs), "qzeros": (groups, -(-outputs * self.bits // WORD)), "g_idx": (inputs,)}

    def dequantize(self, x: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        q, zeros = unpack(x["qweight"], self.bits), unpack(x["qzeros"].T, self.bits).T[:, :shape[0]]
        group = x["g_idx"].astype(np.int64) if "g_idx" in x else np.arange(shape[1]) // (self.group or shape[1])
        if group.min() < 0 or group.max() >= x["scales"].shape[0]:
            raise ValueError(f"g_idx names the group {int(group.max() if group.max() >= 0 else group.min())} of {x['scales'].shape[0]}")
        zeros = (zeros + np.uint8(self.offset)) & np.uint8(2 ** self.bits - 1)            # a zero point of 0 is stored by version 1 as the largest number
        return ((q.astype(np.float32) - zeros.astype(np.float32)[group]) * x["scales"].astype(np.float32)[group]).T


# AutoAWQ's "gemm": the column that stands in each of a word's eight places
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dc.dataclass(frozen=True)
class Awq:
    """Four bits packed into int32 along the output in AWQ_ORDER, zero points alike (AutoAWQ's "gemm"). group: inputs that share a scale (None: all)."""
    group: int | None
    parts = ("qweight", "qzeros", "scales")
    optional = ()
    key = "qweight"
    label = "AWQ"
    joint, ending = ".", ".weight"

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        inputs, words = shapes["qweight"]
        return words * 8, inputs

    def expected(self, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
        groups = -(-inputs // (self.group or inputs))
        return {"scales": (groups, outputs), "qzeros": (groups, outputs // 8)}

    def dequantize(self, x: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        order = np.argsort(AWQ_ORDER)
        q, zeros = (unpack(x[name].T, 4).reshape(-1, 8, x[name].shape[0])[:, order].reshape(-1, x[name].shape[0]).T.astype(np.float32) for name in ("qweight", "qzeros"))
        group = np.arange(shape[1]) // (self.group or shape[1])
        return ((q - zeros[group]) * x["scales"].astype(np.float32)[group]).T


@dc.dataclass(frozen=True)
class Fp8:
    """float8 (e4m3) with one float32 factor per block of `block` = (rows, columns)."""
    block: tuple[int, int]
    parts = ("weight", "weight_scale_inv")
    optional = ()
    key = "weight_scale_inv"
    label = "FP8"
    joint, ending = ".", ".weight"

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        return shapes["weight"]

    def expected(self, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
        return {"weight_scale_inv": (-(-outputs // self.block[0]), -(-inputs // self.block[1]))}

    def dequantize(self, x: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        factors = x["weight_scale_inv"].astype(np.float32)
        for axis, size in enumerate(self.block):
            factors = np.repeat(factors, size, axis)
        return x["weight"].astype(np.float32) * factors[:shape[0], :shape[1]]


FP4 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0], np.float32)          # e2m1, the sign in the highest bit


@dc.dataclass(frozen=True)
class Mxfp4:
    """All experts' matrices [experts, outputs, inputs / 32 blocks, 16 bytes] of two FP4 numbers a byte, the low half first, an exponent (e8m0, bias 127) a block; they stand for
    [experts, inputs, outputs] (gpt-oss; OCP Microscaling Formats 1.0, section 5)."""
    parts = ("blocks", "scales")
    optional = ()
    key = "blocks"
    label = "MXFP4"
    joint, ending = "_", ""

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        experts, outputs, blocks, size = shapes["blocks"]
        return experts, blocks * 2 * size, outputs

    def expected(self, experts: int, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        return {"blocks": (experts, outputs, inputs // 32, 16), "scales": (experts, outputs, inputs // 32)}

    def dequantize(self, x: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        pairs = np.stack([x["blocks"] & 15, x["blocks"] >> 4], -1)
        numbers = np.ldexp(FP4[pairs.reshape(*x["scales"].shape, 32)], x["scales"].astype(np.int32)[..., None] - 127)
        return numbers.reshape(shape[0], shape[2], shape[1]).swapaxes(1, 2)


Scheme = Gptq | Awq | Fp8 | Mxfp4


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 [W, N] -> uint8 [W · 32 / bits, N]: numbers of `bits` as one stream from the lowest bit of the first word on (3-bit numbers cross from word to word)."""
    count = words.shape[0] * WORD // bits
    words = np.concatenate([np.ascontiguousarray(words).view(np.uint32), np.zeros((1, words.shape[1]), np.uint32)])
    at = np.arange(count) * bits
    low, shift = words[at // WORD], (at % WORD).astype(np.uint32)[:, None]
    high = words[at // WORD + 1] << (np.uint32(WORD) - shift) % WORD
    crosses = shift + bits > WORD
    return ((low >> shift | np.where(crosses, high, np.uint32(0))) & np.uint32(2 ** bits - 1)).astype(np.uint8)


def read_gptq(f: Fields) -> Gptq:
    f.choice("pack_dtype", ["int32"], "int32")
    f.ignore("checkpoint_format", "format")                       # two names of one setting; files older than both are of version 1
    version = f.choice("format" if f.value("checkpoint_format", None) is None else "checkpoint_format", ["gptq", "gptq_v2"], "gptq")
    return Gptq(f.choice("bits", [2, 3, 4, 8]), read_group(f, "group_size"), 0 if version == "gptq_v2" else 1, f.flag("desc_act"))


def read_awq(f: Fields) -> Awq:
    older = "w_bit" in f.values                                   # AutoAWQ's own names, before transformers'
    f.choice("w_bit" if older else "bits", [4])
    f.choice("zero_point", [True], True)
    f.choice("format" if f.value("version", None) is None else "version", ["gemm", "GEMM"], "gemm")
    return Awq(read_group(f, "q_group_size" if older else "group_size"))


def read_fp8(f: Fields) -> Fp8:
    f.choice("fmt", ["e4m3"], "e4m3")
    f.choice("scale_fmt", ["float", "ue8m0"], "float")            # ue8m0: powers of two, kept as float32 all the same
    block = f.value("weight_block_size", [128, 128])
    if not (isinstance(block, list | tuple) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
        raise CheckpointError(f"{f.where}: weight_block_size={block!r} is not read (two whole numbers are)")
    return Fp8((block[0], block[1]))


def read_group(f: Fields, name: str) -> int | None:
    """How many inputs share a scale; None: all."""
    return None if f.value(name) == -1 else f.count(name)


SCHEMES: dict[str, Callable[[Fields], Scheme]] = {"gptq": read_gptq, "awq": read_awq, "fp8": read_fp8, "mxfp4": lambda f: Mxfp4()}


def scheme_of(config: Any, where: str) -> Scheme | None:
    """What a config.json's quantization_config says (None: nothing). Raises CheckpointError for kinds and settings that are not read, naming them."""
    if not config:
        return None
    if not isinstance(config, dict):
        raise CheckpointError(f"{where}: quantization_config={str(config)[:60]!r}: an object is expected")
    f = Fields(config, f"{where}: quantization_config")
    kind = f.value("quant_method", None)
    if kind not in SCHEMES:
        raise CheckpointError(f"{where}: the weights are quantised ({kind}), which this version does not read; {', '.join(SCHEMES)} are. Otherwise take the unquantised checkpoint or a GGUF file")
    scheme = SCHEMES[kind](f)
    f.finish(WHILE_QUANTISING)
    return scheme


class Dequantized:
    """Tensors of `source` as if they had never been quantised: a layer's parts become one "….weight" (experts in MXFP4 one tensor without an ending), float32; the others are as they
    are. A `table.Source` that is read by one thread, since it holds one tensor at a time."""
    readers = 1

    def __init__(self, source: Any, scheme: Scheme):
        self.source, self.scheme, self.where = source, scheme, source.where
        key = scheme.key                                              # the tensor that only quantised layers have
        joint = scheme.joint
        ends = tuple(joint + part for part in (*scheme.parts, *scheme.optional))
        self._layers: dict[str, dict[str, str]] = {}
        for name in source.shapes:
            if name.endswith(joint + key):
                lead = name.removesuffix(key)
                self._layers[name.removesuffix(joint + key) + scheme.ending] = {part: lead + part for part in (*scheme.parts, *scheme.optional) if lead + part in source.shapes}
        inside = {name for parts in self._layers.values() for name in parts.values()}
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(shape) for name, shape in source.shapes.items() if name not in inside}
        for name, parts in self._layers.items():
            missing = [part for part in scheme.parts if part not in parts]
            if missing:
                raise CheckpointError(f"{self.where}: the quantised layer {name.removesuffix('.weight')!r} has no {missing[0]}; is the download complete?")
            self.shapes[name] = scheme.shape({part: tuple(source.shapes[there]) for part, there in parts.items()})
            self.fits(name, parts)
        left = next((name for name in self.shapes if name.endswith(ends) and name not in self._layers and not name.endswith(".weight")), None)
        if left:
            raise CheckpointError(f"{self.where}: {left!r} belongs to a quantised layer that has no {key}; is the download complete?")
        self._last = functools.lru_cache(maxsize=1)(self.whole)       # the rows of a large tensor are asked for in portions

    def fits(self, name: str, parts: Mapping[str, str]) -> None:
        """Raises CheckpointError where a layer's parts cannot belong together."""
        shapes = {part: tuple(self.source.shapes[there]) for part, there in parts.items()}
        for part, shape in self.scheme.expected(*self.shapes[name]).items():
            if part in shapes and shapes[part] != shape:
                raise CheckpointError(f"{self.where}: {parts[part]!r} has shape {shapes[part]}, with {self.scheme.parts[0]} {shapes[self.scheme.parts[0]]} and config.json's quantization_config "
                                      f"it would be {shape}; one of the two belongs to another model")

    def holds_nothing(self, name: str) -> bool:
        """Whether a tensor may be left unread: AutoGPTQ gave every layer a bias, of zeros where the model has none."""
        return name.endswith(".bias") and name.removesuffix("bias") + "weight" in self._layers and not self.source.read(name).any()

    def describe(self, name: str) -> tuple[str, str]:
        """(the type a tensor is stored in, the file it stands in)."""
        return (self.scheme.label, self.source.describe(self._layers[name][self.scheme.parts[0]])[1]) if name in self._layers else self.source.describe(name)

    def whole(self, name: str) -> np.ndarray:
        try:
            return self.scheme.dequantize({part: self.source.read(there) for part, there in self._layers[name].items()}, self.shapes[name])
        except ValueError as error:
            raise CheckpointError(f"{self.where}: the quantised layer {name.removesuffix('.weight')!r} cannot be read: {error}") from error

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        if name not in self._layers:
            return self.source.read(name, start, stop)
        return self._last(name)[start:stop]


def opened(source: Source, scheme: Scheme | None) -> Any:
    """`source` itself, or dequantised. Raises CheckpointError where quantised layers lack parts."""
    return source if scheme is None else Dequantized(source, scheme)
