"""Making token shards: documents in, a store's folder out, several processes at a time. Interrupted, it goes on with the shards that are whole. Reading them: `store.py`."""
import hashlib
import json
import os
import pathlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from llmjax.core.errors import DataError
from llmjax.data.sources import Document
from llmjax.data.store import FORMAT, TokenStore, check_shard, open_store, read_json, write_file
from llmjax.data.tokenize import tokenize
from llmjax.tokenizers import Tokenizer

POOL_BYTES = 64 << 20
"""Text under this is tokenised in this process (the library uses all cores there); starting others would take longer."""


def make_store(documents: Iterable[Document], folder, identity: dict, tokenizer: Tokenizer, *, separator: str | None, empty: str, shard_bytes: int, workers: int,
               bar=None) -> TokenStore:
    """The store of these documents, made if it does not stand already. `identity` says what decides its contents, by name; `workers` processes; `bar` is told bytes of text as
    they pass.

    Raises what `tokenize` and `open_store` do, and DataError for a source without documents."""
    folder = pathlib.Path(folder)
    if (folder / "manifest.json").is_file():
        return open_store(folder, identity)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("*.partial"):
        leftover.unlink()
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    made_by = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    entries: list[dict] = []
    with _Pool(tokenizer, workers) as pool:
        waiting: deque[Future | dict] = deque()
        for index, (batch, text_hash, size) in enumerate(_groups(documents, shard_bytes)):
            name = f"shard-{index:05d}"
            waiting.append(_finished(folder, name, made_by, text_hash) or pool.submit(batch, folder, name, dtype, separator, empty, made_by, text_hash))
            while len(waiting) > 2 * workers:
                entries.append(_result(waiting.popleft()))
            if bar is not None:
                bar.update(size)
        entries += [_result(w) for w in waiting]
    counts = {key: sum(e[key] for e in entries) for key in ("documents", "tokens", "bytes", "skipped")}
    if not counts["documents"]:
        none = "the source is empty" if identity.get("part") != "validation" else f"none falls to {identity['validation']}: hold out more, or set Corpus.validation=None"
        raise DataError(f"there are no documents for {folder.name}: {none}" + (f" ({counts['skipped']} without text were left out)" if counts["skipped"] else ""))
    for stale in folder.glob("shard-*"):
        if stale.name.split(".")[0] not in {e["name"] for e in entries}:
            stale.unlink()
    contents = hashlib.sha256(json.dumps([e["files"] for e in entries], sort_keys=True).encode()).hexdigest()
    manifest = dict(format=FORMAT, made_from=identity, dtype=dtype, masked=any(f"{e['name']}.mask" in e["files"] for e in entries), hash=contents, **counts, shards=entries)
    write_file(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
    return open_store(folder, identity, verify=False)


def _groups(documents: Iterable[Document], shard_bytes: int) -> Iterator[tuple[list[Document], str, int]]:
    """Documents by shard: at least `shard_bytes` of text each (the last may hold less), with a hash of the text."""
    group, size, digest = [], 0, hashlib.blake2b(digest_size=16)
    for document in documents:
        content = (document.content if isinstance(document.content, str) else json.dumps(document.content, sort_keys=True)).encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8) + content)
        group.append(document)
        size += len(content)
        if size >= shard_bytes:
            yield group, digest.hexdigest(), size
            group, size, digest = [], 0, hashlib.blake2b(digest_size=16)
    if group:
        yield group, digest.hexdigest(), size


def _finished(folder: pathlib.Path, name: str, made_by: str, text_hash: str) -> dict | None:
    """The entry of a shard that an earlier run finished from the same text in the same way."""
    if not (folder / f"{name}.json").is_file():
        return None
    entry = read_json(folder / f"{name}.json")
    return entry if (entry.get("made_by"), entry.get("text_hash")) == (made_by, text_hash) and check_shard(folder, entry, True) is None else None


def _result(waiting) -> dict:
    try:
        return waiting.result() if isinstance(waiting, Future) else waiting
    except BrokenProcessPool:
        raise DataError("a tokenising process ended before its work was done: out of memory, or a script that builds data outside `if __name__ == '__main__':`; "
                        "workers=1 does all in this process, and finished shards are used again") from None


def write_shard(documents: list[Document], tokenizer: Tokenizer, folder: pathlib.Path, name: str, dtype: str, separator: str | None, empty: str, made_by: str,
                text_hash: str) -> dict:
    """Tokenises and writes one shard, its `.json` last. -> the entry for the manifest."""
    ids, masks, sizes, skipped = tokenize(documents, tokenizer, separator, empty)
    arrays = {"tokens": np.concatenate([np.zeros(0, np.uint32), *ids]).astype(dtype), "ends": np.cumsum([len(i) for i in ids], dtype=np.int64)}
    if masks is not None:
        arrays["mask"] = np.concatenate([np.zeros(0, bool), *masks]).astype(np.uint8)
    files = {f"{name}.{kind}": write_file(folder / f"{name}.{kind}", array.tobytes()) for kind, array in arrays.items()}
    entry = dict(name=name, documents=len(ids), tokens=len(arrays["tokens"]), bytes=sum(sizes), skipped=skipped, made_by=made_by, text_hash=text_hash, files=files)
    write_file(folder / f"{name}.json", json.dumps(entry).encode())
    return entry


_tokenizer: Tokenizer | None = None


def _start_worker(tokenizer: Tokenizer):
    global _tokenizer  # a worker process' own
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer = tokenizer


def _work(documents, *args) -> dict:
    assert _tokenizer is not None
    return write_shard(documents, _tokenizer, *args)


class _Pool:
    """`submit` runs `write_shard` in a process of its own, or here and now where there is one worker."""

    def __init__(self, tokenizer: Tokenizer, workers: int):
        self._tokenizer, self._executor = tokenizer, None
        if workers > 1:
            import multiprocessing
            self._executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (tokenizer,))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def submit(self, documents, *args):
        if self._executor is None:
            return write_shard(documents, self._tokenizer, *args)
        return self._executor.submit(_work, documents, *args)
