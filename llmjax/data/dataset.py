"""Batches: plans and stores become the dict that training reads, at any step, for any number of processes. The prefetching iterator is `loader.py`."""
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llmjax.core.errors import ConfigError
from llmjax.data.order import BLOCK, make_key, mix, proportions
from llmjax.data.packing import Chopped, Packed, Segments, Stretches
from llmjax.data.store import TokenStore
from llmjax.tokenizers import Tokenizer

Batch = dict[str, np.ndarray]
"""tokens, targets, positions, segment_ids int32 and weights float32, all [B, T]. Segment 0 is padding, documents are 1, 2, …; positions begin at 0 in each; weight 0 where
nothing is learnt."""


def assemble(rows: Sequence[tuple[TokenStore, Segments]], context: int) -> Batch:
    """Rows of segments to a batch [len(rows), context]; a row of no segments is padding."""
    shape = (len(rows), context)
    tokens, targets, positions, segment_ids = (np.zeros(shape, np.int32) for _ in range(4))
    weights, count = np.zeros(shape, np.float32), np.arange(context, dtype=np.int32)
    for r, (store, segments) in enumerate(rows):
        at = 0
        for k, (start, length, goes_on) in enumerate(segments, 1):
            learnt = length - (not goes_on)
            ids = store.read(start, learnt + 1)
            tokens[r, at:at + length] = ids[:length]
            targets[r, at:at + learnt] = ids[1:]
            weights[r, at:at + learnt] = store.read_mask(start, learnt + 1)[1:] if store.masked else 1
            positions[r, at:at + length] = count[:length]
            segment_ids[r, at:at + length] = k
            at += length
    return dict(tokens=tokens, targets=targets, weights=weights, positions=positions, segment_ids=segment_ids)


@dataclass(frozen=True)
class Piece:
    """One source of a split: its tokens, its rows, its share."""
    store: TokenStore
    plan: Packed | Chopped | Stretches
    weight: float


class Split:
    """The training or the held-out part. Everything is a function of (seed, contents, index): no state."""

    def __init__(self, pieces: Sequence[Piece], context: int, seed: int):
        """Raises ConfigError where a mixture's part is too light to be drawn at all."""
        self.pieces, self.context, self.seed = tuple(pieces), context, seed
        self.fingerprint = f"{make_key(seed, context, [(p.store.hash, type(p.plan).__name__, p.plan.rows, p.weight) for p in pieces]):016x}"
        self._block = functools.lru_cache(16)(self._compute_block)
        self._counts = proportions([p.weight for p in pieces])
        for i, count in enumerate(self._counts):
            if not count:
                raise ConfigError(f"Mixture.parts[{i}].weight {pieces[i].weight} is under 1/2048 of the whole: it would never be drawn")

    @property
    def rows_per_epoch(self) -> int:
        """Rows that hold everything once (of a mixture: all parts, whatever their weights)."""
        return sum(p.plan.rows for p in self.pieces)

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens in those rows, without padding."""
        return sum(p.plan.tokens for p in self.pieces)

    @property
    def documents(self) -> int:
        return sum(p.store.documents for p in self.pieces)

    @property
    def bytes(self) -> int:
        """Bytes of text behind the tokens."""
        return sum(p.store.bytes for p in self.pieces)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Steps until every row was seen (the last batch of an epoch may begin the next one)."""
        return -(-self.rows_per_epoch // batch_size)

    def row(self, index: int) -> tuple[int, int]:
        """Which piece and which row of its plan stands at a place of the endless order of training."""
        pieces, rows = self._rows(index, 1)
        return int(pieces[0]), int(rows[0])

    def _rows(self, begin: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Piece and row at `count` places from `begin` on, out of blocks computed once (a permutation costs as much for eight places as for a thousand)."""
        blocks = [self._block(b) for b in range(begin // BLOCK, (begin + count - 1) // BLOCK + 1)]
        place = slice(begin % BLOCK, begin % BLOCK + count)
        return np.concatenate([b[0] for b in blocks])[place], np.concatenate([b[1] for b in blocks])[place]

    def _compute_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        index = np.arange(block * BLOCK, (block + 1) * BLOCK, dtype=np.int64)
        if len(self.pieces) == 1:
            piece, place = np.zeros(len(index), np.int64), index
        else:
            piece, place = mix(index, self._counts, self.seed, "parts")
        rows = np.empty(len(index), np.int64)
        for p, held in enumerate(self.pieces):
            mine = piece == p
            if mine.any():
                rows[mine] = held.plan.order(place[mine], (self.seed, held.store.hash, p))
        return piece, rows

    def batch(self, step: int, batch_size: int, process_index: int = 0, process_count: int = 1) -> Batch:
        """The batch of a training step, [batch_size / process_count, context]: a pure function. `batch_size` counts rows over all processes; process i of n has
        the i-th n-th of them.
        Raises ConfigError where it does not divide."""
        share = _share(batch_size, process_index, process_count)
        pieces, rows = self._rows(step * batch_size + process_index * share, share)
        return assemble([(self.pieces[p].store, self.pieces[p].plan.segments(r)) for p, r in zip(pieces.tolist(), rows.tolist())], self.context)

    def batches(self, batch_size: int, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
        """Everything once, in a fixed order; the last batch is filled up with padding rows."""
        share = _share(batch_size, process_index, process_count)
        ends = np.cumsum([p.plan.rows for p in self.pieces])
        for begin in range(0, int(ends[-1]), batch_size):
            rows = []
            for i in range(begin + process_index * share, begin + (process_index + 1) * share):
                p = int(np.searchsorted(ends, i, "right"))
                rows.append((self.pieces[p].store, self.pieces[p].plan.segments(i - int(ends[p]) + self.pieces[p].plan.rows)) if i < ends[-1] else (self.pieces[0].store, []))
            yield assemble(rows, self.context)

    def loader(self, batch_size: int, start_step: int = 0, process_index: int = 0, process_count: int = 1, prefetch: int = 4):
        """A Grain iterator over `batch(step)` from `start_step` on: see `loader.Loader`."""
        from llmjax.data.loader import Loader
        return Loader(self, batch_size, start_step, process_index, process_count, prefetch)


def _share(batch_size: int, process_index: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count or not 0 <= process_index < process_count:
        raise ConfigError(f"batch_size {batch_size} does not divide over {process_count} processes (this is process {process_index}): make it a multiple of {process_count}")
    return batch_size // process_count


@dataclass(frozen=True)
class Dataset:
    """What `build` gives."""
    tokenizer: Tokenizer
    train: Split
    validation: Split | None
