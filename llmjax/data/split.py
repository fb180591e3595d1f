"""Which documents are trained on and which are held out. Not here: reading them (`sources.py`)."""
import hashlib
import json
from collections.abc import Iterator

from llmjax.core.errors import ConfigError
from llmjax.data.config import Fraction, HeldOut, Tail, Validation
from llmjax.data.sources import Document, records


def _under(document: Document, fraction: float) -> bool:
    content = document.content if isinstance(document.content, str) else json.dumps(document.content, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).digest()) < fraction * 2**64


def training(source, validation: Validation) -> Iterator[Document]:
    """The documents trained on, in order. Raises ConfigError for a Tail of what is not text."""
    if isinstance(validation, Tail):
        yield from (head for head, _ in _cut(source, validation) if head is not None)
    elif isinstance(validation, Fraction):
        yield from (d for d in records(source) if not _under(d, validation.fraction))
    else:
        yield from records(source)


def held_out(source, validation: Validation) -> Iterator[Document]:
    """The documents held out (none where `validation` is None)."""
    if isinstance(validation, Tail):
        yield from (tail for _, tail in _cut(source, validation) if tail is not None)
    elif isinstance(validation, Fraction):
        yield from (d for d in records(source) if _under(d, validation.fraction))
    elif isinstance(validation, HeldOut):
        yield from records(validation.source)


def _cut(source, tail: Tail) -> Iterator[tuple[Document | None, Document | None]]:
    """Each document as (what stands before the cut, what stands behind it), one of them mostly None. Two passes: the first counts characters."""
    def length(document: Document) -> int:
        if not isinstance(document.content, str):
            raise ConfigError("validation Tail cuts plain text; for chat or completion records use Fraction or HeldOut")
        return len(document.content)

    cut = int(sum(length(d) for d in records(source)) * (1 - tail.fraction))
    for document in records(source):
        size = length(document)
        if cut >= size:
            yield document, None
        elif cut <= 0:
            yield None, document
        else:
            yield Document(document.content[:cut], document.place), Document(document.content[cut:], document.place)
        cut -= size
