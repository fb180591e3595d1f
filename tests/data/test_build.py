"""From a corpus to batches: what is trained on and held out, shards that are used again, interrupted or damaged, several processes, masks, scoring."""
import json

import numpy as np
import pytest

from llmjax import data, tokenizers
from llmjax.core.errors import ConfigError, DataError
from llmjax.data import shards, split

DOCUMENTS = [f"document {i}: " + "some words and more " * (i % 7) + "é🙂" for i in range(60)]


@pytest.fixture
def source(tmp_path):
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in DOCUMENTS))
    return data.JsonLines(str(tmp_path / "x.jsonl"))


def make(corpus, folder, context=32, seed=0, **knobs):
    return data.build(corpus, folder, context=context, seed=seed, progress=False, **knobs)


def texts(part, tokenizer):
    """The documents behind a split, from its batches of long rows."""
    found = []
    for batch in part.batches(2):
        for t, s in zip(batch["tokens"], batch["segment_ids"]):
            found += [tokenizer.decode(t[s == k]) for k in range(1, s.max() + 1)]
    return found


@pytest.mark.parametrize("tokenizer", [data.Bytes(), data.TrainBpe(300)])
def test_every_document_once(source, tokenizer, tmp_path):
    made = make(data.Corpus(source, tokenizer, data.Fraction(0.3)), tmp_path / "d", context=512)
    train, held = texts(made.train, made.tokenizer), texts(made.validation, made.tokenizer)
    assert sorted(train + held) == sorted(d + "<|endoftext|>" for d in DOCUMENTS) and 5 < len(held) < 35
    assert made.train.documents == len(train) and made.train.bytes == sum(len(t[:-13].encode()) for t in train)


def test_tail_is_the_end_of_the_text(tmp_path):
    text = "".join(chr(97 + i % 26) for i in range(1000))
    (tmp_path / "x.txt").write_text(text)
    made = make(data.Corpus(data.TextFiles(str(tmp_path / "x.txt")), data.Characters(), data.Tail(0.1), data.Windows(), separator=None), tmp_path / "d", context=16)
    assert made.tokenizer.vocab_size == 26 and (made.train.tokens_per_epoch, made.validation.tokens_per_epoch) == (900, 100)
    got = np.concatenate([b["targets"][b["weights"] > 0] for b in made.validation.batches(4)])
    assert made.tokenizer.decode(got) == text[901:]
    many = data.TextFiles(str(tmp_path / "x.txt"), split="z")
    parts = ["".join(d.text for d in f(many, data.Tail(0.25))) for f in (split.training, split.held_out)]
    assert "".join(parts) == text.replace("z", "") and abs(len(parts[1]) - 240) < 3


def test_held_out_source_and_none(source, tmp_path):
    (tmp_path / "other.txt").write_text("something else")
    made = make(data.Corpus(source, data.Bytes(), data.HeldOut(data.TextFiles(str(tmp_path / "other.txt")))), tmp_path / "d", context=64)
    assert texts(made.validation, made.tokenizer) == ["something else<|endoftext|>"] and made.train.documents == 60
    assert make(data.Corpus(source, data.Bytes(), None), tmp_path / "e").validation is None


def test_separators(source, tmp_path):
    tokenizers.bytes_tokenizer(("<s>", "</s>"), bos="<s>", eos="</s>").save(tmp_path / "t")
    for separator, first, last in (("both", "<s>", "</s>"), ("bos", "<s>", ""), (None, "", "")):
        made = make(data.Corpus(source, data.TokenizerFile(str(tmp_path / "t")), None, separator=separator), tmp_path / f"d{separator}", context=512)
        assert sorted(texts(made.train, made.tokenizer)) == sorted(first + d + last for d in DOCUMENTS)


def test_made_once(source, tmp_path, monkeypatch):
    corpus = data.Corpus(source, data.TrainBpe(300), shard_bytes=500)
    one = make(corpus, tmp_path / "d")
    assert len(list((tmp_path / "d" / "train").glob("*.tokens"))) > 3
    monkeypatch.setattr(shards, "write_shard", None)
    monkeypatch.setattr(tokenizers, "train_bpe", None)
    two = make(corpus, tmp_path / "d")
    assert all(np.array_equal(one.train.batch(3, 4)[k], two.train.batch(3, 4)[k]) for k in one.train.batch(3, 4))


