"""Rows out of documents, planned over lengths before anything is read. A plan answers `segments(row) -> [(start, length, goes_on)]`: stretches of the store that stand in the
row one after the other; `goes_on` where the document has more after it (its next token is the last target). No tokens are touched here."""
import itertools
from dataclasses import dataclass, field

import numpy as np

from llmjax.core.errors import DataError
from llmjax.data.config import BestFit, Concatenate, Packing, Windows
from llmjax.data.order import epochs, make_key, scramble

Segments = list[tuple[int, int, bool]]


def make_plan(packing: Packing, document_starts: np.ndarray, context: int) -> "Packed | Chopped | Stretches":
    """The plan of a packing. Raises DataError where the text is too short for a window."""
    if isinstance(packing, BestFit):
        return best_fit(document_starts, context)
    if isinstance(packing, Concatenate):
        return Chopped(document_starts, context)
    assert isinstance(packing, Windows)
    return Stretches(int(document_starts[-1]), context)


@dataclass
class Packed:
    """Rows of chosen segments: row r has segments first[r]:first[r + 1] (starts int64, lengths int32, goes_on bool)."""
    first: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    goes_on: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.first) - 1

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    def order(self, index: np.ndarray, key: tuple) -> np.ndarray:
        return epochs(index, self.rows, *key)

    def segments(self, row: int) -> Segments:
        a, b = self.first[row], self.first[row + 1]
        return list(zip(self.starts[a:b].tolist(), self.lengths[a:b].tolist(), self.goes_on[a:b].tolist()))


def best_fit(document_starts: np.ndarray, context: int) -> Packed:
    """Best-fit decreasing (Johnson 1973) over documents cut to `context`: the longest first, each into the fullest row that still takes it. Items of one length are placed
    together, so the work goes with lengths times row fillings, not with documents."""
    begins, sizes = np.asarray(document_starts[:-1], np.int64), np.diff(document_starts).astype(np.int64)
    full, rest = sizes // context, sizes % context
    owner = np.repeat(np.arange(len(sizes)), full)
    nth = np.arange(len(owner)) - np.repeat(np.cumsum(full) - full, full)
    starts = np.concatenate([begins[owner] + nth * context, (begins + full * context)[rest > 0]])
    lengths = np.concatenate([np.full(len(owner), context), rest[rest > 0]])
    goes_on = np.concatenate([(nth + 1) * context < sizes[owner], np.zeros(int((rest > 0).sum()), bool)])
    row, offset = _place(lengths, context)
    order = np.lexsort((offset, row))
    first = np.searchsorted(row[order], np.arange((int(row.max()) + 1 if len(row) else 0) + 1))
    return Packed(first.astype(np.int64), starts[order], lengths[order].astype(np.int32), goes_on[order])


def _place(lengths: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and offset for each item."""
    row, offset = np.empty(len(lengths), np.int64), np.empty(len(lengths), np.int64)
    by_length = np.argsort(-lengths, kind="stable")
    counts = np.bincount(lengths, minlength=context + 1)
    shelves: list[list[np.ndarray]] = [[] for _ in range(context + 1)]  # rows by the room that is left
    held = np.zeros(context + 1, np.int64)
    rows, at = 0, 0

    def put(items, into, room, size, each):
        """`each` items into every one of the rows `into`, which have `room` left."""
        row[items] = np.repeat(into, each)
        offset[items] = context - room + np.tile(np.arange(each) * size, len(into))
        left = room - each * size
        if left:
            shelves[left].append(into)
            held[left] += len(into)

    for size in range(context, 0, -1):
        items, at = by_length[at:at + counts[size]], at + counts[size]
        while len(items):
            open_rooms = np.flatnonzero(held[size:])
            room = size + int(open_rooms[0]) if len(open_rooms) else context
            each = room // size
            if len(open_rooms):
                shelf = shelves[room]
                into = shelf.pop()
                held[room] -= len(into)
                whole = len(items) // each
                if whole < len(into):  # more rows than are needed: the others stay
                    used = whole if whole else 1
                    shelf.append(into[used:])
                    held[room] += len(into) - used
                    into = into[:used]
                    each = each if whole else len(items)
            else:
                need = len(items) // each
                each, need = (each, need) if need else (len(items), 1)
                into = np.arange(rows, rows + need)
                rows += need
            taken = len(into) * each
            put(items[:taken], into, room, size, each)
            items = items[taken:]
    return row, offset


@dataclass
class Chopped:
    """The stream cut into rows of `context`; a segment for each document in it."""
    document_starts: np.ndarray
    context: int

    @property
    def rows(self) -> int:
        return -(-self.tokens // self.context)

    @property
    def tokens(self) -> int:
        return int(self.document_starts[-1])

    def order(self, index: np.ndarray, key: tuple) -> np.ndarray:
        return epochs(index, self.rows, *key)

    def segments(self, row: int) -> Segments:
        begin, end = row * self.context, min((row + 1) * self.context, self.tokens)
        a, b = np.searchsorted(self.document_starts, [begin, end], "right")
        cuts = [begin, *(c for c in self.document_starts[a:b].tolist() if begin < c < end), end]
        last_goes_on = bool(self.document_starts[np.searchsorted(self.document_starts, end)] != end)
        return [(x, y - x, last_goes_on if y == end else False) for x, y in itertools.pairwise(cuts) if y > x]


@dataclass
class Stretches:
    """Windows of `context` tokens and the one after. Row numbers below `rows` are the windows side by side (held-out text); training draws places anywhere."""
    tokens: int
    context: int
    places: int = field(init=False)

    def __post_init__(self):
        self.places = self.tokens - self.context
        if self.places < 1:
            raise DataError(f"the text has {self.tokens} tokens, too few for a window of {self.context} and the token after it: take a smaller context or more text")

    @property
    def rows(self) -> int:
        return -(-(self.tokens - 1) // self.context)

    def order(self, index: np.ndarray, key: tuple) -> np.ndarray:
        """Random places, as negative rows: -1 - place."""
        draw = scramble(scramble(np.asarray(index, np.uint64), make_key(*key)), make_key(*key, "again"))
        return -1 - (draw % np.uint64(self.places)).astype(np.int64)

    def segments(self, row: int) -> Segments:
        begin = -1 - row if row < 0 else row * self.context
        return [(begin, min(self.context, self.tokens - 1 - begin), True)]
