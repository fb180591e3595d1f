"""A planned call as arrays: what each row feeds, and how it draws."""
from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from llmjax.serve.requests import Request
from llmjax.serve.schedule import Feed, Work
from llmjax.serve.step import BIASES, ENDS, Rows


def placed(work: Work, fixed: bool) -> list[tuple[int, Feed]]:
    """Each feed with its first row of the call. fixed: a sequence's row is always the same."""
    first = itertools.accumulate((feed.rows for feed in work.feeds), initial=0)
    return [(feed.row if fixed and feed.row is not None else i, feed) for i, feed in zip(first, work.feeds)]


def fill(rows: Rows, i: int, feed: Feed, nobody: int) -> None:
    """Writes what a sequence feeds into row i, and its guesses into the rows after it. A sequence with guesses leaves nothing in its row on the device (nobody: the place beyond them):
    which of its tokens stand is only known when they are read."""
    sequence, guesses = feed.sequence, feed.guesses.tokens
    known = feed.start < len(sequence.ids)
    pages = sequence.pages[:rows.table.shape[1]]
    at = slice(i, i + feed.rows)
    rows.start[at], rows.count[at], rows.draws[at] = feed.start + np.arange(feed.rows), feed.count, feed.draws
    rows.row[at] = nobody if guesses else feed.row
    rows.again[i] = not known
    rows.table[at, :len(pages)] = pages
    if known:
        rows.tokens[i, :feed.count] = sequence.ids[feed.start:feed.start + feed.count]
    if guesses:
        rows.tokens[i + 1:i + feed.rows, 0] = guesses


def set_knobs(rows: Rows, i: int, feed: Feed) -> None:
    """Writes how the draws from row i on are made."""
    request: Request = feed.sequence.request
    knobs, to, at = request.knobs, rows.knobs, slice(i, i + feed.rows)
    rows.seed[at], rows.fold[at], rows.made[at] = knobs.seed, knobs.fold, feed.start + feed.count - feed.sequence.prompt + np.arange(feed.rows)
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "min_tokens"):
        value = getattr(knobs, name)
        if value is not None:
            getattr(to, name)[at] = value
    if knobs.logit_bias and to.logit_bias is not None:
        ids, values = (np.asarray(x) for x in to.logit_bias)
        for j, (token, value) in enumerate(knobs.logit_bias[:BIASES]):
            ids[at, j], values[at, j] = token, value
    if knobs.min_tokens:
        np.asarray(to.end_tokens)[at, :len(request.end_tokens)] = request.end_tokens[:ENDS]


def padded(ids: Sequence[int]) -> np.ndarray:
    """To a power of two, with -1, so that few programs are compiled."""
    out = np.full(max(16, 1 << (len(ids) - 1).bit_length() if ids else 16), -1, np.int32)
    out[:len(ids)] = ids
    return out
