"""From a `Corpus` to a `Dataset`: the tokenizer, the shards, the plans. Everything that takes long stays in the folder and is used again."""
import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator

from llmjax import tokenizers
from llmjax.core.errors import ConfigError, DataError
from llmjax.data import sources, split
from llmjax.data.config import Bytes, Characters, Corpus, HeldOut, TokenizerFile, TrainBpe
from llmjax.data.dataset import Dataset, Piece, Split
from llmjax.data.packing import make_plan
from llmjax.data.shards import POOL_BYTES, make_store
from llmjax.data.store import read_json, write_file
from llmjax.tokenizers import Tokenizer


def build(corpus: Corpus, folder, *, context: int, seed: int, progress: bool = True, workers: int | None = None) -> Dataset:
    """Makes, or finds in `folder`, the tokenizer and the token shards of a corpus, and plans its rows of `context` tokens in the order of `seed`.

    `workers`: processes for tokenising (default: one per core; text under 64 MB is done in this one). Several machines on one disk: let the first finish before the others begin.
    Raises ConfigError, FileNotFoundError and DataError (one line each) for what the sources, the tokenizer or shards of another corpus in the folder have wrong."""
    if context < 2:
        raise ConfigError(f"context {context} is too small: a row needs a token and the one after it, at least 2")
    if workers is not None and workers < 1:
        raise ConfigError(f"workers {workers} must be at least 1")
    folder = pathlib.Path(folder)
    signatures = [sources.signature(part.source) for part in corpus.parts]
    tokenizer = make_tokenizer(corpus, folder, signatures, progress)
    held = corpus.validation

    def store(name: str, source, signature: str, part: str, documents: Iterator):
        identity = dict(tokenizer=tokenizer.fingerprint, source=signature, validation=repr(held), part=part, separator=corpus.separator, empty=corpus.empty)
        size = sources.size_on_disk(source)
        count = 1 if size < POOL_BYTES and workers is None else workers or os.cpu_count() or 1
        with _bar(progress, size, f"tokenising {name}") as bar:
            return make_store(documents, folder / name, identity, tokenizer, separator=corpus.separator, empty=corpus.empty,
                              shard_bytes=corpus.shard_bytes, workers=count, bar=bar)

    train, validation = [], []
    for i, (part, signature) in enumerate(zip(corpus.parts, signatures)):
        stem = "" if len(corpus.parts) == 1 else f"-{i:02d}"
        made = store(f"train{stem}", part.source, signature, "train", split.training(part.source, held))
        train.append(Piece(made, make_plan(corpus.packing, made.document_starts, context), part.weight))
        if held is not None and not isinstance(held, HeldOut):
            made = store(f"validation{stem}", part.source, signature, "validation", split.held_out(part.source, held))
            validation.append(Piece(made, make_plan(corpus.packing, made.document_starts, context), part.weight))
    if isinstance(held, HeldOut):
        made = store("validation", held.source, sources.signature(held.source), "held out", split.held_out(None, held))
        validation.append(Piece(made, make_plan(corpus.packing, made.document_starts, context), 1.0))
    return Dataset(tokenizer, Split(train, context, seed), Split(validation, context, seed) if validation else None)


def make_tokenizer(corpus: Corpus, folder, signatures: list[str] | None = None, progress: bool = True) -> Tokenizer:
    """The corpus' tokenizer: read from its file, or trained on the training part and kept in `folder/tokenizer`. Raises DataError where the folder keeps one made from something
    else."""
    spec, folder = corpus.tokenizer, pathlib.Path(folder)
    if isinstance(spec, TokenizerFile):
        return tokenizers.load(spec.path)
    if isinstance(spec, Bytes):
        return tokenizers.bytes_tokenizer(spec.special_tokens, eos=spec.eos)
    signatures = signatures or [sources.signature(part.source) for part in corpus.parts]
    made_from = dict(tokenizer=repr(spec), sources=signatures, validation=repr(corpus.validation))
    home, record = folder / "tokenizer", folder / "tokenizer" / "made_from.json"
    if record.is_file():
        before = read_json(record)
        for name, value in made_from.items():
            if before.get(name) != value:
                raise DataError(f"the tokenizer in {home} was made from other {name} ({str(before.get(name))[:80]}, now {str(value)[:80]}): "
                                f"delete the folder {folder}, or use another one")
        return tokenizers.load(home)
    made = _characters(corpus) if isinstance(spec, Characters) else _bpe(corpus, spec, progress)
    part = folder / "tokenizer.partial"
    shutil.rmtree(part, ignore_errors=True)
    made.save(part)
    write_file(part / "made_from.json", json.dumps(made_from).encode())
    shutil.rmtree(home, ignore_errors=True)
    part.replace(home)
    return made


def _characters(corpus: Corpus) -> Tokenizer:
    held = [corpus.validation.source] if isinstance(corpus.validation, HeldOut) else []
    return tokenizers.characters_tokenizer(text for source in [*(p.source for p in corpus.parts), *held] for text in sources.documents(source))


def _bpe(corpus: Corpus, spec: TrainBpe, progress: bool) -> Tokenizer:
    whole = sum(part.weight for part in corpus.parts)
    quota = [int(spec.max_bytes * part.weight / whole) for part in corpus.parts]

    def texts(tell: Callable[[int], object]) -> Iterator[str]:
        for part, most in zip(corpus.parts, quota):
            for document in split.training(part.source, corpus.validation):
                size = len(document.text.encode("utf-8", "surrogatepass"))
                if (most := most - size) < 0:
                    break
                tell(size)
                yield document.text

    total = sum(min(most, sources.size_on_disk(part.source)) for part, most in zip(corpus.parts, quota))
    with _bar(progress, total, f"training a tokenizer of {spec.vocab_size}") as bar:
        knobs = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec) if f.name in ("eos", "bos", "pad", "chat_template")}
        return tokenizers.train_bpe(texts(bar.update), spec.vocab_size, spec.special_tokens, **knobs)


def _bar(progress: bool, total: int, words: str):
    from tqdm import tqdm
    return tqdm(total=total, desc=words, unit="B", unit_scale=True, unit_divisor=1024, disable=None if progress else True, leave=False, mininterval=0.5)
