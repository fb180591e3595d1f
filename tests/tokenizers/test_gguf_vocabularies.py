"""GGUF vocabularies rebuilt: synthetic ones against the libraries they come from, SmolLM2's real one (where the model file is in llmjax's cache) against recorded ids,
transformers and llama.cpp.

The regular expressions were also checked against the strings and ids that llama.cpp ships (`models/ggml-vocab-*.gguf.inp/.out`): command-r, deepseek-coder, deepseek-llm,
falcon, gemma-4, gpt-2, llama-bpe, llama-spm, mpt, phi-3, qwen2, qwen35, refact, starcoder, all of the 47 to 51 strings each. `LLMJAX_GGUF_VOCABS=folder` repeats that.
"""
import io
import os
import pathlib

import pytest
from hard_text import CORPUS, HARD

from llmjax import tokenizers
from llmjax.core.errors import CheckpointError
from llmjax.tokenizers.gguf import SPLITS


@pytest.fixture(scope="module")
def bpe_fields():
    """A small vocabulary whose words were cut as in GPT-2."""
    import json
    trained = tokenizers.train_bpe(CORPUS * 3, 420, ("<|endoftext|>", "<|im_start|>"), pattern=r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    model = json.loads(trained.backend.to_str())["model"]
    texts = sorted(model["vocab"], key=model["vocab"].get)
    fields = {"model": "gpt2", "pre": "gpt-2", "tokens": texts, "merges": [" ".join(pair) for pair in model["merges"]], "token_type": [3, 3] + [1] * (len(texts) - 2),
              "bos_token_id": 1,
              "eos_token_id": 0, "add_bos_token": True}
    return trained, {f"tokenizer.ggml.{k}": v for k, v in fields.items()} | {"tokenizer.chat_template": tokenizers.CHATML}


def test_byte_level(bpe_fields):
    trained, fields = bpe_fields
    rebuilt = tokenizers.from_gguf(fields)
    for text in [*HARD, *CORPUS, "a<|im_start|>b"]:
        assert rebuilt.encode(text) == trained.encode(text)
    assert (rebuilt.bos_id, rebuilt.eos_id, rebuilt.pad_id, rebuilt.chat_template) == (1, 0, None, tokenizers.CHATML)
    assert rebuilt.encode("x", add_special_tokens=True)[0] == 1
    assert rebuilt.special_tokens == {"<|endoftext|>": 0, "<|im_start|>": 1}


@pytest.mark.parametrize("pre", SPLITS)
def test_every_pre_tokenizer_builds_and_keeps_the_text(pre, bpe_fields):
    rebuilt = tokenizers.from_gguf(bpe_fields[1] | {"tokenizer.ggml.pre": pre})
    for text in HARD:
        assert rebuilt.decode(rebuilt.encode(text)) == text


def words(pre, text):
    """What one pre-tokenizer cuts a text into."""
    made = tokenizers.from_gguf({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": [],
                                 "tokenizer.ggml.tokens": sorted(tokenizers.tokenizer.byte_alphabet())})
    return [text[a:b] for _, (a, b) in made.backend.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize("pre, expected", [
    ("gpt-2", ["It", "'s", " 12345", "  ", " x", "\n", "\n", "Äb", "!!"]), ("smollm", ["It", "'s", " ", "1", "2", "3", "4", "5", "  ", " x", "\n", "\n", "Äb", "!!"]),
    ("llama-bpe", ["It", "'s", " ", "123", "45", "  ", " x", "\n\n", "Äb", "!!"]), ("qwen2", ["It", "'s", " ", "1", "2", "3", "4", "5", "  ", " x", "\n\n", "Äb", "!!"]),
    ("gpt-4o", ["It's", " ", "123", "45", "  ", " x", "\n\n", "Äb", "!!"]),
])
def test_words(pre, expected):
    assert words(pre, "It's 12345   x\n\nÄb!!") == expected


def test_sentencepiece_kind():
    import sentencepiece
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS * 3), model_writer=model, model_type="bpe", vocab_size=400, minloglevel=2, num_threads=1,
                                             byte_fallback=True,
                                             normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    size = theirs.get_piece_size()
    types = [2 if theirs.is_unknown(i) else 3 if theirs.is_control(i) else 6 if theirs.is_byte(i) else 1 for i in range(size)]
    fields = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": [theirs.id_to_piece(i) for i in range(size)], "tokenizer.ggml.scores": [theirs.get_score(i)
        for i in range(size)],
              "tokenizer.ggml.token_type": types}
    rebuilt = tokenizers.from_gguf(fields)
    for text in [*HARD, *CORPUS]:
        assert rebuilt.encode(text) == theirs.encode(text) and rebuilt.decode(rebuilt.encode(text)) == text
    assert rebuilt.encode("x", add_special_tokens=True) == [1, *theirs.encode("x")]
    bare = tokenizers.from_gguf(fields | {"tokenizer.ggml.add_space_prefix": False})
    assert bare.encode("the") == theirs.encode("the")[0:0] + bare.encode("the") != theirs.encode("the") and bare.decode(bare.encode(" the")) == " the"
    stream = rebuilt.stream(after=rebuilt.encode("over"))
    assert "".join(stream.push(i) for i in rebuilt.encode("there")) + stream.flush() == " there"  # continues the prompt: its space stays


