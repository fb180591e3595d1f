"""Vocabularies in GGUF metadata, rebuilt so that they give the same ids as llama.cpp: `gpt2` (byte-level BPE with merges), `llama` (SentencePiece scores), `t5`
(SentencePiece's Unigram), `bert` (WordPiece, ▁ before what opens a word), `gemma4` (BPE over ▁ text).

The regular expressions are those of llama.cpp's `llama-vocab.cpp` (MIT), which approximates a few of the originals. Not here: reading the file (the caller gives its metadata as
a dict).
"""
import warnings
from collections.abc import Mapping

from llmjax.core.errors import CheckpointError, nearest
from llmjax.tokenizers import pieces, wordpiece
from llmjax.tokenizers.tokenizer import Tokenizer

_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _TAIL
_QWEN35 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _TAIL
# llama.cpp writes \p{Lu}… and \p{Ll}… as "a letter that is not a-z" and "a letter that is not A-Z"
_UPPER, _LOWER = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
_TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|" + _TAIL
_GPT4O = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|" \
         rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|" + _TAIL
# Escaped: several of these characters turn into others when a text is normalised
_DEEPSEEK_LETTERS = r"\s?" + (
    "[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c"
    "\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6"
    "-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134"
    "\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-"
    "\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943]+"
)
_DEEPSEEK_PUNCTUATION = r"\s?" + "[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_DEEPSEEK3 = (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
              r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + _TAIL)

