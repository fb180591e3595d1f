"""SentencePiece models, trained here in seconds: the same ids as the `sentencepiece` library on hard text, and as `transformers`."""
import io
import json

import pytest
import sentencepiece
from hard_text import CORPUS, HARD

from llmjax import tokenizers


def train(kind, **knobs):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS * 3), model_writer=model, model_type=kind, vocab_size=400 if kind == "bpe" else 360, minloglevel=2,
                                             num_threads=1,
                                             **({"byte_fallback": True, "hard_vocab_limit": False} | knobs))
    return model.getvalue()


LLAMA = dict(normalization_rule_name="identity", remove_extra_whitespaces=False)
KINDS = {"llama": ("bpe", LLAMA), "gemma": ("bpe", LLAMA | dict(add_dummy_prefix=False, user_defined_symbols=["▁▁", "<turn>"])), "bpe nfkc": ("bpe", {}),
         "bpe, no bytes": ("bpe", LLAMA | dict(byte_fallback=False)), "unigram": ("unigram", {}), "unigram identity": ("unigram", LLAMA), "unigram, no bytes": ("unigram",
             dict(byte_fallback=False))}


@pytest.mark.parametrize("name", KINDS)
def test_same_ids_as_the_library(name, tmp_path):
    kind, knobs = KINDS[name]
    data = train(kind, **knobs)
    (tmp_path / "tokenizer.model").write_bytes(data)
    theirs, ours = sentencepiece.SentencePieceProcessor(model_proto=data), tokenizers.load(tmp_path / "tokenizer.model")
    assert ours.vocab_size == theirs.get_piece_size() and (ours.bos_id, ours.eos_id, ours.unk_id) == (theirs.bos_id(), theirs.eos_id(), theirs.unk_id())
    for text in [*HARD, *CORPUS]:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        if "byte_fallback" not in knobs and LLAMA.items() <= knobs.items():
            assert ours.decode(ids) == text == theirs.decode(ids)


def test_a_changed_score_is_noticed(tmp_path):
    from sentencepiece import sentencepiece_model_pb2
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(train("bpe", **LLAMA))
    normal = [i for i, p in enumerate(proto.pieces) if p.type == 1 and len(p.piece) == 2]
    for i, j in zip(normal, reversed(normal)):
        proto.pieces[i].score = proto.pieces[j].score
    (tmp_path / "changed.model").write_bytes(proto.SerializeToString())
    (tmp_path / "right.model").write_bytes(train("bpe", **LLAMA))
    changed, right = (tokenizers.load(tmp_path / f"{n}.model") for n in ("changed", "right"))
    assert any(changed.encode(t) != right.encode(t) for t in CORPUS)


def test_special_tokens_and_saving_as_transformers(tmp_path):
    import transformers
    (tmp_path / "tokenizer.model").write_bytes(train("bpe", **LLAMA))
    size = tokenizers.load(tmp_path / "tokenizer.model").vocab_size
    config = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "added_tokens_decoder": {size: {"content": "<extra>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = tokenizers.load(tmp_path)
    assert ours.encode("a", add_special_tokens=True)[0] == ours.bos_id == 1
    assert ours.encode("x<extra>y</s>")[-1] == ours.eos_id and ours.special_tokens["<extra>"] in ours.encode("x<extra>y")
    ours.save(tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in [*HARD, "a<extra> b </s>c<s>"]:
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
        assert theirs(text)["input_ids"] == ours.encode(text, add_special_tokens=True)
        assert theirs.decode(ours.encode(text), clean_up_tokenization_spaces=False) == ours.decode(ours.encode(text))


@pytest.mark.parametrize("content", [b"", b"not a model", train("bpe")[:-50]])
def test_damaged(content, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.model"):
        tokenizers.load(tmp_path)


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.model"):
        tokenizers.load(tmp_path / "gone.model")
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.json"):
        tokenizers.load(tmp_path)