def test_interrupted_and_started_again(source, tmp_path, monkeypatch):
    corpus = data.Corpus(source, data.Bytes(), None, shard_bytes=500)
    whole = make(corpus, tmp_path / "whole")
    write, calls = shards.write_shard, []

    def breaks(*args):
        calls.append(1)
        if len(calls) == 4:
            (tmp_path / "d" / "train" / "shard-00099.tokens.partial").write_bytes(b"half")
            raise KeyboardInterrupt
        return write(*args)

    monkeypatch.setattr(shards, "write_shard", breaks)
    with pytest.raises(KeyboardInterrupt):
        make(corpus, tmp_path / "d")
    again = make(corpus, tmp_path / "d")
    total = len(list((tmp_path / "whole" / "train").glob("*.tokens")))
    assert len(calls) == 4 + total - 3  # the three that were whole were not done again
    assert not [p for p in (tmp_path / "d").rglob("*") if "partial" in p.name or "tmp" in p.name]
    assert again.train.fingerprint == whole.train.fingerprint
    assert sorted(p.name for p in (tmp_path / "d" / "train").iterdir()) == sorted(p.name for p in (tmp_path / "whole" / "train").iterdir())


def test_processes_give_the_same_shards(source, tmp_path):
    corpus = data.Corpus(source, data.TrainBpe(300), None, shard_bytes=700)
    one, two = make(corpus, tmp_path / "one"), make(corpus, tmp_path / "two", workers=2)
    assert one.train.fingerprint == two.train.fingerprint and one.train.rows_per_epoch == two.train.rows_per_epoch


@pytest.mark.parametrize("damage, words", [
    (lambda f: (f / "shard-00000.tokens").write_bytes((f / "shard-00000.tokens").read_bytes()[:-7]), "cut short"),
    (lambda f: (f / "shard-00000.ends").unlink(), "missing"),
    (lambda f: (f / "shard-00000.tokens").write_bytes(b"\x01" + (f / "shard-00000.tokens").read_bytes()[1:]), "hash differs"),
    (lambda f: (f / "manifest.json").write_text("{"), "damaged"),
    (lambda f: (f / "manifest.json").write_text('{"format": 0}'), "format 0"),
])
def test_damaged_shards(source, damage, words, tmp_path):
    corpus = data.Corpus(source, data.Bytes(), None)
    make(corpus, tmp_path / "d")
    damage(tmp_path / "d" / "train")
    with pytest.raises(DataError, match=words) as caught:
        make(corpus, tmp_path / "d")
    assert "\n" not in str(caught.value) and "delete" in str(caught.value)


def test_something_else_in_the_folder(source, tmp_path):
    import dataclasses
    corpus = data.Corpus(source, data.TrainBpe(300), None)
    make(corpus, tmp_path / "d")
    tokenizers.bytes_tokenizer().save(tmp_path / "t")
    for change, words in ((dict(tokenizer=data.TrainBpe(310)), "other tokenizer"), (dict(tokenizer=data.TokenizerFile(str(tmp_path / "t"))), "another tokenizer"),
                          (dict(separator=None), "another separator"),
                          (dict(validation=data.Fraction(0.5)), "other validation")):
        with pytest.raises(DataError, match=words):
            make(dataclasses.replace(corpus, **change), tmp_path / "d")
    (tmp_path / "x.jsonl").write_text('{"text": "changed"}\n')
    with pytest.raises(DataError, match="other sources"):
        make(corpus, tmp_path / "d")


def test_chat_learns_the_assistant(tmp_path):
    tokenizers.bytes_tokenizer(("<|im_start|>", "<|im_end|>"), eos="<|im_end|>").with_chat_template(tokenizers.CHATML).save(tmp_path / "t")
    chat = [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "Answer é"}]
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    corpus = data.Corpus(data.JsonLines(str(tmp_path / "x.jsonl"), data.Chat()), data.TokenizerFile(str(tmp_path / "t")), None)
    made = make(corpus, tmp_path / "d", context=128)
    batch = next(made.train.batches(1))
    assert made.tokenizer.decode(batch["targets"][batch["weights"] > 0]) == "Answer é<|im_end|>"
    assert batch["tokens"][0, :7].tolist() == made.tokenizer.encode("<|im_start|>user\nQ")[:7]
    (tmp_path / "y.jsonl").write_text(json.dumps({"messages": chat[:1]}) + "\n")
    with pytest.raises(DataError, match=r"y\.jsonl, line 1.*nothing to train on"):
        make(data.Corpus(data.JsonLines(str(tmp_path / "y.jsonl"), data.Chat()), data.TokenizerFile(str(tmp_path / "t")), None), tmp_path / "e")