_SPLITS = {  # `tokenizer.ggml.pre` names -> regular expressions, one after the other
    ("default",): (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    ("gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de", "a.x-4.0", "mellum", "modern-bert", "jina-v1-en", "jina-v2-code", "roberta-bpe", "mpt",
     "olmo", "jais", "exaone4", "trillion", "granite-docling"): (_GPT2,),
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "dbrx", "smaug-bpe", "chatglm-bpe", "glm4", "glm5"): (_LLAMA3,),
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"): (r"\p{N}", _GPT2),
    ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"): (_QWEN2,),
    ("qwen35",): (_QWEN35,),
    ("falcon",): (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"),
    ("deepseek-llm",): (r"[\r\n]", _DEEPSEEK_LETTERS, _DEEPSEEK_PUNCTUATION, r"\s+$", _CJK, r"\p{N}+"),
    ("deepseek-coder",): (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"),
    ("deepseek-v3", "hunyuan-dense", "hy_v4", "joyai-llm"): _DEEPSEEK3,
    ("tekken",): (_TEKKEN,),
    ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"): (_GPT4O,),
    ("minicpm5",): (r"\p{N}{1,3}", _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _TAIL),
    ("seed-coder",): (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|" + _TAIL,),
    ("bailingmoe", "bailingmoe2", "llada-moe"): (r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",),
    ("poro-chat", "bloom", "gpt3-finnish"): (_BLOOM,),
    ("viking",): (_BLOOM, r"\p{N}"),
}
SPLITS: dict[str, tuple[str, ...]] = {name: patterns for names, patterns in _SPLITS.items() for name in names}
"""Pre-tokenizer name -> the regular expressions that cut a text into words, applied in turn."""

WHOLE_WORDS = frozenset(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "glm4", "glm5", "tekken", "minicpm5"))
"""Those where a word that stands in the vocabulary is taken whole, whatever the merges say."""

ADD_BOS = frozenset(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "tekken"))
"""Those that begin with bos where the file does not say."""


DEFAULTS: dict[str, dict[str, int]] = {"gpt2": {}, "gemma4": {}, "llama": {"bos": 1, "eos": 2, "unknown": 0}, "t5": {"eos": 1, "unknown": 2, "padding": 0},
                                       "bert": {"bos": 101, "seperator": 102, "unknown": 100, "padding": 0, "mask": 103}}
"""Kind of vocabulary -> the ids llama.cpp takes where the file does not say (the separator is misspelled in the format)."""


def from_gguf(fields: Mapping) -> Tokenizer:
    """The tokenizer of a GGUF file. `fields`: its metadata, key -> Python value (`tokenizer.ggml.tokens` list[str], `.scores` list[float], `.token_type` list[int], `.merges`
    list[str], ...).

    Raises CheckpointError for a missing key, lists of different lengths, an unknown `tokenizer.ggml.model` or `tokenizer.ggml.pre`."""
    def field(name: str):
        if f"tokenizer.ggml.{name}" not in fields:
            raise CheckpointError(f"this GGUF file has no tokenizer.ggml.{name}: it holds no vocabulary that can be rebuilt")
        return fields[f"tokenizer.ggml.{name}"]

    model, texts = field("model"), [text or f"[EMPTY_{id}]" for id, text in enumerate(field("tokens"))]
    if model not in DEFAULTS:
        raise CheckpointError(f"tokenizer.ggml.model {model!r} is not one that can be rebuilt; known: {', '.join(sorted(DEFAULTS))}")
    types = [int(t) for t in fields.get("tokenizer.ggml.token_type") or [pieces.NORMAL] * len(texts)]
    scores = [float(s) for s in field("scores")] if model in ("llama", "t5") else [0.0] * len(texts)
    for name, values in (("token_type", types), ("scores", scores)):
        if len(values) != len(texts):
            raise CheckpointError(f"tokenizer.ggml.{name} has {len(values)} entries for {len(texts)} tokens: the file is damaged")
    if model == "bert":
        return _wordpiece(fields, texts, types)
    ids = {role: _token_id(fields, role, texts, DEFAULTS[model].get(role)) for role in ("bos", "eos", "unknown", "padding")}
    phi3 = any(name in str(fields.get("general.name", "")).lower() for name in ("phi-3", "phi3"))  # llama.cpp knows them by name: white space after their markers goes
    keep_right = {"<unk>", "<s>", "<|endoftext|>"}
    strip_right = frozenset(i for i, (text, type) in enumerate(zip(texts, types)) if phi3 and (text == "</s>" or type in (2, 3, 4)) and text not in keep_right)
    if model in ("llama", "t5"):
        charsmap = bytes(int(b) & 255 for b in fields.get("tokenizer.ggml.precompiled_charsmap") or ())       # some writers keep its bytes as signed numbers
        table = pieces.Pieces(texts, scores, types, ids["unknown"], bool(fields.get("tokenizer.ggml.add_space_prefix", model == "llama")),
                              bool(fields.get("tokenizer.ggml.remove_extra_whitespaces", False)), charsmap)
        backend, bos_default = pieces.build(table, model == "t5", "the GGUF vocabulary", strip_right), model == "llama"
    elif model == "gemma4":
        backend, bos_default = _spaced_bpe(texts, types, field("merges")), False
    else:
        backend, bos_default = _byte_level(fields, texts, types, field("merges"), strip_right)
    add_bos = bool(fields.get("tokenizer.ggml.add_bos_token", bos_default))
    pieces.wrap_ids(backend, texts, ids["bos"] if add_bos else None, ids["eos"] if fields.get("tokenizer.ggml.add_eos_token", model == "t5") else None)
    text = {role: None if id is None else texts[id] for role, id in ids.items()}
    return Tokenizer(backend, bos=text["bos"], eos=text["eos"], pad=text["padding"], unk=text["unknown"], chat_template=_templates(fields))


def _wordpiece(fields: Mapping, texts: list[str], types: list[int]) -> Tokenizer:
    """A piece without ▁ that is no special token goes on with a word."""
    roles = {"cls": "bos", "sep": "seperator", "unk": "unknown", "pad": "padding", "mask": "mask"}
    ids = {role: _token_id(fields, key, texts, DEFAULTS["bert"][key] if DEFAULTS["bert"][key] < len(texts) else None) for role, key in roles.items()}
    missing = [roles[role] for role in ("cls", "sep", "unk") if ids[role] is None]
    if missing:
        raise CheckpointError(f"this GGUF file has no tokenizer.ggml.{missing[0]}_token_id, and fewer tokens than the {DEFAULTS['bert'][missing[0]]} that it would stand at")
    special = {i for i, type in enumerate(types) if type in (pieces.CONTROL, pieces.UNKNOWN, pieces.USER_DEFINED)} | {i for i in ids.values() if i is not None}
    words = [text if i in special or types[i] == pieces.UNUSED else text.removeprefix("▁") if text.startswith("▁") else "##" + text for i, text in enumerate(texts)]
    marks = {role: words[i] for role, i in ids.items() if i is not None}
    lower = bool(fields.get("tokenizer.ggml.normalizer.lowercase", True))
    backend = wordpiece.build(pieces.unique_texts(words, "the GGUF vocabulary"), lower_case=lower, strip_accents=bool(fields.get("tokenizer.ggml.normalizer.strip_accents", lower)),
                              unk=marks["unk"], cls=marks["cls"], sep=marks["sep"])
    pieces.add_special(backend, words, [pieces.CONTROL if i in ids.values() else type for i, type in enumerate(types)])
    return Tokenizer(backend, pad=marks.get("pad"), unk=marks["unk"], chat_template=_templates(fields))


def _token_id(fields: Mapping, role: str, texts: list[str], default: int | None) -> int | None:
    id = fields.get(f"tokenizer.ggml.{role}_token_id", default)
    if id is not None and not 0 <= int(id) < len(texts):
        raise CheckpointError(f"tokenizer.ggml.{role}_token_id is {id}, outside the vocabulary of {len(texts)} tokens")
    return None if id is None else int(id)


def _templates(fields: Mapping) -> str | dict[str, str] | None:
    """`tokenizer.chat_template`, with the named ones (`tokenizer.chat_template.NAME`) beside it where there are any."""
    default = fields.get("tokenizer.chat_template")
    named = {name: fields[f"tokenizer.chat_template.{name}"] for name in fields.get("tokenizer.chat_templates") or () if f"tokenizer.chat_template.{name}" in fields}
    return default if not named else ({"default": default} if default else {}) | named


def _merges(merges, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Each entry is two texts with a space between (which may itself begin the first). Raises CheckpointError for a merge whose parts or result are no tokens."""
    pairs = []
    for merge in merges:
        cut = merge.find(" ", 1)
        pair = (merge[:cut], merge[cut + 1:])
        if cut < 0 or any(text not in vocabulary for text in (*pair, "".join(pair))):
            raise CheckpointError(f"tokenizer.ggml.merges has {merge!r}, whose parts or result are not tokens: the file is damaged")
        pairs.append(pair)
    return pairs


def _byte_level(fields: Mapping, texts, types, merges, strip_right):
    import tokenizers
    from tokenizers import Regex, decoders, models, pre_tokenizers
    pre = fields.get("tokenizer.ggml.pre")
    if pre is None:
        warnings.warn("this GGUF file does not name its pre-tokenizer (tokenizer.ggml.pre): 'default' is used, as llama.cpp does; "
                      "ids may differ from those the model was trained on", stacklevel=3)
        pre = "default"
    if pre not in SPLITS:
        raise CheckpointError(f"tokenizer.ggml.pre {pre!r} is not a pre-tokenizer that can be rebuilt{nearest(pre, SPLITS)}")
    vocabulary = pieces.unique_texts(texts, "the GGUF vocabulary")
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, _merges(merges, vocabulary), ignore_merges=pre in WHOLE_WORDS))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[pre]]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    pieces.add_special(backend, texts, types, strip_right)
    return backend, pre in ADD_BOS


def _spaced_bpe(texts, types, merges):
    import tokenizers
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    vocabulary = pieces.unique_texts(texts, "the GGUF vocabulary")
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, _merges(merges, vocabulary), byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+"), "isolated")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    pieces.add_special(backend, texts, types)
    return backend
