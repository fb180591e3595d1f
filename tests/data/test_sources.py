"""Every kind of source gives the documents that were put in; what is wrong with one is named in one line."""
import gzip
import json

import pytest
import zstandard

from llmjax import data
from llmjax.core.errors import ConfigError, DataError
from llmjax.data.sources import records, signature

TEXTS = ["first café", "second 🙂\nline", "third", "4 東京"]


def lines(field="text"):
    return "".join(json.dumps({field: t, "other": 1}) + "\n" for t in TEXTS).encode()


def write_tfds(folder, form="array_record"):
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        name = "tiny"

        def _info(self):
            turns = tfds.features.Sequence({"role": tfds.features.Text(), "content": tfds.features.Text()})
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "messages": turns}))

        def _split_generators(self, _):
            return {"train": self._generate_examples(TEXTS), "test": self._generate_examples(TEXTS[:1])}

        def _generate_examples(self, texts):
            for i, text in enumerate(texts):
                yield i, {"text": text, "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]}

    Tiny.pkg_dir_path = folder
    builder = Tiny(data_dir=str(folder), file_format=form)
    builder.download_and_prepare()
    return builder.data_dir


@pytest.fixture(scope="module")
def tiny_tfds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    return folder, write_tfds(folder)


def test_text_files(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, text in zip(("a.txt", "b.md", "sub/c.txt"), TEXTS):
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    (tmp_path / "d.bin").write_bytes(b"\xff")
    assert list(data.documents(data.TextFiles(str(tmp_path)))) == TEXTS[:3]
    assert list(data.documents(data.TextFiles((str(tmp_path / "sub" / "*.txt"), str(tmp_path / "a.txt"))))) == [TEXTS[2], TEXTS[0]]
    (tmp_path / "e.txt.zst").write_bytes(zstandard.compress("<|end|>".join(TEXTS).encode()))
    assert list(data.documents(data.TextFiles(str(tmp_path / "e.txt.zst"), split="<|end|>"))) == TEXTS


@pytest.mark.parametrize("name, pack", [("x.jsonl", bytes), ("x.jsonl.gz", gzip.compress), ("x.jsonl.zst", zstandard.compress)])
def test_json_lines(name, pack, tmp_path):
    (tmp_path / name).write_bytes(pack(lines()))
    assert list(data.documents(data.JsonLines(str(tmp_path)))) == TEXTS
    two = zstandard.compress(lines()) * 2 if name.endswith("zst") else None  # frames one after the other, as tools that append write them
    if two:
        (tmp_path / name).write_bytes(two)
        assert list(data.documents(data.JsonLines(str(tmp_path / name)))) == TEXTS * 2


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet
    turns = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": t}] for t in TEXTS]
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS, "messages": turns}), tmp_path / "x.parquet")
    assert list(data.documents(data.Parquet(str(tmp_path)))) == TEXTS
    assert [d.content for d in records(data.Parquet(str(tmp_path), data.Chat()))] == turns
    with pytest.raises(DataError, match=r"'txt'; did you mean 'text'"):
        list(records(data.Parquet(str(tmp_path), "txt")))


def test_tfds(tiny_tfds):
    root, version = tiny_tfds
    for source in (data.Tfds("tiny", data_dir=str(root)), data.Tfds(data_dir=str(version))):
        assert sorted(data.documents(source)) == sorted(TEXTS)  # TFDS shuffles by key when it writes
    assert list(data.documents(data.Tfds("tiny", "test", str(root)))) == TEXTS[:1]
    assert sorted(d.content[1]["content"] for d in records(data.Tfds("tiny", data_dir=str(root), field=data.Chat()))) == sorted(TEXTS)
    with pytest.raises(DataError, match=r"'trian'.*did you mean 'train'"):
        list(records(data.Tfds("tiny", "trian", str(root))))
    with pytest.raises(FileNotFoundError, match="nothere"):
        list(records(data.Tfds("nothere", data_dir=str(root))))
    with pytest.raises(DataError, match="no field 'txt'"):
        list(records(data.Tfds("tiny", data_dir=str(root), field="txt")))


def test_no_tensorflow(tiny_tfds):
    import subprocess
    import sys
    program = "import sys; from llmjax import data\n" \
              f"print(len(list(data.documents(data.Tfds(data_dir={str(tiny_tfds[1])!r}))))); assert not {{'tensorflow', 'torch'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "4", done.stderr[-500:]


def test_standard_library():
    source = data.StandardLibrary(300_000)
    one, two = list(records(source)), list(records(source))
    assert one == two and len(one) > 5 and 150_000 < sum(len(d.text.encode()) for d in one) <= 300_000
    assert signature(source) == signature(source) != signature(data.StandardLibrary(300_001))


def test_chat_and_completion(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "hi"}], "prompt": "p", "completion": "c"}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert [d.content for d in records(data.JsonLines(str(tmp_path), data.Chat()))] == [rows[0]["messages"]]
    assert [d.content for d in records(data.JsonLines(str(tmp_path), data.Completion()))] == [{"prompt": "p", "completion": "c"}]


BAD = [
    (b'{"text": "a"}\n{"text" "b"}', "text", "line 2 is no JSON"), (b'{"text": "a"}\n[1]', "text", "line 2 is a JSON list"),
    (b'{"txt": "a"}', "text", "no field 'text'; did you mean 'txt'"),
    (b'{"text": 3}', "text", "'text' is int, not text"), (b'{"text": "\xff"}', "text", "not UTF-8: byte 0xff at offset 10"),
    (b'{"messages": "x"}', data.Chat(), "'messages' is str"),
    (b'{"messages": [{"content": "x"}]}', data.Chat(), "message 0"), (b'{"prompt": "x"}', data.Completion(), "no field 'completion'"),
]


@pytest.mark.parametrize("content, field, words", BAD)
def test_bad_lines(content, field, words, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        list(records(data.JsonLines(str(tmp_path), field)))
    assert "x.jsonl, line" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name, content", [("x.jsonl.gz", gzip.compress(lines(), mtime=0)[:-20]), ("x.jsonl.gz", b"nothing"), ("x.jsonl.zst", b"nothing at all"),
                                           ("x.parquet", b"PAR1nothing")])
def test_damaged_files(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        list(records(data.Parquet(str(tmp_path)) if "parquet" in name else data.JsonLines(str(tmp_path))))


def test_missing_files(tmp_path):
    for source in (data.TextFiles(str(tmp_path / "gone.txt")), data.JsonLines(str(tmp_path / "*.jsonl")), data.Parquet(str(tmp_path))):
        with pytest.raises(FileNotFoundError, match="no file"):
            list(records(source))
    (tmp_path / "x.txt").write_bytes(b"abc\xe9def")
    with pytest.raises(DataError, match="0xe9 at offset 3"):
        list(records(data.TextFiles(str(tmp_path / "x.txt"))))
    with pytest.raises(ConfigError):
        data.Corpus(data.Mixture(()))
    with pytest.raises(ConfigError, match="between 0 and 1"):
        data.Fraction(1.5)


def test_a_signature_sees_changes(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("one")
    before = signature(data.TextFiles(str(path)))
    assert before == signature(data.TextFiles(str(path))) != signature(data.TextFiles(str(path), split="\n"))
    path.write_text("two")
    assert before != signature(data.TextFiles(str(path)))
