"""Reading documents from files: paths to records, records to what is learnt. Order is deterministic. Not here: ids (`tokenize.py`), splits into training and held-out text
(`split.py`)."""
import dataclasses
import glob
import gzip
import hashlib
import io
import json
import pathlib
import sys
import sysconfig
from collections.abc import Iterator
from functools import singledispatch

from llmjax.core.errors import ConfigError, DataError, nearest
from llmjax.data.config import Chat, Completion, Field, JsonLines, Mixture, Parquet, Single, Source, StandardLibrary, TextFiles, Tfds

JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".json.gz", ".json.zst")
_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "encodings", "ensurepip", "turtledemo", "pydoc_data", "_vendor", "tkinter"}


@dataclasses.dataclass(frozen=True)
class Document:
    """One document before it is tokenised: a text, {"prompt", "completion"}, or a list of messages; `place` says where it came from, for errors."""
    content: str | dict | list
    place: str

    @property
    def text(self) -> str:
        """Its text without a template: what a tokenizer is trained on and what is counted as bytes."""
        if isinstance(self.content, str):
            return self.content
        if isinstance(self.content, dict):
            return self.content["prompt"] + self.content["completion"]
        return "\n".join(m["content"] if isinstance(m.get("content"), str) else json.dumps(m.get("content")) for m in self.content)


def documents(source: Source) -> Iterator[str]:
    """The texts of a source, in order (of a mixture: part after part). Raises DataError, FileNotFoundError, ConfigError as `records` does."""
    for part in source.parts if isinstance(source, Mixture) else [None]:
        for document in records(part.source if part else source):
            yield document.text


def expand(paths: tuple[str, ...] | str, suffixes: tuple[str, ...]) -> list[pathlib.Path]:
    """Files, globs and folders to files, each once, in the order given, folders and globs sorted. Raises FileNotFoundError for a path that leads to no file."""
    found: dict[pathlib.Path, None] = {}
    for given in (paths,) if isinstance(paths, (str, pathlib.Path)) else paths:
        path = pathlib.Path(given).expanduser()
        if path.is_file():
            files = [path]
        elif path.is_dir():
            files = sorted(f for f in path.rglob("*") if f.is_file() and f.name.endswith(suffixes))
            if not files:
                raise FileNotFoundError(f"no file below {path} ends in {', '.join(suffixes)}")
        else:
            files = sorted(pathlib.Path(p) for p in glob.glob(str(path), recursive=True) if pathlib.Path(p).is_file())
            if not files:
                raise FileNotFoundError(f"no file at {path}")
        found |= dict.fromkeys(files)
    if not found:
        raise ConfigError("a source names no paths")
    return list(found)


def _open(path: pathlib.Path) -> io.BufferedIOBase:
    """The file's bytes, unpacked where its name says so."""
    if path.name.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.name.endswith((".zst", ".zstd")):
        import zstandard
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(path.open("rb"), closefd=True, read_across_frames=True))
    return path.open("rb")


def _damaged(path, error) -> DataError:
    return DataError(f"{path} is damaged: {str(error)[:160]}")


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{place} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; convert it, for instance with iconv") from None


def learnt(record: dict, field: Field, place: str) -> Document:
    """What of a record is learnt. Raises DataError for a missing field (with the nearest one there is) or one of another type."""
    def get(name: str, kind: type):
        if name not in record:
            raise DataError(f"{place} has no field {name!r}{nearest(name, map(str, record))}")
        value = record[name]
        value = _decode(value, place) if isinstance(value, bytes) and kind is str else value
        if not isinstance(value, kind):
            raise DataError(f"{place}: field {name!r} is {type(value).__name__}, not {'text' if kind is str else 'a list of messages'}")
        return value

    if isinstance(field, Chat):
        messages = get(field.field, list)
        for i, message in enumerate(messages):
            if not isinstance(message, dict) or "role" not in message:
                raise DataError(f"{place}: message {i} is no object with 'role' and 'content': {str(message)[:60]!r}")
        return Document(messages, place)
    if isinstance(field, Completion):
        return Document({"prompt": get(field.prompt, str), "completion": get(field.completion, str)}, place)
    return Document(get(field, str), place)


@singledispatch
def records(source) -> Iterator[Document]:
    """The documents of one source, in a fixed order.

    Raises FileNotFoundError for a path that is not there, DataError for text that is not UTF-8, a damaged file, a line that is no JSON object, a missing field (place and line
    named)."""
    raise ConfigError(f"{type(source).__name__} is not a source of documents")


@records.register
def _(source: TextFiles) -> Iterator[Document]:
    for path in expand(source.paths, source.suffixes):
        try:
            with _open(path) as file:
                data = file.read()
        except (OSError, EOFError, _zstd_error()) as error:
            raise _damaged(path, error) from None
        text = _decode(data, str(path))
        for i, piece in enumerate([text] if source.split is None else text.split(source.split)):
            if source.split is None or piece:  # between two separators side by side stands no document
                yield Document(piece, str(path) if source.split is None else f"{path}, part {i + 1}")


def _zstd_error():
    import zstandard
    return zstandard.ZstdError


@records.register
def _(source: JsonLines) -> Iterator[Document]:
    for path in expand(source.paths, JSON_SUFFIXES):
        try:
            with _open(path) as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _json_line(line, source.field, f"{path}, line {number}")
        except (OSError, EOFError, _zstd_error()) as error:
            raise _damaged(path, error) from None


