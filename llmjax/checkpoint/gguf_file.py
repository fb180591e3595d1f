"""Reading GGUF files: metadata, tensor places and dequantised tensors, one at a time.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, counts, key-value pairs, tensor descriptions (dimensions innermost first), then
aligned data. Parsed here in one pass over the head of the file (a damaged one gets one clear line); block types are turned into float32 by the `gguf` package.
"""
from __future__ import annotations

import math
import pathlib
import struct
from typing import Any

import numpy as np

from llmjax.core.errors import CheckpointError

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}      # GGUF value type -> struct letter
STRING, ARRAY = 8, 9


class Cursor:
    """Takes values off a buffer; running over its end is a truncated file."""

    def __init__(self, data: bytes, file: pathlib.Path):
        self.data, self.at, self.file = data, 0, file

    def skip(self, n: int) -> int:
        start, self.at = self.at, self.at + n
        if n < 0 or self.at > len(self.data):
            raise CheckpointError(f"{self.file}: truncated, or no sound GGUF file: it ends inside its header; copy or download it again")
        return start

    def scalar(self, letter: str) -> Any:
        return struct.unpack_from("<" + letter, self.data, self.skip(struct.calcsize("<" + letter)))[0]

    def text(self) -> str:
        n = self.scalar("Q")
        start = self.skip(n)
        return self.data[start:start + n].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise CheckpointError(f"{self.file}: its metadata holds a value of type {kind}, which GGUF does not know; copy or download it again")
        kind, n = self.scalar("I"), self.scalar("Q")
        if kind in SCALARS:
            size = struct.calcsize("<" + SCALARS[kind])
            return np.frombuffer(self.data, "<" + SCALARS[kind], n, self.skip(n * size)).tolist()
        self.skip(0 if n <= len(self.data) else -1)
        return [self.value(kind) for _ in range(n)]


class Gguf:
    """A GGUF file as a `table.Source`; `fields` is its metadata as {key: python value}."""

    def __init__(self, file: str | pathlib.Path):
        self.file = pathlib.Path(file)
        self.where = str(file)
        size = self.file.stat().st_size
        self.fields, places, start = read_head(self.file, size)
        if self.fields.get("split.count", 0) > 1:
            raise CheckpointError(f"{file}: one of {self.fields['split.count']} parts; join them first with llama-gguf-split --merge")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[Any, int, int]] = {}
        for name, (shape, kind, offset) in places.items():
            qtype, n = stored(self.file, name, shape, kind)
            if start + offset + n > size:
                raise CheckpointError(f"{file}: truncated: the tensor {name!r} should end at byte {start + offset + n}, the file has {size}; copy or download it again")
            self.shapes[name], self._places[name] = shape, (qtype, start + offset, n)

    def describe(self, name: str) -> tuple[str, str]:
        """(the block type of a tensor, the file it stands in)."""
        return self._places[name][0].name, self.file.name

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """A tensor, or its rows from `start` to before `stop` -> float32 (float16 and float64 as they are stored)."""
        from gguf import GGMLQuantizationType as Kind
        from gguf.quants import dequantize
        (qtype, offset, n), shape = self._places[name], self.shapes[name]
        if stop is not None:
            row = n // shape[0]
            offset, n, shape = offset + start * row, (stop - start) * row, (stop - start, *shape[1:])
        with open(self.file, "rb") as f:
            raw = np.fromfile(f, np.uint8, n, offset=offset)
        if raw.size != n:
            raise CheckpointError(f"{self.where}: it ends inside the tensor {name!r}; copy or download it again")
        plain = {Kind.F32: np.float32, Kind.F16: np.float16, Kind.F64: np.float64}
        if qtype in plain:
            return raw.view(plain[qtype]).reshape(shape)
        try:
            return dequantize(raw.reshape(*shape[:-1], -1), qtype).reshape(shape)
        except NotImplementedError as error:
            raise CheckpointError(f"{self.where}: the tensor {name!r} is of type {qtype.name}, which the gguf package cannot dequantise; take another quantisation") from error


def stored(file: pathlib.Path, name: str, shape: tuple[int, ...], kind: int) -> tuple[Any, int]:
    """(quantisation type, bytes) of a tensor. Raises CheckpointError for an unknown type and a row that is no whole number of blocks."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    try:
        qtype = GGMLQuantizationType(kind)
        block, bytes_ = GGML_QUANT_SIZES[qtype]
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{file}: the tensor {name!r} is of type {kind}, which the gguf package does not know; update it: pip install -U gguf") from error
    if not shape or shape[-1] % block:
        raise CheckpointError(f"{file}: the tensor {name!r} has rows of {shape[-1] if shape else 0} numbers, {qtype.name} wants multiples of {block}; copy the file again")
    return qtype, math.prod(shape) // block * bytes_


def read_head(file: pathlib.Path, size: int) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], int, int]], int]:
    """-> (metadata, {tensor: (shape, type, offset)}, where the data begin). Reads more and more of the file until its head is whole."""
    with open(file, "rb") as f:
        data = b""
        while True:
            data += f.read(max(len(data), 8 << 20))
            try:
                return parse_head(Cursor(data, file))
            except CheckpointError:
                if len(data) >= size or data[:4] != b"GGUF":
                    raise


def parse_head(c: Cursor) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], int, int]], int]:
    if c.data[:4] != b"GGUF":
        raise CheckpointError(f"{c.file}: no GGUF file (it begins with {c.data[:4]!r}); copy or download it again")
    c.skip(4)
    version = c.scalar("I")
    if version not in (2, 3):
        raise CheckpointError(f"{c.file}: GGUF version {version} (or a big-endian file) is not read, 2 and 3 are; convert it again with a current llama.cpp")
    tensors, pairs = c.scalar("Q"), c.scalar("Q")
    fields = {}
    for _ in range(pairs):
        key = c.text()
        fields[key] = c.value(c.scalar("I"))
    places = {}
    for _ in range(tensors):
        name, dims = c.text(), c.scalar("I")
        if dims > 8:
            raise CheckpointError(f"{c.file}: the tensor {name!r} claims {dims} dimensions; copy or download the file again")
        shape = tuple(reversed([c.scalar("Q") for _ in range(dims)]))
        places[name] = (shape, c.scalar("I"), c.scalar("Q"))
    align = int(fields.get("general.alignment", 32))
    return fields, places, -(-c.at // align) * align
