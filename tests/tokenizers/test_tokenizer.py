"""Kinds made here, streaming, bytes per token, saving, errors; the `tokenizers` and `transformers` libraries are the reference."""
import pickle
import random

import numpy as np
import pytest
from hard_text import CORPUS, HARD

from llmjax import tokenizers
from llmjax.core.errors import CheckpointError, ConfigError, DataError


@pytest.fixture(scope="module", params=["bpe", "bytes", "characters"])
def made(request):
    if request.param == "bpe":
        return tokenizers.train_bpe(CORPUS * 3, 420)
    return tokenizers.bytes_tokenizer() if request.param == "bytes" else tokenizers.characters_tokenizer(HARD, ("<|endoftext|>",), eos="<|endoftext|>")


def test_round_trip_and_transformers(made, tmp_path):
    import transformers
    made.save(tmp_path)
    theirs, again = transformers.AutoTokenizer.from_pretrained(tmp_path), tokenizers.load(tmp_path)
    assert again.fingerprint == made.fingerprint == pickle.loads(pickle.dumps(made)).fingerprint and again.eos_id == made.eos_id == theirs.eos_token_id
    for text in [*HARD, "a<|endoftext|>b"]:
        ids = made.encode(text)
        assert made.decode(ids) == text and made.decode(ids, skip_special_tokens=True) == text.replace("<|endoftext|>", "")
        assert ids == theirs(text, add_special_tokens=False)["input_ids"] == again.encode(text)
        assert sum(made.token_lengths()[ids]) == len(text.replace("<|endoftext|>", "").encode())
        assert b"".join(map(made.token_bytes, ids)).decode() == text
    assert made.encode("x<|endoftext|>")[-1] == made.eos_id
    assert tokenizers.load(tmp_path / "tokenizer.json").encode(HARD[10]) == made.encode(HARD[10])


def test_stream_never_emits_half_a_character(made):
    rng = random.Random(0)
    text = "".join(HARD)
    everything = [made.encode(text), [rng.randrange(made.vocab_size) for _ in range(3000)]]
    for ids in everything:
        stream, out = made.stream(), []
        for id in ids:
            out.append(stream.push(id))
        assert "".join(out) + stream.flush() == made.decode(ids)
        assert ids is not everything[0] or not any("�" in piece for piece in out)


def test_any_cut_into_bytes():
    """However the bytes of a text are cut into tokens, the stream gives the text and no piece holds half a character."""
    from llmjax.tokenizers.stream import ByteStream
    text, rng = "aé東🙂x‍b\n" * 5, random.Random(1)
    data = text.encode()
    for _ in range(200):
        cuts = sorted(rng.sample(range(1, len(data)), rng.randrange(1, 40)))
        table = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)])]
        stream = ByteStream(table.__getitem__, frozenset(), False)
        pieces = [stream.push(i) for i in range(len(table))]
        assert "".join(pieces) == text and stream.flush() == "" and "�" not in "".join(pieces)
    stream = ByteStream([b"a\xf0\x9f"].__getitem__, frozenset(), False)
    assert stream.push(0) == "a" and stream.flush() == "�"


def test_wordpiece_and_other_decoders(tmp_path):
    import tokenizers as library
    backend = library.Tokenizer(library.models.WordPiece({"[UNK]": 0, "un": 1, "##want": 2, "##ed": 3, "run": 4, "##ning": 5, ",": 6}, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = library.pre_tokenizers.Whitespace(), library.decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    ours = tokenizers.load(tmp_path / "tokenizer.json")
    ids = ours.encode("unwanted , running")
    assert ids == [1, 2, 3, 6, 4, 5] and ours.decode(ids) == backend.decode(ids)
    stream = ours.stream()
    assert "".join(stream.push(i) for i in ids) + stream.flush() == ours.decode(ids)


def test_training_is_deterministic_and_learns():
    one, two = (tokenizers.train_bpe(iter(CORPUS * 3), 400, ("<|endoftext|>", "<|im_start|>")) for _ in range(2))
    assert one.fingerprint == two.fingerprint != tokenizers.train_bpe(CORPUS, 300, ("<|endoftext|>", "<|im_start|>")).fingerprint
    assert one.special_tokens == {"<|endoftext|>": 0, "<|im_start|>": 1}
    assert len(one.encode(CORPUS[0])) < len(CORPUS[0].encode()) * 0.7
    assert max(len(one.token_bytes(i)) for i in one.encode("123456789 12")) <= 3
    assert np.array_equal(one.token_lengths()[:2], [0, 0]) and one.token_lengths().dtype == np.int32


def test_bytes_are_their_own_ids():
    made = tokenizers.bytes_tokenizer()
    text = "aé🙂\n\x00"
    assert made.encode(text) == list(text.encode()) and made.vocab_size == 257 and made.eos_id == 256


def test_characters_in_order():
    made = tokenizers.characters_tokenizer(["b\na a", "🙂"])
    assert made.encode("\n ab🙂") == [0, 1, 2, 3, 4] and made.special_tokens == {}
    with_unknown = tokenizers.characters_tokenizer(["ab"], ("<unk>",), unk="<unk>")
    assert with_unknown.encode("axb") == [0, 2, 1]


@pytest.mark.parametrize("call, error, words", [
    (lambda: tokenizers.characters_tokenizer(["abc"]).encode("abz"), DataError, "'z'"),
    (lambda: tokenizers.bytes_tokenizer().encode("x\ud83dy"), DataError, "surrogate"),
    (lambda: tokenizers.bytes_tokenizer().encode(7), DataError, "str"),
    (lambda: tokenizers.bytes_tokenizer().decode([257]), DataError, "257"),
    (lambda: tokenizers.bytes_tokenizer().decode([-1]), DataError, "-1"),
    (lambda: tokenizers.bytes_tokenizer().stream().push(999), DataError, "999"),
    (lambda: tokenizers.bytes_tokenizer(eos="</s>"), ConfigError, "</s>"),
    (lambda: tokenizers.train_bpe(["x"], 100), ConfigError, "257"),
    (lambda: tokenizers.train_bpe([], 300), DataError, "empty"),
    (lambda: tokenizers.characters_tokenizer([""]), DataError, "empty"),
])
def test_errors(call, error, words):
    with pytest.raises(error, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_damaged_files(tmp_path):
    tokenizers.bytes_tokenizer().save(tmp_path)
    whole = (tmp_path / "tokenizer.json").read_text()
    for text in ("", "{", "[]", whole[:len(whole) // 2]):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
            tokenizers.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text(whole)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<nowhere>"}')
    with pytest.raises(CheckpointError, match="<nowhere>"):
        tokenizers.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"300": {"content": "<late>"}}}')
    with pytest.raises(CheckpointError, match="<late>"):
        tokenizers.load(tmp_path)
