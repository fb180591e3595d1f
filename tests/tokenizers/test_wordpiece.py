"""vocab.txt against transformers' BertTokenizer, and what a damaged one says."""
import json

import pytest

from llmjax import tokenizers
from llmjax.core.errors import CheckpointError

transformers = pytest.importorskip("transformers")

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "sea", "is", "blue", "##s", "##ly", "un", "##able", "a", "##b", "##c", "中", "文", "!", ",", "cafe", "café", "The", "1", "##2"]
TEXTS = ["The sea is blue", "UNABLE seas,bluely!", "café cafe CAFÉ", "中文the 中", "abc xyz", "  the\t\nsea ", "the [MASK] sea [SEP]", "12 1 2", "a" * 120, "", "zero\u0000\ufffd the", "é́"]


@pytest.mark.parametrize("more", [{}, {"do_lower_case": False}, {"strip_accents": False}, {"tokenize_chinese_chars": False}])
def test_ids_are_transformers(more, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **more}))
    ours = tokenizers.load(tmp_path)
    theirs = transformers.BertTokenizer(vocab={p: i for i, p in enumerate(PIECES)}, **more)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=True) == theirs.encode(text)
    assert ours.pad_id == 0 and ours.unk_id == 1 and ours.decode(ours.encode("unables blue")) == "unables blue"
    ours.save(tmp_path / "again")
    assert tokenizers.load(tmp_path / "again").encode(TEXTS[1], add_special_tokens=True) == ours.encode(TEXTS[1], add_special_tokens=True)


def test_a_vocabulary_without_its_marks(tmp_path):
    (tmp_path / "vocab.txt").write_text("the\nsea\n")
    with pytest.raises(CheckpointError, match=r"vocab\.txt: the special token '\[UNK\]' is not in it"):
        tokenizers.load(tmp_path)
