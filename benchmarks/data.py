"""What the data room does in a second, beside named peers on the same work: packing and reading against Grain's best-fit packer, tokenising into shards against `tokenizers` alone.

    python benchmarks/data.py [--megabytes=8] [--context=1024] [--batch=8] [--rounds=3] [--save]

Prints one JSON line. Expect, on two cores: packing and reading five to ten times Grain's, rows fuller; tokenising 0.8 to 1 of what `tokenizers` does without writing
anything.
"""
import pathlib
import tempfile

import common
import numpy as np

from llmjax import data
from llmjax.data import shards, sources
from llmjax.data.dataset import Piece, Split
from llmjax.data.packing import best_fit


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
    parser = common.parser(__doc__, rounds=3)
    parser.add_argument("--megabytes", type=float, default=8)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    megabytes, vocabulary = (0.3, 512) if args.smoke else (args.megabytes, 8192)
    documents = []
    for document in sources.records(data.StandardLibrary(int(megabytes * 1e6))):  # cut into stretches of the lengths that web pages have, so that there is something to pack
        rng, at = np.random.default_rng(len(documents)), 0
        while at < len(document.text):
            size = int(rng.lognormal(7.0, 1.0)) + 50
            documents.append(sources.Document(document.text[at:at + size], document.place))
            at += size
    texts = [d.text for d in documents]
    size = sum(len(t.encode()) for t in texts)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = data.make_tokenizer(data.Corpus(data.StandardLibrary(int(min(2, megabytes) * 1e6)), data.TrainBpe(vocabulary), None), folder, progress=False)
        runs = iter(range(1000))
        knobs = dict(separator="eos", empty="error", shard_bytes=4_000_000, workers=1)
        writing, made = common.turns({
            "llmjax into shards": lambda: shards.make_store(documents, pathlib.Path(folder, f"run{next(runs)}"), {}, tokenizer, **knobs),
            "tokenizers, nothing written": lambda: sum(len(tokenizer.backend.encode_batch(texts[i:i + 1000], add_special_tokens=False)) for i in range(0, len(texts), 1000)),
        }, args.rounds, warm=1)
        store = made["llmjax into shards"]
        packing, packed = common.turns({"llmjax": lambda: ours(store, args.context, args.batch), "grain BestFitPackIterDataset": lambda: grains(store, args.context, args.batch)},
                                       args.rounds, warm=1)
        planning, plans = common.turns({"plan": lambda: best_fit(store.document_starts, args.context)}, args.rounds, warm=1)
        split = Split([Piece(store, plans["plan"], 1.0)], args.context, 0)
        batches = max(1, plans["plan"].rows // 64)
        reading, _ = common.turns({"read": lambda: sum(len(split.batch(i, 64)["tokens"]) for i in range(batches))}, args.rounds, warm=1)
    rows = [common.row(f"packing and reading rows of {args.context:,} tokens", "Mtok/s", {name: packed[name][0] / s / 1e6 for name, s in packing.items()}, more_is_better=True),
            common.row("tokenising, one process", "MB/s", {name: size / s / 1e6 for name, s in writing.items()}, more_is_better=True)]
    common.emit("data", args, rows, ("grain", "tokenizers", "numpy"), megabytes=round(size / 1e6, 2), documents=len(texts), tokens=store.length, batch=args.batch,
                row_fill={name: round(tokens / count / args.context, 4) for name, (tokens, count) in packed.items()},
                plan_mtok_s=round(store.length / planning["plan"] / 1e6, 1), read_krows_s_batch_64=round(batches * 64 / reading["read"] / 1e3, 1))


if __name__ == "__main__":
    main()
