"""Documents to ids with a mask of what is learnt. Not here: files of ids (`store.py`)."""
from collections.abc import Sequence

import numpy as np

from llmjax.core.errors import ConfigError, DataError
from llmjax.data.sources import Document
from llmjax.tokenizers import Tokenizer


def separators(tokenizer: Tokenizer, separator: str | None) -> tuple[list[int], list[int]]:
    """The ids before and after a document. Raises ConfigError where the tokenizer has no such token."""
    def one(wanted: bool, id: int | None, name: str) -> list[int]:
        if wanted and id is None:
            raise ConfigError(f"Corpus.separator {separator!r}: this tokenizer has no {name} token; set separator to None, or take a tokenizer that has one")
        return [id] if wanted and id is not None else []

    return one(separator in ("bos", "both"), tokenizer.bos_id, "bos"), one(separator in ("eos", "both"), tokenizer.eos_id, "eos")


def tokenize(documents: Sequence[Document], tokenizer: Tokenizer, separator: str | None, empty: str) -> tuple[list[np.ndarray], list[np.ndarray] | None, list[int], int]:
    """-> ids per document (uint32), masks per document (bool; None where all is learnt), bytes of text per document, how many empty ones were left out.

    Raises DataError (with the document's place) for one without text where `empty` is "error", one with nothing to learn, text that the tokenizer cannot write."""
    kept = [d for d in documents if d.text]
    if len(kept) < len(documents) and empty == "error":
        place = next(d.place for d in documents if not d.text)
        raise DataError(f"{place} is empty: a document of zero tokens; take it out, or set Corpus.empty='skip'")
    chats = bool(kept) and isinstance(kept[0].content, list)
    before, after = ([], []) if chats else separators(tokenizer, separator)  # a chat template writes its own
    ids: list[list[int]] = []
    masks: list[np.ndarray] | None = None
    if kept and isinstance(kept[0].content, str):
        ids = [before + i + after for i in _encode([d.text for d in kept], kept, tokenizer)]
    elif kept and isinstance(kept[0].content, dict):
        prompts, completions = (_encode([d.content[key] for d in kept if isinstance(d.content, dict)], kept, tokenizer) for key in ("prompt", "completion"))
        for document, completion in zip(kept, completions):
            if not completion:
                raise DataError(f"{document.place} has an empty completion: nothing in it is learnt")
        ids = [before + p + c + after for p, c in zip(prompts, completions)]
        masks = [np.arange(len(before) + len(p) + len(c) + len(after)) >= len(before) + len(p) for p, c in zip(prompts, completions)]
    elif chats:
        pairs = [_chat(d, tokenizer) for d in kept]
        ids, masks = [p[0] for p in pairs], [np.array(p[1], bool) for p in pairs]
    return [np.array(i, np.uint32) for i in ids], masks, [len(d.text.encode("utf-8", "surrogatepass")) for d in kept], len(documents) - len(kept)


def _encode(texts: list[str], documents: Sequence[Document], tokenizer: Tokenizer) -> list[list[int]]:
    try:
        return tokenizer.encode_batch(texts)
    except DataError:
        for text, document in zip(texts, documents):  # once more, one at a time, to name the one
            try:
                tokenizer.encode(text)
            except DataError as error:
                raise DataError(f"{document.place}: {error}") from None
        raise


def _chat(document: Document, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    try:
        return tokenizer.chat_with_mask(document.content)
    except DataError as error:
        raise DataError(f"{document.place}: {error}") from None