def _json_line(line: bytes, field: Field, place: str) -> Document:
    text = _decode(line, place)
    try:
        record = json.loads(text)
    except ValueError as error:
        raise DataError(f"{place} is no JSON: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"{place} is a JSON {type(record).__name__}, not an object")
    return learnt(record, field, place)


@records.register
def _(source: Parquet) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet
    wanted = {Chat: lambda f: [f.field], Completion: lambda f: [f.prompt, f.completion]}.get(type(source.field), lambda f: [f])(source.field)
    for path in expand(source.paths, (".parquet",)):
        try:
            file = pyarrow.parquet.ParquetFile(path)
            columns = file.schema_arrow.names
        except (pyarrow.ArrowException, OSError) as error:
            raise _damaged(path, error) from None
        for name in wanted:
            if name not in columns:
                raise DataError(f"{path} has no column {name!r}{nearest(name, columns)}")
        number = 0
        try:
            for batch in file.iter_batches(batch_size=1024, columns=wanted):
                for record in batch.to_pylist():
                    number += 1
                    yield learnt(record, source.field, f"{path}, row {number}")
        except (pyarrow.ArrowException, OSError) as error:
            raise _damaged(path, error) from None


def tfds_builder(source: Tfds):
    """The TFDS builder of what is prepared on disk. Raises FileNotFoundError where nothing is, ConfigError without a name and folder."""
    import tensorflow_datasets
    folder = pathlib.Path(source.data_dir).expanduser() if source.data_dir else None
    if folder is not None and (folder / "dataset_info.json").is_file():
        return tensorflow_datasets.builder_from_directory(str(folder))
    if source.name is None:
        raise ConfigError(f"Tfds: data_dir {source.data_dir!r} is not the folder of a prepared version (no dataset_info.json), and no name is given")
    root = folder or pathlib.Path("~/tensorflow_datasets").expanduser()
    versions = sorted((root / source.name).rglob("dataset_info.json"))
    if not versions:
        raise FileNotFoundError(f"TFDS data set {source.name!r} is not prepared below {root}: give data_dir, or prepare it with file_format='array_record'")
    return tensorflow_datasets.builder_from_directory(str(versions[-1].parent))


@records.register
def _(source: Tfds) -> Iterator[Document]:
    builder = tfds_builder(source)
    known = list(builder.info.splits)
    if source.split.split("[")[0] not in known:
        raise DataError(f"Tfds split {source.split!r} is not in {builder.info.full_name}{nearest(source.split, known)}")
    try:
        rows = builder.as_data_source(split=source.split)
    except (NotImplementedError, ValueError) as error:
        raise DataError(f"{builder.info.full_name} cannot be read at random (prepare it with file_format='array_record'): {str(error)[:160]}") from None
    for start in range(0, len(rows), 1024):  # many at a time: one at a time gets slow in large files
        for offset, record in enumerate(rows.__getitems__(list(range(start, min(start + 1024, len(rows)))))):
            yield learnt(_listed(record), source.field, f"{builder.info.full_name}, {source.split} {start + offset}")


def _listed(value):
    """TFDS gives sequences of records as a record of sequences, and text as bytes: turned into lists of records and text."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, dict):
        return {k: _rows(v) if isinstance(v, dict) else _listed(v) for k, v in value.items()}
    if hasattr(value, "tolist"):
        return _listed(value.tolist())
    return [_listed(v) for v in value] if isinstance(value, list) else value


def _rows(columns: dict):
    columns = {k: _listed(v) for k, v in columns.items()}
    return [dict(zip(columns, row)) for row in zip(*columns.values())] if all(isinstance(v, list) for v in columns.values()) else columns


@records.register
def _(source: StandardLibrary) -> Iterator[Document]:
    left = source.max_bytes
    for path in _library_files():
        data = path.read_bytes()
        if len(data) <= 64 or len(data) > 400_000 or len(data) > left:  # empty, or a table
            continue
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:  # a few of Python's modules declare another encoding
            continue
        left -= len(data)
        yield Document(text, f"the standard library's {path.name}")


def _library_files() -> list[pathlib.Path]:
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    return sorted((p for p in root.rglob("*.py") if not _LEFT_OUT & set(p.relative_to(root).parts)), key=lambda p: p.relative_to(root).as_posix())


def signature(source: Single) -> str:
    """A hash of what a source says and of the files behind it: names, sizes and contents (of files over 16 MB: sixteen stretches of 1 MB). A changed source has another."""
    files_apart = dataclasses.replace(source, paths=()) if isinstance(source, (TextFiles, JsonLines, Parquet)) else source
    digest = hashlib.sha256(repr(files_apart).encode())
    if isinstance(source, Tfds):
        info = tfds_builder(source).info
        digest.update(repr([info.full_name, [(name, s.num_examples, s.num_bytes) for name, s in sorted(info.splits.items())]]).encode())
        return digest.hexdigest()
    if isinstance(source, StandardLibrary):  # installed files do not change under one version
        digest.update(repr([sys.version, [(path.name, path.stat().st_size) for path in _library_files()]]).encode())
        return digest.hexdigest()
    for path in _files(source):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for k in range(1 if size <= 16 << 20 else 16):
                file.seek(0 if size <= 16 << 20 else (size - (1 << 20)) * k // 15)
                digest.update(file.read(16 << 20 if size <= 16 << 20 else 1 << 20))
    return digest.hexdigest()


def size_on_disk(source: Single) -> int:
    """Bytes of the files behind a source, as they lie there: for progress and to choose how many workers."""
    if isinstance(source, Tfds):
        return int(tfds_builder(source).info.splits[source.split.split("[")[0]].num_bytes)
    if isinstance(source, StandardLibrary):
        return source.max_bytes
    return sum([p.stat().st_size for p in _files(source)])


def _files(source: TextFiles | JsonLines | Parquet) -> list[pathlib.Path]:
    return expand(source.paths, {TextFiles: getattr(source, "suffixes", ()), JsonLines: JSON_SUFFIXES, Parquet: (".parquet",)}[type(source)])
