"""Which sequence computes what next: a fair queue, rows, pages of the cache, prefixes that are there already, and who gives way when pages run out.

No jax, no threads and no clock here: the engine asks for a plan, carries it out, and tells what was drawn. A plan is made one step ahead of what is known: a row whose last token
is still being computed is planned on, and what turns out to lie beyond its end is thrown away.
"""
from __future__ import annotations

import dataclasses as dc
import heapq
import itertools
from collections.abc import Callable, Iterable
from typing import Any

from llmjax.decode.pages import Pages, hashes

FIRST = 4
OVERHEAD = 48          # what reading the weights costs, in tokens of a prefill: what makes short prompts worth gathering into one call


@dc.dataclass(frozen=True, order=True)
class Shape:
    """A form the step is compiled for: rows, and tokens of each row (1: decoding)."""
    rows: int
    width: int


def shapes(rows: int, chunk: int, fixed: bool = False) -> tuple[Shape, ...]:
    """A dozen forms at most, powers of two but for what the settings say; the first FIRST do for everything, the others do it faster. fixed: every call takes all
    rows (a layer keeps a state per row)."""
    if fixed:
        return tuple(dict.fromkeys((Shape(rows, 1), Shape(rows, min(16, chunk)), Shape(rows, chunk))))
    counts, short = {rows}, min(16, chunk)
    while len(counts) < 7 and min(counts) > 1:
        counts.add(1 << (min(counts) - 1).bit_length() - 1)
    first = [Shape(rows, 1), Shape(min(rows, 8), short), Shape(1, chunk), Shape(1, 1)]
    return tuple(dict.fromkeys([*first, *(Shape(r, 1) for r in sorted(counts)), Shape(1, short), Shape(1, min(64, chunk))]))


@dc.dataclass(eq=False)
class Sequence:
    """One continuation in the making.

    ids: the prompt and what was drawn and read. computed: positions whose keys are in the cache, or will be by steps already sent. ahead: tokens drawn by steps that were sent and not
    read. epoch: how often it was put back; what a step of an older epoch drew is void. `after`: another sequence of the same prompt, whose prompt is to be computed first.
    """
    number: int
    prompt: int                                   # tokens of it
    ids: list[int]
    limit: int                                    # new tokens it may make
    owner: str = ""
    priority: int = 0                             # smaller goes first
    after: Sequence | None = None
    request: Any = None                           # the engine's; the schedule does not look at it
    computed: int = 0
    ahead: int = 0
    begun: bool = False                           # its newest token is known to its row on the device
    row: int | None = None
    pages: list[int] = dc.field(default_factory=list)
    names: list[bytes] = dc.field(default_factory=list)      # of its full pages
    committed: int = 0                            # pages of it that others may share
    hit: int = 0                                  # tokens of the prompt that were in the cache already
    epoch: int = 0
    done: bool = False
    waits: bool = False                           # for its newest token to be read: its next mask, or what is guessed to follow, depends on it
    tag: float | None = None                      # its place in the fair queue
    adapter: str | None = None                    # its keys are those of this adapter alone

    @property
    def made(self) -> int:
        return len(self.ids) - self.prompt

    @property
    def exhausted(self) -> bool:
        """Whether the steps sent so far draw all it may make."""
        return self.made + self.ahead >= self.limit


@dc.dataclass(frozen=True)
class Guesses:
    """Tokens that may come next; the first `forced` of them must."""
    tokens: tuple[int, ...] = ()
    forced: int = 0


@dc.dataclass(frozen=True)
class Feed:
    """`count` tokens of a sequence from position `start`; draws: the next token is drawn after them. guesses: fed after the one token of a sequence that decodes, each a row of the call,
    with a draw after each."""
    sequence: Sequence
    start: int
    count: int
    draws: bool
    epoch: int
    row: int | None
    again: bool                                   # the token is the one it drew last
    guesses: Guesses = Guesses()

    @property
    def rows(self) -> int:
        return 1 + len(self.guesses.tokens)


@dc.dataclass(frozen=True)
class Work:
    """One call of the step."""
    shape: Shape
    feeds: list[Feed]
    decoding: bool


