"""SentencePiece vocabularies, wherever they come from, as objects of the `tokenizers` library: pieces with scores and types in, the same ids out as the original.

BPE there merges the adjacent pair whose joined piece has the best score; here that becomes an explicit list of merges ordered by score. Not here: reading files
(`sentencepiece.py`, `gguf.py`).
"""
from collections.abc import Sequence
from dataclasses import dataclass

from llmjax.core.errors import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of pieces, numbered alike in SentencePiece's `ModelProto.SentencePiece.Type` and GGUF's `tokenizer.ggml.token_type`."""


@dataclass(frozen=True)
class Pieces:
    """A SentencePiece vocabulary: the texts (▁ for a space), scores and types by id, and what is done to a text first."""
    texts: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    unk_id: int | None
    add_prefix_space: bool
    remove_extra_spaces: bool = False
    charsmap: bytes = b""
    escape_spaces: bool = True
    prefix_scheme: str = "always"  # before each stretch between special tokens; "first": before the text only, unless a space stands there (transformers' legacy=False)


def merges_of(texts: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best score first; ties by the ids of the two. Only normal pieces take part."""
    known = {text: id for id, (text, type) in enumerate(zip(texts, types)) if type == NORMAL}
    found = []
    for text, id in known.items():
        for cut in range(1, len(text)):
            left, right = known.get(text[:cut]), known.get(text[cut:])
            if left is not None and right is not None:
                found.append((-scores[id], id, left, right))
    found.sort()
    return [(texts[left], texts[right]) for _, _, left, right in found]


def unique_texts(texts: Sequence[str], origin: str) -> dict[str, int]:
    """text -> id; an empty text becomes a name that no input holds. Raises CheckpointError for a text that stands twice."""
    vocabulary: dict[str, int] = {}
    for id, text in enumerate(texts):
        text = text or f"[EMPTY_{id}]"
        if text in vocabulary:
            raise CheckpointError(f"{origin}: token {text!r} stands twice in the vocabulary, at {vocabulary[text]} and {id}: the file is damaged")
        vocabulary[text] = id
    return vocabulary


def add_special(backend, texts: Sequence[str], types: Sequence[int], strip_right=frozenset()):
    """Tells the library which tokens are recognised in a text before all else: control and unknown ones as special, user-defined ones as plain."""
    from tokenizers import AddedToken
    backend.add_tokens([AddedToken(texts[id], normalized=False, special=type != USER_DEFINED, rstrip=id in strip_right)
                        for id, type in enumerate(types) if type in (CONTROL, UNKNOWN, USER_DEFINED)])


def wrap_ids(backend, texts: Sequence[str], bos_id: int | None, eos_id: int | None):
    """`add_special_tokens=True` puts these around a text."""
    from tokenizers import processors
    bos = [] if bos_id is None else [texts[bos_id]]
    eos = [] if eos_id is None else [texts[eos_id]]
    if bos or eos:
        single = [*bos, "$A", *eos]
        pair = single + [t if t != "$A" else "$B" for t in single]
        known = [(texts[i], i) for i in dict.fromkeys([bos_id, eos_id]) if i is not None]
        backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=known)


def build(pieces: Pieces, unigram: bool, origin: str, strip_right=frozenset()):
    """-> `tokenizers.Tokenizer`. Raises CheckpointError where the vocabulary is no proper one; `origin` is named in it."""
    import tokenizers
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    types, unk = list(pieces.types), pieces.unk_id
    texts = [text.replace("▁", " ") if type == USER_DEFINED else text for text, type in zip(pieces.texts, types)]  # user-defined pieces are found in the text as it was written
    vocabulary = unique_texts(texts, origin)
    texts = list(vocabulary)
    fallback = sum(type == BYTE for type in types) == 256
    if unigram:
        lowest = min(pieces.scores) - 1000.0
        weights = [lowest if type in (CONTROL, USER_DEFINED, UNUSED, BYTE) and id != unk else score for id, (type, score) in enumerate(zip(types, pieces.scores))]
        backend = tokenizers.Tokenizer(models.Unigram(list(zip(texts, weights)), unk_id=unk, byte_fallback=fallback))
    else:
        unk_text = None if unk is None else texts[unk]
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges_of(texts, pieces.scores, types), unk_token=unk_text, fuse_unk=True, byte_fallback=fallback))
    steps: list = [normalizers.Precompiled(pieces.charsmap)] if pieces.charsmap else []
    if pieces.remove_extra_spaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex(r"\A +| +\z"), "")]
    always = pieces.add_prefix_space and pieces.prefix_scheme == "always"
    steps += [normalizers.Prepend("▁" if pieces.escape_spaces else " ")] if always else []
    if pieces.add_prefix_space and not always:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=pieces.prefix_scheme, split=False)
    elif pieces.escape_spaces:
        steps.append(normalizers.Replace(" ", "▁"))
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    tail = [decoders.Strip(" ", 1, 0)] if pieces.add_prefix_space else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *tail])
    add_special(backend, texts, types, strip_right)
    return backend
