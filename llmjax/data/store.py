"""Token shards: memory-mapped ids with an index of documents and a manifest. Reading and checking here; making them in `build.py`.

A store is a folder: `shard-00000.tokens` (uint16 or uint32), `.ends` (int64: where each document ends in the shard), `.mask` (uint8, where not all is learnt), `.json` (counts
and hashes of the three), and `manifest.json`, which stands once all is done and names what the shards were made from.
"""
import hashlib
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from llmjax.core.errors import DataError

FORMAT = 1
CHECK_BYTES = 256 << 20
"""Stores up to this size are hashed whole when opened (a fraction of a second); of larger ones sizes are checked, and all on `verify`."""


class TokenStore:
    """Documents of ids, one after the other: `length` tokens in all, `document_starts` [documents + 1] int64."""

    def __init__(self, tokens: Sequence[np.ndarray], ends: Sequence[np.ndarray], masks: Sequence[np.ndarray] | None, hash: str, bytes: int):
        """Arrays by shard; `ends` within each shard; `hash` names the contents; `bytes` of text."""
        sizes = np.array([0, *(len(t) for t in tokens)], np.int64).cumsum()
        self._tokens, self._masks, self._shard_starts = list(tokens), None if masks is None else list(masks), sizes
        self.document_starts = np.concatenate([np.zeros(1, np.int64), *(np.asarray(e, np.int64) + s for e, s in zip(ends, sizes))])
        self.length, self.hash, self.bytes = int(sizes[-1]), hash, bytes

    @classmethod
    def of(cls, documents: Sequence[np.ndarray], masks: Sequence[np.ndarray] | None = None, bytes: int = 0) -> "TokenStore":
        """A store in memory."""
        tokens = np.concatenate([np.zeros(0, np.uint32), *documents]).astype(np.uint32)
        ends = np.cumsum([len(d) for d in documents], dtype=np.int64)
        return cls([tokens], [ends], None if masks is None else [np.concatenate(masks).astype(np.uint8)], hashlib.sha256(tokens.tobytes() + ends.tobytes()).hexdigest(), bytes)

    @property
    def documents(self) -> int:
        return len(self.document_starts) - 1

    @property
    def masked(self) -> bool:
        return self._masks is not None

    def read(self, start: int, length: int) -> np.ndarray:
        """Ids [length] from a place counted over all shards."""
        return self._read(self._tokens, start, length)

    def read_mask(self, start: int, length: int) -> np.ndarray:
        """1 where an id is learnt [length] uint8; only of a masked store."""
        return self._read(self._masks, start, length)

    def _read(self, arrays, start: int, length: int) -> np.ndarray:
        shard = int(np.searchsorted(self._shard_starts, start, "right")) - 1
        at = start - int(self._shard_starts[shard])
        piece = arrays[shard][at:at + length]
        if len(piece) == length:
            return piece
        return np.concatenate([piece, self._read(arrays, start + len(piece), length - len(piece))])


def digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def read_json(path: pathlib.Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise DataError(f"{path} is damaged (no JSON): delete the folder {path.parent} and the data is made again") from None


def check_shard(folder: pathlib.Path, entry: dict, whole: bool) -> str | None:
    """What is wrong with a shard's files, or None. `whole`: their contents too."""
    for name, (size, known) in entry["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes where the manifest says {size}: it is cut short or was changed"
        if whole and digest(path) != known:
            return f"{path} does not hold what was written (its hash differs from the manifest's)"
    return None


def open_store(folder, identity: dict | None = None, verify: bool | None = None) -> TokenStore:
    """The store in a folder. `identity` is what it should have been made from; `verify` hashes all contents (default: where they are small, `CHECK_BYTES`).

    Raises FileNotFoundError without a manifest, DataError for a missing, truncated or changed shard and for a store made from something else."""
    folder = pathlib.Path(folder)
    if not (folder / "manifest.json").is_file():
        raise FileNotFoundError(f"no token shards in {folder} (no manifest.json)")
    manifest = read_json(folder / "manifest.json")
    if manifest.get("format") != FORMAT:
        raise DataError(f"{folder} was written in shard format {manifest.get('format')}, this version reads {FORMAT}: delete the folder and the data is made again")
    for name, value in (identity or {}).items():
        if manifest["made_from"].get(name) != value:
            kept = str(manifest["made_from"].get(name))
            raise DataError(f"the token shards in {folder} were made from another {name} ({kept[:80]!r}, now {str(value)[:80]!r}): delete the folder, or use another one")
    size = sum(size for entry in manifest["shards"] for size, _ in entry["files"].values())
    for entry in manifest["shards"]:
        wrong = check_shard(folder, entry, size <= CHECK_BYTES if verify is None else verify)
        if wrong:
            raise DataError(f"{wrong}; delete the folder {folder} and the data is made again")

    def load(entry, suffix, dtype):
        name = f"{entry['name']}.{suffix}"
        return np.memmap(folder / name, dtype, "r").view(np.ndarray) if entry["files"].get(name, [0])[0] else np.zeros(0, dtype)

    shards = manifest["shards"]
    return TokenStore([load(s, "tokens", manifest["dtype"]) for s in shards], [load(s, "ends", "int64") for s in shards],
                      [load(s, "mask", "uint8") for s in shards] if manifest["masked"] else None, manifest["hash"], manifest["bytes"])


def write_file(path: pathlib.Path, data: bytes) -> tuple[int, str]:
    """Writes under a temporary name, renames when whole. -> (bytes, hash). Raises DataError where the disk is full."""
    part = path.with_name(path.name + ".partial")
    try:
        with part.open("wb") as file:
            file.write(data)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise DataError(f"cannot write {path}: {error.strerror}; finished shards stay and are used again") from None
    return len(data), hashlib.blake2b(data, digest_size=16).hexdigest()