class FairQueue:
    """Start-time fair queueing (Goyal, Vin & Cheng 1996) within each priority: an owner who asks for much gets no larger share than one who asks for little."""

    def __init__(self) -> None:
        self.heap: list[tuple[int, float, int, Sequence]] = []
        self.finish: dict[str, float] = {}
        self.clock = 0.0
        self.gone: set[Sequence] = set()

    def __len__(self) -> int:
        return len(self.heap) - len(self.gone)

    def push(self, sequence: Sequence) -> None:
        if sequence.tag is None:
            sequence.tag = max(self.clock, self.finish.get(sequence.owner, 0.0))
            self.finish[sequence.owner] = sequence.tag + sequence.prompt + sequence.limit
            if len(self.finish) > 4096:
                self.finish = {k: v for k, v in self.finish.items() if v > self.clock}
        heapq.heappush(self.heap, (sequence.priority, sequence.tag, sequence.number, sequence))

    def remove(self, sequence: Sequence) -> None:
        self.gone.add(sequence)

    def pop(self) -> Sequence | None:
        while self.heap:
            sequence = heapq.heappop(self.heap)[-1]
            if sequence in self.gone:
                self.gone.discard(sequence)
                continue
            assert sequence.tag is not None
            self.clock = max(self.clock, sequence.tag)
            return sequence
        return None