@pytest.mark.parametrize("change, words", [
    ({"tokenizer.ggml.pre": "gpt-3"}, "'gpt-3'.*did you mean 'gpt-2'"), ({"tokenizer.ggml.model": "rwkv"}, "'rwkv'"), ({"tokenizer.ggml.merges": ["zz zz"]}, "zz zz"),
    ({"tokenizer.ggml.token_type": [1, 1]}, "token_type has 2"), ({"tokenizer.ggml.eos_token_id": 100000}, "100000"), ({"tokenizer.ggml.tokens": ["a", "a"],
        "tokenizer.ggml.token_type": [1, 1]}, "twice|outside"),
])
def test_damaged(change, words, bpe_fields):
    with pytest.raises(CheckpointError, match=words):
        tokenizers.from_gguf(bpe_fields[1] | change)
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.model"):
        tokenizers.from_gguf({})


def test_unnamed_pre_tokenizer_warns(bpe_fields):
    with pytest.warns(UserWarning, match=r"tokenizer\.ggml\.pre"):
        tokenizers.from_gguf({k: v for k, v in bpe_fields[1].items() if k != "tokenizer.ggml.pre"})


def read_fields(path):
    import gguf
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def smollm2():
    places = [pathlib.Path(os.environ.get("LLMJAX_CACHE", "~/.cache/llmjax")).expanduser()]
    return next((f for place in places if place.is_dir() for f in place.rglob("SmolLM2-135M-Instruct*.gguf")), None)

SMOLLM2_IDS = {  # transformers' read of the same file gives these too
    "def f(x):\n    return x  # 12345 + 67 = 12412\n\n\n    y": [1604, 275, 24, 104, 727, 472, 1003, 1792, 216, 907, 216, 33, 34, 35, 36, 37, 1232, 216, 38, 39, 446, 216, 33,
                                                                 34, 36, 33, 34, 13272, 329],
    "Café naïve façade Ελλάδα здравствуйте": [51, 1939, 2756, 15486, 46494, 40852, 5664, 239, 17162, 17162, 26112, 29589, 8998, 43414, 19263, 23728, 16464, 24674, 16464,
                                              14714, 24958, 8355, 6643],
    "東京は日本の首都です。北京": [30679, 126, 16736, 122, 7365, 124, 23274, 115, 40993, 26453, 180, 116, 240, 180, 38466, 7365, 117, 39958, 19076, 30158, 241, 16736, 122],
    "مرحبا بالعالم، كيف الحال؟": [21706, 20602, 44626, 31462, 10805, 45726, 22208, 34966, 22208, 21706, 163, 230, 16936, 221, 23339, 43315, 27819, 44626, 22208, 163, 249],
    "I'll don't WE'VE it's 'tis": [57, 3060, 1326, 982, 26587, 23, 18525, 357, 506, 637, 34818],
}
SMOLLM2_CHAT = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2, 198, 1, 4093, 198, 1780, 314, 260, 3575, 282,
                4649, 47, 2, 198, 1, 520, 9531, 198]


@pytest.mark.skipif(smollm2() is None, reason="SmolLM2's GGUF file is not in llmjax's cache")
def test_smollm2():
    ours = tokenizers.from_gguf(read_fields(smollm2()))
    for text, ids in SMOLLM2_IDS.items():
        assert ours.encode(text) == ids and ours.decode(ids) == text
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    assert ours.apply_chat_template(chat, True) == SMOLLM2_CHAT
    llama_cpp = pytest.importorskip("llama_cpp")
    reference = llama_cpp.Llama(str(smollm2()), vocab_only=True, verbose=False)
    for text in HARD:
        assert ours.encode(text) == (reference.tokenize(text.encode(), add_bos=False, special=True) if text else [])


@pytest.mark.skipif("LLMJAX_GGUF_VOCABS" not in os.environ, reason="llama.cpp's vocabularies are not at hand")
def test_llama_cpp_vocabularies():
    for file in sorted(pathlib.Path(os.environ["LLMJAX_GGUF_VOCABS"]).glob("ggml-vocab-*.gguf")):
        if file.name in ("ggml-vocab-bert-bge.gguf", "ggml-vocab-nomic-bert-moe.gguf") or not file.with_name(file.name + ".inp").exists():
            continue
        ours = tokenizers.from_gguf(read_fields(file))
        texts = file.with_name(file.name + ".inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
        for text, ids in zip(texts, file.with_name(file.name + ".out").read_text().split("\n")):
            assert ours.encode(text) == [int(i) for i in ids.split()], (file.name, text)
