"""Writing GGUF files: which block type each tensor gets, and the file, tensor by tensor; the container and the block types are the `gguf` package's.

Matrices get the type asked for. As in llama.cpp's own tools: vectors, routers and tables of positions and token types stay in float32, a matrix whose rows are no whole number of blocks is written
in float16, and of a 4- or 5-bit file the embedding and the head, which weigh on every token, are written in 8 bits (Q8_0).
"""
from __future__ import annotations

import dataclasses as dc
import logging
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from llmjax.checkpoint.safetensors_file import is_full
from llmjax.core.errors import CheckpointError

KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0", "q5_1": "Q5_1", "q5_0": "Q5_0", "q4_1": "Q4_1", "q4_0": "Q4_0"}
PLAIN = ("F32", "F16", "BF16")
WIDE = ("token_embd.weight", "output.weight")            # eight bits at least
EXACT = ("ffn_gate_inp", "position_embd", "token_types", "attn_rel_b")                # float32 always


@dc.dataclass(frozen=True)
class Tensor:
    """A tensor to be written in a block type (a name of KINDS' values): its float32 array is made when `make` is called."""
    name: str
    shape: tuple[int, ...]
    kind: str
    make: Callable[[], np.ndarray]


def kind_of(name: str, shape: tuple[int, ...], wanted: str) -> str:
    """The block type of a tensor in a file of `wanted` (see the file's docstring)."""
    if len(shape) < 2 or any(part in name for part in EXACT):
        return "F32"
    if wanted in PLAIN:
        return wanted
    if shape[-1] % 32:
        return "F16"
    return "Q8_0" if name in WIDE else wanted


def encode(x: np.ndarray, kind: str) -> np.ndarray:
    """Numbers [..., n] as the bytes of a block type -> uint8 [..., bytes of a row]."""
    from gguf import GGMLQuantizationType as Kind
    from gguf.quants import quantize
    x = np.ascontiguousarray(x, np.float32)
    if kind == "F16":
        with np.errstate(over="ignore"):
            half = x.astype(np.float16)
        if not np.isfinite(half).all() and np.isfinite(x).all():
            raise CheckpointError("numbers beyond 65504 do not fit float16; write bfloat16 or float32")
        return half.view(np.uint8)
    return x.view(np.uint8) if kind == "F32" else quantize(x, Kind[kind]).view(np.uint8)


def decode(raw: np.ndarray, kind: str) -> np.ndarray:
    """The inverse of `encode`, with the rounding in it -> float32."""
    from gguf import GGMLQuantizationType as Kind
    from gguf.quants import dequantize
    return dequantize(raw, Kind[kind])


def write(file: pathlib.Path, fields: Mapping[str, Any], tensors: list[Tensor], kind: str, progress: Callable[[str], None] | None = None) -> None:
    """A GGUF file (version 3): metadata, then the tensors in turn. Written beside and renamed last: what stood there stays where anything fails.

    fields: whole numbers are kept as uint32 (in lists int32, bytes uint8), numbers with a fraction as float32. kind: what general.file_type says.
    Raises CheckpointError where the disk is full and for numbers the type cannot hold.
    """
    from gguf import GGML_QUANT_SIZES, GGUFWriter, LlamaFileType
    from gguf import GGMLQuantizationType as Kind
    logging.getLogger("gguf").setLevel(logging.WARNING)
    part = file.with_name(f".writing-{os.getpid()}-{file.name}")
    writer = GGUFWriter(None, str(fields["general.architecture"]))
    writer.add_file_type(LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    writer.add_quantization_version(2)
    for key, value in fields.items():
        if key != "general.architecture":
            add(writer, key, value)
    for t in tensors:
        block, size = GGML_QUANT_SIZES[Kind[t.kind]]
        row = t.shape[-1] // block * size
        count = int(np.prod(t.shape[:-1])) * row
        writer.add_tensor_info(t.name, t.shape, np.dtype(np.float32), count, Kind[t.kind])
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        writer.write_header_to_file(part)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for t in tensors:
            x = t.make()
            assert x.shape == t.shape, f"{t.name}: {x.shape}, {t.shape} was promised"
            try:
                raw = encode(x, t.kind)
            except CheckpointError as error:
                raise CheckpointError(f"{file}: the tensor {t.name!r} cannot be written: {error}") from error
            writer.write_tensor_data(raw)
            if progress:
                progress(t.name)
        for stream in writer.fout or []:
            stream.flush()
            os.fsync(stream.fileno())
        writer.close()
        os.replace(part, file)
    except OSError as error:
        if not is_full(error):
            raise
        raise CheckpointError(f"{file}: the disk is full; what stood there before is untouched. Free some space and write again") from error
    finally:
        try:
            writer.close()
        finally:
            part.unlink(missing_ok=True)


def add(writer: Any, key: str, value: Any) -> None:
    """One pair of metadata, with the type llama.cpp expects of its kind."""
    from gguf import GGUFValueType as Type
    if isinstance(value, bytes):
        writer.add_key_value(key, value, Type.ARRAY, Type.UINT8)
    elif isinstance(value, list | tuple):
        if value:
            kind = Type.STRING if isinstance(value[0], str) else Type.BOOL if isinstance(value[0], bool) else Type.FLOAT32 if isinstance(value[0], float) else Type.INT32
            writer.add_key_value(key, list(value), Type.ARRAY, kind)
    else:
        writer.add_key_value(key, value, {bool: Type.BOOL, int: Type.UINT32, float: Type.FLOAT32, str: Type.STRING}[type(value)])
