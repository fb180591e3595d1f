"""safetensors in and out: a single file, or shards under `model.safetensors.index.json`; read and written tensor by tensor.

The format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the numbers. It is read here
with plain reads at an offset instead of a memory map, so that what a process holds is one tensor and not the pages of the whole file; and written from a stream instead of a dict
of all tensors.
"""
from __future__ import annotations

import errno
import json
import math
import os
import pathlib
import shutil
import struct
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from llmjax.checkpoint.copying import contiguous
from llmjax.checkpoint.table import Export
from llmjax.core.errors import CheckpointError

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
          "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_}
NAMES = {np.dtype(v): k for k, v in DTYPES.items()}
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10 ** 9


class SafeTensors:
    """The tensors of one or several safetensors files, as a `table.Source`."""

    def __init__(self, files: list[pathlib.Path], where: str):
        self.where = where
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self._places: dict[str, tuple[pathlib.Path, int]] = {}
        for file in files:
            for name, (dtype, shape, start) in header(file).items():
                if name in self.shapes:
                    raise CheckpointError(f"{where}: the tensor {name!r} stands in both {self._places[name][0].name} and {file.name}; remove the shards of another save")
                self.shapes[name], self.dtypes[name], self._places[name] = shape, dtype, (file, start)

    def describe(self, name: str) -> tuple[str, str]:
        """(the type a tensor is stored in, the file it stands in)."""
        return NAMES[self.dtypes[name]], self._places[name][0].name

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """A tensor, or its rows from `start` to before `stop`. Raises CheckpointError where the file has become shorter."""
        (file, offset), dtype, shape = self._places[name], self.dtypes[name], self.shapes[name]
        if stop is not None:
            row, shape = math.prod(shape[1:]), (stop - start, *shape[1:])
            offset += start * row * dtype.itemsize
        with open(file, "rb") as f:
            x = np.fromfile(f, dtype, math.prod(shape), offset=offset)
        if x.size != math.prod(shape):
            raise CheckpointError(f"{file}: it ends inside the tensor {name!r}; copy or download it again")
        return x.reshape(shape)


def header(file: pathlib.Path) -> dict[str, tuple[np.dtype, tuple[int, ...], int]]:
    """name -> (dtype, shape, offset of its first byte in the file). Raises CheckpointError for a truncated or damaged file, FileNotFoundError for none."""
    size = file.stat().st_size
    again = "copy or download it again"
    with open(file, "rb") as f:
        first = f.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if len(first) < 8 or length > size - 8:
            raise CheckpointError(f"{file}: truncated, or no safetensors file: {size} bytes cannot hold its header; {again}")
        raw = f.read(length)
    try:
        entries = json.loads(raw)
        entries.pop("__metadata__", None)
        found = {name: (e["dtype"], tuple(int(n) for n in e["shape"]), int(e["data_offsets"][0]), int(e["data_offsets"][1])) for name, e in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{file}: its header cannot be read ({type(error).__name__}); {again}") from error
    data = 8 + length
    out = {}
    for name, (dtype, shape, start, stop) in found.items():
        if dtype not in DTYPES:
            raise CheckpointError(f"{file}: the tensor {name!r} is of type {dtype}, which this version does not read")
        if data + stop > size:
            raise CheckpointError(f"{file}: truncated: the tensor {name!r} should end at byte {data + stop}, the file has {size}; {again}")
        if stop - start != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize or start < 0:
            raise CheckpointError(f"{file}: the tensor {name!r} claims shape {shape} of {dtype} but holds {stop - start} bytes; {again}")
        out[name] = (np.dtype(DTYPES[dtype]), shape, data + start)
    return out


def open_folder(folder: pathlib.Path) -> SafeTensors:
    """The weights of a Hugging Face folder. Raises FileNotFoundError where there are none, CheckpointError where they cannot be read."""
    single, index = folder / "model.safetensors", folder / INDEX
    if single.exists():
        return SafeTensors([single], str(single))
    if index.exists():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict):
            raise CheckpointError(f"{index}: it has no 'weight_map'; copy or download it again")
        files = sorted({folder / str(name) for name in places.values()})
        missing = [f.name for f in files if not f.exists()]
        if missing:
            raise FileNotFoundError(f"{folder}: {len(missing)} of {len(files)} shards are missing, {missing[0]} first; finish the download")
        source = SafeTensors(files, str(folder))
        absent = [name for name in places if name not in source.shapes]
        if absent:
            raise CheckpointError(f"{folder}: {INDEX} promises the tensor {absent[0]!r}, which {places[absent[0]]} does not hold; download the folder again")
        return source
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise CheckpointError(f"{folder}: it has only pickled weights (.bin, .pt), which can run any code when they are opened; take the safetensors revision, or convert the file "
                              "with transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)")
    if any(folder.glob("*.gguf")):
        raise FileNotFoundError(f"{folder}: no model.safetensors, but GGUF files; name the file itself: {next(iter(sorted(folder.glob('*.gguf'))))}")
    if (folder / "adapter_model.safetensors").exists():
        raise CheckpointError(f"{folder}: an adapter without its base model; load the base model")
    raise FileNotFoundError(f"{folder}: no model.safetensors and no {INDEX}; is the download complete?")


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError naming the file and the place of the error."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        place = f"line {error.lineno}" if isinstance(error, json.JSONDecodeError) else "not UTF-8"
        raise CheckpointError(f"{file}: it is not JSON ({place}); copy or download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: a JSON object is expected, it holds a {type(value).__name__}")
    return value


