"""A tokenizer as GGUF metadata, so that llama.cpp reads the same ids out of a text. The way back is `gguf.py`, and every result is read back through it and compared.

Four kinds can be said: byte-level BPE (`gpt2`), whose way of cutting words llama.cpp knows by name alone: the name is found by cutting a text that tells them apart; BPE over ▁
pieces with bytes to fall back on (`llama`), which llama.cpp rebuilds from scores: the first merge that makes a piece gives its score; Unigram over ▁ pieces (`t5`); BERT's WordPiece
(`bert`).
"""
import base64
import json
from typing import Any

from llmjax.core.errors import CheckpointError
from llmjax.tokenizers import pieces
from llmjax.tokenizers.gguf import SPLITS, WHOLE_WORDS, from_gguf
from llmjax.tokenizers.tokenizer import Tokenizer

# What tells the ways of cutting words apart: digits in runs, contractions in both cases, white space before and after line ends, marks, letters of many scripts, symbols. In
# normal form C, which some tokenizers bring a text into and llama.cpp does not.
TELLING = ("Hello world, it's 1 12 123 1234 12345678 and 3.14159; DON'T we'Re I'LL they'd've 'tis\n\n\n  def f(x_1):\r\n\treturn  x+=y // 2  # ok!!!???\n \n camelCaseWORD snake_case "
           "naïve Ελλάδα здравствуйте 東京は日本の首都です。北京 مرحبا بالعالم नमस्ते दुनिया ไทย 한국어 ½ Ⅷ ٣٤٥ 🙂👩‍👩‍👧 $5^2~`a`<b>=c|d +1-2 \"q\" (p) [r] {s} @u /v\\w www.example.com/?q=1&b=%20   ")


def to_gguf(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """Metadata of a tokenizer, the chat template with it: {"tokenizer.ggml.tokens": […], …}.

    vocab_size: rows of the model's embedding; ids without a token get a name that no text holds, of the type unused.
    Raises CheckpointError for a kind of tokenizer that GGUF cannot hold, and where reading it back gives other ids.
    """
    state = json.loads(tokenizer.backend.to_str())
    model = state["model"]
    kind = tokenizer._kind
    named = {("BPE", "byte_level"): "gpt2", ("BPE", "sentencepiece"): "llama", ("Unigram", "sentencepiece"): "t5", ("WordPiece", "whole"): "bert"}
    if (model["type"], kind) not in named:
        raise CheckpointError(f"a GGUF file cannot hold this tokenizer ({model['type']}, {kind}); written are byte-level BPE, BPE and Unigram over ▁ pieces, and WordPiece. "
                              "Convert without it, or to hf")
    name = named[model["type"], kind]
    texts = [f"[PAD{i}]" for i in range(max(vocab_size, tokenizer.vocab_size))]
    types = [pieces.UNUSED] * len(texts)
    for text, i in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        texts[i] = text
        types[i] = pieces.BYTE if kind == "sentencepiece" and len(text) == 6 and text.startswith("<0x") else pieces.NORMAL
    for i, token in tokenizer._added.items():
        types[i] = pieces.CONTROL if token.special else pieces.USER_DEFINED
    out: dict[str, Any] = {"model": name, "tokens": texts, "token_type": types}
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model.get("merges", ())]
    around = tokenizer.encode("a", add_special_tokens=True)
    if name == "bert":
        out |= word_pieces(tokenizer, state, around, texts, types)
    elif name == "t5":
        out |= unigram(tokenizer, state, texts, types)
    elif name == "gpt2":
        out |= {"pre": name_of(tokenizer), "merges": [" ".join(pair) for pair in merges]}
    else:
        if tokenizer.unk_id is not None:
            types[tokenizer.unk_id] = pieces.UNKNOWN
        first: dict[str, int] = {}
        for rank, pair in enumerate(merges):
            first.setdefault("".join(pair), rank)
        out |= {"scores": [-float(first.get(text, 0 if type != pieces.NORMAL else len(merges))) for text, type in zip(texts, types)],
                "add_space_prefix": starts_with_space(tokenizer)}
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unknown": tokenizer.unk_id, "padding": tokenizer.pad_id}
    out |= {f"{role}_token_id": i for role, i in ids.items() if i is not None}
    if name != "bert":
        out |= {"add_bos_token": bool(around) and around[0] == tokenizer.bos_id, "add_eos_token": bool(around) and around[-1] == tokenizer.eos_id}
    fields = {f"tokenizer.ggml.{key}": value for key, value in out.items()}
    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        fields |= {f"tokenizer.chat_template.{name}": text for name, text in templates.items() if name != "default"}
        fields |= {"tokenizer.chat_templates": [name for name in templates if name != "default"]}
        templates = templates.get("default")
    fields |= {"tokenizer.chat_template": templates} if templates else {}
    tries: tuple[dict, ...] = ({}, {"general.name": "phi3"})            # by this name llama.cpp knows that white space after a marker goes
    if name == "t5":
        tries = ({"tokenizer.ggml.remove_extra_whitespaces": True}, {"tokenizer.ggml.remove_extra_whitespaces": False})
    for more in tries:
        strange = first_difference(tokenizer, from_gguf(fields | more))
        if strange is None:
            return fields | more
    raise CheckpointError(f"a GGUF file cannot hold this tokenizer: llama.cpp would read other ids from {strange!r}. Convert without it, or to hf")