def test_completion_learns_the_completion(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": "2+2=", "completion": "four"}) + "\n")
    field = data.Completion()
    made = make(data.Corpus(data.JsonLines(str(tmp_path / "x.jsonl"), field), data.Bytes(), None), tmp_path / "d")
    batch = next(made.train.batches(1))
    assert made.tokenizer.decode(batch["targets"][batch["weights"] > 0]) == "four<|endoftext|>"
    (tmp_path / "y.jsonl").write_text(json.dumps({"prompt": "2+2=", "completion": ""}) + "\n")
    with pytest.raises(DataError, match="empty completion"):
        make(data.Corpus(data.JsonLines(str(tmp_path / "y.jsonl"), field), data.Bytes(), None), tmp_path / "e")


def test_mixture_of_kinds(source, tmp_path):
    (tmp_path / "y.jsonl").write_text("".join(json.dumps({"prompt": f"p{i}", "completion": f"c{i}"}) + "\n" for i in range(30)))
    mixture = data.Mixture((data.Part(source, 3.0), data.Part(data.JsonLines(str(tmp_path / "y.jsonl"), data.Completion()), 1.0)))
    made = make(data.Corpus(mixture, data.TrainBpe(300), data.Fraction(0.2)), tmp_path / "d", context=64)
    drawn = [made.train.row(i)[0] for i in range(1024)]
    assert drawn.count(0) == 768 and len(made.validation.pieces) == 2


@pytest.mark.parametrize("corpus, knobs, error, words", [
    (lambda s: data.Corpus(s, data.Characters()), {}, ConfigError, "no eos token"), (lambda s: data.Corpus(s), {"context": 1}, ConfigError, "context 1"),
    (lambda s: data.Corpus(s, data.Bytes(), data.Fraction(1e-9)), {}, DataError, "no documents for validation.*hold out more"),
    (lambda s: data.Corpus(s, data.TrainBpe(100)), {}, ConfigError, "vocab_size 100"),
    (lambda s: data.Corpus(s), {"workers": 0}, ConfigError, "workers 0"),
])
def test_errors(source, corpus, knobs, error, words, tmp_path):
    with pytest.raises(error, match=words):
        make(corpus(source), tmp_path / "d", **knobs)


def test_empty_documents(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": ""}\n')
    source = data.JsonLines(str(tmp_path / "x.jsonl"))
    with pytest.raises(DataError, match="line 2 is empty"):
        make(data.Corpus(source, data.Bytes(), None), tmp_path / "d")
    assert make(data.Corpus(source, data.Bytes(), None, empty="skip"), tmp_path / "e").train.documents == 1
    assert json.loads((tmp_path / "e" / "train" / "manifest.json").read_text())["skipped"] == 1
    (tmp_path / "z.jsonl").write_text('{"prompt": "", "completion": ""}\n{"prompt": "a", "completion": "b"}\n')
    for made in (make(data.Corpus(source, data.Bytes(), None, empty="skip", shard_bytes=1), tmp_path / "g"),
                 make(data.Corpus(data.JsonLines(str(tmp_path / "z.jsonl"), data.Completion()), data.Bytes(), None, empty="skip", shard_bytes=1), tmp_path / "h")):
        assert made.train.documents == 1 and next(made.train.batches(1))["weights"].sum() >= 1
    (tmp_path / "y.jsonl").write_text("\n")
    with pytest.raises(DataError, match="the source is empty"):
        make(data.Corpus(data.JsonLines(str(tmp_path / "y.jsonl")), data.Bytes(), None), tmp_path / "f")


def test_scoring_counts_every_byte():
    tokenizer = tokenizers.bytes_tokenizer()
    batches = list(data.scoring_batches(iter(DOCUMENTS), tokenizer, context=48, batch_size=4))
    assert sum(data.scored_bytes(b, tokenizer.token_lengths()) for b in batches) == sum(len(d.encode()) for d in DOCUMENTS)
    assert all(b["tokens"].shape == (4, 48) for b in batches)
    whole = sorted(d for b in data.scoring_batches(DOCUMENTS, tokenizer, context=512, batch_size=2) for y, s in zip(b["targets"], b["segment_ids"])
                   for d in [tokenizer.decode(y[s == k][:-1]) for k in range(1, s.max() + 1)])
    assert whole == sorted(DOCUMENTS)
    with pytest.raises(DataError, match="empty"):
        list(data.scoring_batches([], tokenizer, context=8, batch_size=1))