def nbytes(tensor: Export) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def write_file(file: pathlib.Path, tensors: list[Export], progress: Callable[[str], None] | None = None) -> None:
    """One safetensors file, tensor by tensor. Raises OSError."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for t in tensors:
        if t.dtype not in NAMES:
            raise CheckpointError(f"{t.name}: safetensors cannot hold {t.dtype}")
        entries[t.name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [start, start := start + nbytes(t)]}
    head = json.dumps(entries, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with open(file, "wb") as f:
        f.write(struct.pack("<Q", len(head)) + head)
        for t in tensors:
            x = contiguous(t.make())
            assert x.shape == t.shape and x.dtype == t.dtype, f"{t.name}: {x.shape} {x.dtype}, {t.shape} {t.dtype} was promised"
            f.write(x.reshape(-1).view(np.uint8).data)
            if progress:
                progress(t.name)
        f.flush()
        os.fsync(f.fileno())


def shards(tensors: list[Export], limit: int) -> Iterator[list[Export]]:
    """Tensors in order, cut where a file would grow over `limit` bytes (one larger tensor has a file of its own)."""
    held: list[Export] = []
    for t in tensors:
        if held and sum(map(nbytes, held)) + nbytes(t) > limit:
            yield held
            held = []
        held.append(t)
    yield held


def write_folder(folder: pathlib.Path, tensors: list[Export], others: Callable[[pathlib.Path], None], shard_bytes: int = SHARD_BYTES,
                 progress: Callable[[str], None] | None = None) -> None:
    """Weights (one file, or shards and their index) and whatever `others` writes into the folder it is given.

    All is written beside and renamed last: where anything fails, the files that stood there before stand there still. Raises CheckpointError where the disk is full.
    """
    created = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise CheckpointError(f"{folder}: it is a file; name a folder") from error
    scratch = folder / f".writing-{os.getpid()}"
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        files = list(shards(tensors, shard_bytes))
        names = ["model.safetensors"] if len(files) == 1 else [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
        for name, part in zip(names, files):
            write_file(scratch / name, part, progress)
        if len(files) > 1:
            index = {"metadata": {"total_size": sum(map(nbytes, tensors))}, "weight_map": {t.name: name for name, part in zip(names, files) for t in part}}
            (scratch / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            names.append(INDEX)
        others(scratch)
        written = [file for file in scratch.rglob("*") if file.is_file()]
        for file in sorted(written, key=lambda f: (f.name == "config.json", f)):
            target = folder / file.relative_to(scratch)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
        for old in [*folder.glob("model-*-of-*.safetensors"), folder / "model.safetensors", folder / INDEX]:
            if old.name not in names:
                old.unlink(missing_ok=True)
    except OSError as error:
        if not is_full(error):
            raise
        need = sum(map(nbytes, tensors)) / 1e9
        raise CheckpointError(f"{folder}: the disk is full; what stood there before is untouched. The model needs {need:.2f} GB: free some space and save again") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if created and folder.exists() and not any(folder.iterdir()):
            folder.rmdir()


def is_full(error: BaseException) -> bool:
    """Whether an error says that there is no room left (disk, quota or file size limit)."""
    text = str(error)
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(s in text for s in ("No space left", "ENOSPC", "File too large", "Disk quota"))