def word_pieces(tokenizer: Tokenizer, state: dict, around: list[int], texts: list[str], types: list[int]) -> dict[str, Any]:
    """What WordPiece is written as; `texts` get their ▁. Raises CheckpointError where nothing stands around a text: llama.cpp always puts two tokens there."""
    if len(around) < 3 or not {around[0], around[-1]} <= set(tokenizer._added):
        raise CheckpointError("a GGUF file cannot hold this tokenizer: WordPiece without a special token before and after a text. Convert without it, or to hf")
    for i, (text, type) in enumerate(zip(texts, types)):
        if type == pieces.NORMAL:
            texts[i] = text[2:] if text.startswith("##") else "▁" + text
    rules = state["normalizer"] or {}
    lower = bool(rules.get("lowercase"))
    mask = tokenizer.special_tokens.get("[MASK]")
    return {"pre": "default", "bos_token_id": around[0], "seperator_token_id": around[-1], "normalizer.lowercase": lower,
            "normalizer.strip_accents": lower if rules.get("strip_accents") is None else rules["strip_accents"], **({} if mask is None else {"mask_token_id": mask})}


def unigram(tokenizer: Tokenizer, state: dict, texts: list[str], types: list[int]) -> dict[str, Any]:
    """What Unigram is written as: its scores, and the table that characters are replaced by (SentencePiece's, in base 64 in the state)."""
    scores = [-10_000.0] * len(texts)                       # llama.cpp's own for tokens of no use
    for i, (text, score) in enumerate(state["model"]["vocab"]):
        scores[i] = score
        if len(text) == 6 and text.startswith("<0x"):
            types[i] = pieces.BYTE
    if tokenizer.unk_id is not None:
        types[tokenizer.unk_id] = pieces.UNKNOWN
    steps = state["normalizer"] or {}
    tables = [step["precompiled_charsmap"] for step in steps.get("normalizers", [steps]) if step.get("type") == "Precompiled"]
    return {"pre": "default", "scores": scores, "add_space_prefix": starts_with_space(tokenizer), **({"precompiled_charsmap": base64.b64decode(tables[0])} if tables else {})}


def first_difference(one: Tokenizer, other: Tokenizer) -> str | None:
    """A text of which the two make different ids, or None."""
    for text in (*TELLING.split("\n"), TELLING, *one.special_tokens, *(f"a {mark} \n b" for mark in one.special_tokens)):
        for special in (False, True):
            if one.encode(text, special) != other.encode(text, special):
                return text[:40]
    return None


def starts_with_space(tokenizer: Tokenizer) -> bool:
    """Whether a space is put before a text."""
    ids = tokenizer.encode("a")
    return bool(ids) and tokenizer.token_bytes(ids[0]).startswith(b" ")


def name_of(tokenizer: Tokenizer) -> str:
    """llama.cpp's name of a byte-level tokenizer's way of cutting words. Raises CheckpointError where it has none."""
    from tokenizers import Regex, pre_tokenizers
    wanted = [span for _, span in tokenizer.backend.pre_tokenizer.pre_tokenize_str(TELLING)]
    whole = bool(json.loads(tokenizer.backend.to_str())["model"].get("ignore_merges"))
    for name, patterns in SPLITS.items():
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
        cut = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        if whole == (name in WHOLE_WORDS) and [span for _, span in cut.pre_tokenize_str(TELLING)] == wanted:
            return name
    raise CheckpointError("a GGUF file cannot hold this tokenizer: llama.cpp knows no pre-tokenizer that cuts words as it does. Convert without it, or to hf")
