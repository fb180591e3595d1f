"""What the data room does in a second, beside named peers on the same work: packing and reading against Grain's best-fit packer, tokenising into shards against `tokenizers` alone.

    python benchmarks/data.py [--megabytes=8] [--context=1024] [--batch=8] [--repeats=3]

Prints one JSON line. Expect, on two cores: packing and reading five to ten times Grain's, rows fuller; tokenising 0.8 to 1 of what `tokenizers` does without writing
anything. """
import argparse
import json
import os
import pathlib
import platform
import tempfile
import time
from importlib.metadata import version

import numpy as np

from llmjax import data
from llmjax.data import shards, sources
from llmjax.data.dataset import Piece, Split
from llmjax.data.packing import best_fit


def best(function, repeats):
    """The shortest of some runs, in seconds, and what it gave."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - begin)
    return min(times), result


def ours(store, context, batch):
    """Plan, then every row of an epoch through the loader. -> tokens, rows"""
    split = Split([Piece(store, best_fit(store.document_starts, context), 1.0)], context, 0)
    loader, tokens = split.loader(batch), 0
    for _ in range(split.rows_per_epoch // batch):
        tokens += int((next(loader)["segment_ids"] > 0).sum())
    return tokens, split.rows_per_epoch // batch * batch


def grains(store, context, batch):
    """The same documents through Grain's packer. -> tokens, rows"""
    import grain
    begins, ends = store.document_starts[:-1].tolist(), store.document_starts[1:].tolist()
    stretches = [(a, min(a + context, b)) for begin, b in zip(begins, ends) for a in range(begin, b, context)]  # Grain's refuses documents longer than a row

    class Documents:
        def __len__(self):
            return len(stretches)

        def __getitem__(self, i):
            a, b = stretches[i]
            return {"tokens": store.read(a, b - a).astype(np.int32)}

    rows = grain.MapDataset.source(Documents()).shuffle(0).to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=64))
    packed = grain.experimental.BestFitPackIterDataset(rows, length_struct={"tokens": context}, num_packing_bins=64)
    tokens = count = 0
    for element in packed.batch(batch, drop_remainder=True):
        tokens += int((element["tokens_segment_ids"] > 0).sum() if "tokens_segment_ids" in element else (element["tokens"][1] > 0).sum())
        count += batch
    return tokens, count


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=8)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    documents = []
    for document in sources.records(data.StandardLibrary(int(args.megabytes * 1e6))):  # cut into stretches of the lengths that web pages have, so that there is something to pack
        rng, at = np.random.default_rng(len(documents)), 0
        while at < len(document.text):
            size = int(rng.lognormal(7.0, 1.0)) + 50
            documents.append(sources.Document(document.text[at:at + size], document.place))
            at += size
    texts = [d.text for d in documents]
    size = sum(len(t.encode()) for t in texts)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = data.make_tokenizer(data.Corpus(data.StandardLibrary(2_000_000), data.TrainBpe(8192), None), folder, progress=False)
        runs = iter(range(1000))
        knobs = dict(separator="eos", empty="error", shard_bytes=4_000_000, workers=1)
        shard_time, store = best(lambda: shards.make_store(documents, pathlib.Path(folder, f"run{next(runs)}"), {}, tokenizer, **knobs), args.repeats)
        plain_time, _ = best(lambda: [tokenizer.backend.encode_batch(texts[i:i + 1000], add_special_tokens=False) for i in range(0, len(texts), 1000)], args.repeats)
        plan_time, plan = best(lambda: best_fit(store.document_starts, args.context), args.repeats)
        our_time, (our_tokens, our_rows) = best(lambda: ours(store, args.context, args.batch), args.repeats)
        their_time, (their_tokens, their_rows) = best(lambda: grains(store, args.context, args.batch), args.repeats)
        split = Split([Piece(store, plan, 1.0)], args.context, 0)
        read_time, _ = best(lambda: [split.batch(i, 64) for i in range(max(1, plan.rows // 64))], args.repeats)
    print(json.dumps({
        "benchmark": "data", "megabytes": round(size / 1e6, 2), "documents": len(texts), "tokens": store.length, "context": args.context, "batch": args.batch,
        "pack_and_read_mtok_s": {"llmjax": round(our_tokens / our_time / 1e6, 2), "grain BestFitPackIterDataset": round(their_tokens / their_time / 1e6, 2),
                                 "ratio": round(our_tokens / our_time / (their_tokens / their_time), 2)},
        "row_fill": {"llmjax": round(our_tokens / our_rows / args.context, 4), "grain": round(their_tokens / their_rows / args.context, 4)},
        "plan_mtok_s": round(store.length / plan_time / 1e6, 1), "read_krows_s_batch_64": round(max(1, plan.rows // 64) * 64 / read_time / 1e3, 1),
        "tokenise_mb_s": {"llmjax into shards": round(size / shard_time / 1e6, 2), "tokenizers encode_batch": round(size / plain_time / 1e6, 2),
                          "ratio": round(plain_time / shard_time, 2)},
        "hardware": {"cpu": cpu(), "cores": os.cpu_count()}, "versions": {name: version(name) for name in ("grain", "tokenizers", "numpy")} | {"python": platform.python_version()},
    }))


def cpu():
    info = pathlib.Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
