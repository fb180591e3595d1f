"""Batches that score documents with a model: what `eval` reads. Each token of each document is a target once."""
from collections.abc import Iterable, Iterator

import numpy as np

from llmjax.core.errors import ConfigError, DataError
from llmjax.data.dataset import Batch, assemble
from llmjax.data.packing import best_fit
from llmjax.data.sources import Document
from llmjax.data.store import TokenStore
from llmjax.data.tokenize import tokenize
from llmjax.tokenizers import Tokenizer

GROUP_BYTES = 4_000_000
"""Text that is tokenised and packed together; a batch does not reach over it."""


def scoring_batches(documents: Iterable[str], tokenizer: Tokenizer, *, context: int, batch_size: int) -> Iterator[Batch]:
    """Batches [batch_size, context] of documents packed whole (over-long ones in stretches, each beginning anew). Before each document stands bos (else eos, else nothing: then
    its first token is not scored), so that every byte of it is predicted. Bytes scored: `scored_bytes`.

    Raises DataError without a document and for an empty one, ConfigError for a context under 2."""
    if context < 2:
        raise ConfigError(f"context {context} is too small to score text: at least 2")
    first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    group, size, some = [], 0, False
    for number, text in enumerate(documents, 1):
        group.append(Document(text, f"document {number}"))
        size, some = size + len(text), True
        if size >= GROUP_BYTES:
            yield from _score(group, tokenizer, first, context, batch_size)
            group, size = [], 0
    if group:
        yield from _score(group, tokenizer, first, context, batch_size)
    if not some:
        raise DataError("there is no document to score: the source is empty")


def _score(group: list[Document], tokenizer: Tokenizer, first: int | None, context: int, batch_size: int) -> Iterator[Batch]:
    ids = tokenize(group, tokenizer, None, "error")[0]
    store = TokenStore.of([np.concatenate([np.array([first] if first is not None else [], np.uint32), i]) for i in ids])
    plan = best_fit(store.document_starts, context)
    for begin in range(0, plan.rows, batch_size):
        rows = [(store, plan.segments(r) if r < plan.rows else []) for r in range(begin, begin + batch_size)]
        yield assemble(rows, context)


def scored_bytes(batch: Batch, token_lengths: np.ndarray) -> int:
    """Bytes of text that a batch's targets with a weight stand for; `token_lengths` is `tokenizer.token_lengths()`. Bits per byte = summed loss / ln 2 / bytes."""
    return int((token_lengths[batch["targets"]] * (batch["weights"] > 0)).sum())