class Schedule:
    """Rows, pages and the order of work. share: whether full pages are found again by others. guess(sequence, most): what may come next, at most so many tokens."""

    def __init__(self, rows: int, pages: Pages, forms: Iterable[Shape], *, share: bool = True, guess: Callable[[Sequence, int], Guesses] | None = None):
        self.pages, self.share, self.guess = pages, share, guess
        self.page = pages.size
        self.decoding: list[Shape] = []
        self.filling: list[Shape] = []
        for shape in forms:
            self.learn(shape)
        self.free_rows = list(range(rows))
        self.waiting = FairQueue()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.numbers = itertools.count()

    def learn(self, shape: Shape) -> None:
        """A form is ready to be used."""
        forms = self.decoding if shape.width == 1 else self.filling
        forms.append(shape)
        forms.sort()

    # coming and going

    def add(self, sequence: Sequence) -> None:
        self.waiting.push(sequence)

    def end(self, sequence: Sequence) -> None:
        """Takes a sequence out; its row and pages are free at once."""
        if sequence.done:
            return
        sequence.done = True
        if sequence.row is None:
            self.waiting.remove(sequence)
        else:
            self.vacate(sequence)

    def vacate(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        assert sequence.row is not None
        self.free_rows.append(sequence.row)
        self.pages.release(sequence.pages)
        sequence.row, sequence.pages, sequence.committed, sequence.begun = None, [], 0, False

    def preempt(self, sequence: Sequence) -> None:
        """Puts a running sequence back: what it has so far is computed anew when its turn comes (most of it may still be found in the cache then)."""
        self.vacate(sequence)
        sequence.computed, sequence.ahead = 0, 0
        sequence.epoch += 1
        self.preemptions += 1
        self.waiting.push(sequence)

    @property
    def busy(self) -> bool:
        return bool(self.running) or len(self.waiting) > 0

    # the next steps

    def plan(self) -> list[Work]:
        """What to compute now: at most one piece of prompts, and a token for every row that decodes."""
        rows = self.decoding_rows()
        self.admit()
        return self.fill() + self.decode([s for s in rows if s.begun])

    def decoding_rows(self) -> list[Sequence]:
        """The rows that decode, each with a page for its next token: the least urgent give way where there is none left."""
        order = sorted((s for s in self.running if s.begun and not s.exhausted and not (s.waits and s.ahead)), key=self.urgency)
        for sequence in order:
            while sequence.row is not None and sequence.computed >= len(sequence.pages) * self.page:
                found = self.pages.allocate(1)
                if found is not None:
                    sequence.pages += found
                    break
                self.preempt(max(self.running, key=self.urgency))
        return order

    @staticmethod
    def urgency(sequence: Sequence) -> tuple[int, float, int]:
        assert sequence.tag is not None
        return sequence.priority, sequence.tag, sequence.number

    def admit(self) -> None:
        """Waiting sequences into free rows, as long as the pages of their prompts can be had."""
        held: list[Sequence] = []
        while True:
            sequence = self.waiting.pop()
            if sequence is None:
                break
            leader = sequence.after
            if leader is not None and not leader.begun and not leader.done:
                held.append(sequence)
                continue
            if not self.place(sequence):
                held.append(sequence)
                break
        for sequence in held:
            self.waiting.push(sequence)

    def place(self, sequence: Sequence) -> bool:
        """Gives it a row and the pages of what it has so far; a less urgent row may have to give way. -> whether it fits."""
        while not self.try_place(sequence):
            last = max(self.running, key=self.urgency, default=None)
            if last is None or last.priority <= sequence.priority:
                return False
            self.preempt(last)
        return True

    def try_place(self, sequence: Sequence) -> bool:
        if not self.free_rows:
            return False
        known = self.pages.lookup(self.named(sequence)[:(len(sequence.ids) - 1) // self.page]) if self.share else []      # the last token is always computed: its logits are wanted
        wanted = -(-(len(sequence.ids) + 1) // self.page) - len(known)
        fresh = self.pages.allocate(wanted)
        if fresh is None:
            self.pages.release(known)
            return False
        sequence.pages, sequence.row = known + fresh, self.free_rows.pop()
        sequence.computed = len(known) * self.page
        sequence.committed = len(known)
        if sequence.epoch == 0:
            sequence.hit = sequence.computed
        self.running.append(sequence)
        return True

    def fill(self) -> list[Work]:
        """One call that computes prompts: the form that gets most done for what it costs, the sequence that came first always in it."""
        ready = [s for s in self.running if not s.begun]
        if not ready:
            return []
        def pieces(shape: Shape) -> list[tuple[Sequence, int]]:
            return [(s, min(shape.width, len(s.ids) - s.computed)) for s in ready[:shape.rows]]
        shape = max(self.filling, key=lambda x: sum(count for _, count in pieces(x)) / (x.rows * x.width + OVERHEAD))
        feeds = []
        for s, count in pieces(shape):
            draws = s.computed + count == len(s.ids)
            feeds.append(Feed(s, s.computed, count, draws, s.epoch, s.row, False))
            s.computed += count
            if draws:
                s.begun, s.ahead = True, 1
            self.commit(s)
        return [Work(shape, feeds, False)]

    def decode(self, rows: list[Sequence]) -> list[Work]:
        works = []
        while rows:
            part, rows = rows[:self.decoding[-1].rows], rows[self.decoding[-1].rows:]
            guesses = self.guessed(part, self.decoding[-1].rows - len(part))
            feeds = [Feed(s, s.computed, 1, True, s.epoch, s.row, True, g) for s, g in zip(part, guesses)]
            works.append(Work(next(x for x in self.decoding if x.rows >= sum(f.rows for f in feeds)), feeds, True))
            for s in part:
                s.computed += 1
                s.ahead += 1
        return works

    def guessed(self, part: list[Sequence], room: int) -> list[Guesses]:
        """What to feed beyond each sequence's newest token, as long as rows of the call and pages are left: nobody gives way to a guess."""
        found = []
        for i, s in enumerate(part):
            most = min(room // (len(part) - i), s.limit - s.made - 1)
            guesses = self.guess(s, most) if self.guess is not None and s.waits and most > 0 else Guesses()
            need = -(-(s.computed + 1 + len(guesses.tokens)) // self.page) - len(s.pages)
            fresh = self.pages.allocate(need) if need > 0 else []
            if fresh is None:
                guesses, fresh = Guesses(), []
            s.pages += fresh
            room -= len(guesses.tokens)
            found.append(guesses)
        return found

    # what was drawn

    def drew(self, feed: Feed, token: int, guess: int = 0) -> bool:
        """A token of a step was read, the one after so many guesses, which were right. -> whether it counts (the sequence may have ended or been put back since)."""
        s = feed.sequence
        if s.done or s.epoch != feed.epoch:
            return False
        s.ids.append(token)
        if guess:
            s.computed += 1
        else:
            s.ahead -= 1
        self.commit(s)
        return True

    def commit(self, s: Sequence) -> None:
        """Lets others share the pages that are full of tokens we know. Steps run in order, so a page that is still being computed is whole for whoever reads it later."""
        full = min(s.computed, len(s.ids)) // self.page
        if self.share and full > s.committed:
            self.pages.commit(s.pages[:full], self.named(s)[:full])
            s.committed = full

    def named(self, s: Sequence) -> list[bytes]:
        """The names of its full pages."""
        if len(s.names) < len(s.ids) // self.page:
            s.names = hashes(s.ids, self.page, adapter=s.adapter, known=s.names)
        return s.names
