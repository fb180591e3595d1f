"""Who has which page of a paged cache: a free list, reference counts, full pages found again by what they hold. Host bookkeeping in plain Python; the arrays are `decode.init_paged`'s.

A page is free, in use (one or more requests refer to it), or kept: nobody's, but still found by its hash until it is needed. Full pages are named by a hash over everything that their
keys depend on: the tokens up to their end, and what else changes keys (`hashes`). Not for several threads at once.

The scheme is vLLM's automatic prefix caching (docs.vllm.ai, design/prefix_caching); reference counts and copy on write are those of Kwon et al. 2023, arXiv:2309.06180, section 4.3-4.4.
"""
from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from llmjax.core.errors import ConfigError


def hashes(ids: Sequence[int], size: int, *, adapter: str | None = None, salt: str | None = None, known: Sequence[bytes] = ()) -> list[bytes]:
    """A name for each full page of `size` tokens of a text: SHA-256 over the name of the page before and the page's ids, so that equal names mean equal prefixes.

    adapter, salt: what else keys depend on, or who may share them (an adapter's name is not enough where its weights can be replaced: add a version). Each is hashed under a tag and
    with its length, so that no adapter is another's salt. known: the names of the first pages where they were made before; they are not made again.
    """
    begin = b"llmjax pages %d" % size
    for tag, value in ((b"adapter", adapter), (b"salt", salt)):
        if value is not None:
            text = value.encode("utf-8", "surrogatepass")
            begin += b"|%s %d " % (tag, len(text)) + text
    found = list(known)
    for start in range(len(found) * size, len(ids) - size + 1, size):
        found.append(hashlib.sha256((found[-1] if found else hashlib.sha256(begin).digest()) + array("q", ids[start:start + size]).tobytes()).digest())
    return found


class Pages:
    """The pages 0 … count - 1 of `size` positions each. Counters for metrics: `asked` and `found` pages of look-ups, `evicted` kept pages whose content was given up."""

    def __init__(self, count: int, size: int = 16):
        """Raises ConfigError for a count or a size below 1."""
        for name, value in (("count", count), ("size", size)):
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"Pages: {name}={value!r}; a whole number from 1 is wanted")
        self.count, self.size = count, size
        self.references = [0] * count
        self.empty = list(range(count - 1, -1, -1))               # taken from the end: low numbers first
        self.kept: OrderedDict[int, None] = OrderedDict()         # nobody's, with a name; the first was let go longest ago
        self.by_name: dict[bytes, int] = {}
        self.names: dict[int, bytes] = {}
        self.asked = self.found = self.evicted = 0

    @property
    def free(self) -> int:
        """How many can be had: the empty ones and the kept ones."""
        return len(self.empty) + len(self.kept)

    @property
    def used(self) -> int:
        """How many somebody refers to."""
        return self.count - self.free

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages of anything, each referred to once, or None (and nothing is taken) where fewer can be had. Kept pages go last, the one let go longest ago first."""
        if count > self.free:
            return None
        return [self.take() for _ in range(count)]

    def take(self) -> int:
        if self.empty:
            page = self.empty.pop()
        else:
            page, _ = self.kept.popitem(last=False)
            self.forget(page)
            self.evicted += 1
        self.references[page] = 1
        return page

    def lookup(self, names: Sequence[bytes]) -> list[int]:
        """The pages that hold the longest beginning of `names` (see `hashes`), each with one more reference. Whoever needs logits leaves at least one token out: look for the names of
        (len(ids) - 1) // size pages."""
        pages = []
        for name in names:
            page = self.by_name.get(name)
            if page is None:
                break
            pages.append(page)
        self.share(pages)
        self.asked, self.found = self.asked + len(names), self.found + len(pages)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more reference to each; a kept page is in use again. Raises ValueError for a page that holds nothing."""
        for page in pages:
            if not self.references[page] and page not in self.kept:
                raise ValueError(f"page {page} is free: there is nothing in it to share")
            self.kept.pop(page, None)
            self.references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One reference less to each, of a request that ended or was preempted; give them in the order of the text, for of one prefix its end goes first. A page that nobody refers to
        is kept where it has a name, else it is empty. Raises ValueError for a page that nobody refers to."""
        for page in reversed(pages):
            if not self.references[page]:
                raise ValueError(f"page {page} is released twice")
            self.references[page] -= 1
            if self.references[page]:
                continue
            if page in self.names:
                self.kept[page] = None
            else:
                self.empty.append(page)

    def commit(self, pages: Sequence[int], names: Sequence[bytes]) -> None:
        """Full pages become known by their names (`hashes`), once their keys are written or will be before anybody reads them. A name that another page has already stays with it.
        Raises ValueError for a page that nobody refers to."""
        for page, name in zip(pages, names):
            if not self.references[page]:
                raise ValueError(f"page {page} is nobody's: commit before release")
            if page not in self.names and name not in self.by_name:
                self.names[page], self.by_name[name] = name, page

    def writable(self, page: int) -> int | None:
        """The page to write to in place of one that a request refers to: itself where nobody else does (its name is forgotten, for what it holds changes), else a fresh one, for which
        this reference to the old one is given up and to which the caller copies (`decode.copy_pages`). None where a fresh one is needed and none is free; then nothing changes."""
        if self.references[page] == 1:
            self.forget(page)
            return page
        got = self.allocate(1)
        if got is None:
            return None
        self.references[page] -= 1
        return got[0]

    def forget(self, page: int) -> None:
        """Nobody finds it by its name any more."""
        name = self.names.pop(page, None)
        if name is not None:
            del self.by_name[name]

    def clear(self) -> None:
        """Kept pages become empty and no page is found again: after weights or an adapter have changed."""
        for page in list(self.names):
            self.forget(page)
        self.empty.extend(self.kept)
        self.kept.clear()
