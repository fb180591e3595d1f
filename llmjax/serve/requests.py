"""What is asked of the engine and what it answers: requests with their knobs, the events of their texts, and who watches."""
from __future__ import annotations

import dataclasses as dc
import secrets
import time
from collections.abc import Callable

from llmjax.decode.grammar import Matcher
from llmjax.decode.text import TextStream
from llmjax.serve import schedule
from llmjax.serve.schedule import Guesses, Work
from llmjax.serve.step import DRAWN, FILTERED, FULL, PLAIN


@dc.dataclass(frozen=True)
class Knobs:
    """How tokens are drawn; see decode.Sampling. seed: 32 bits."""
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0
    fold: int = 0
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int | None = None

    @property
    def remembers(self) -> bool:
        """Whether draws depend on what the text holds already."""
        return any(x is not None for x in (self.repetition_penalty, self.frequency_penalty, self.presence_penalty))

    @property
    def level(self) -> int:
        """What of the step's forms this needs."""
        if self.remembers or self.logit_bias or self.min_tokens:
            return FULL
        if not self.temperature:
            return PLAIN
        return FILTERED if any(x is not None for x in (self.top_k, self.top_p, self.min_p)) else DRAWN


@dc.dataclass(frozen=True)
class Piece:
    """What came of one token: the text that became certain with it (maybe none), the id, its log-probability, and the best tokens' where asked for."""
    text: str
    token: int | None
    logprob: float = 0.0
    best: tuple[tuple[int, float], ...] = ()


@dc.dataclass(frozen=True)
class End:
    """reason: "stop" (an end token, or a stop string), "length", "cancelled", or "error" with its message. text: what was held back until now."""
    reason: str
    text: str = ""
    message: str = ""
    status: int = 500                                  # of an error, as HTTP has it
    stopped_at: str | int | None = None


Event = Piece | End


@dc.dataclass
class Luck:
    """How guesses fared so far: whether the last were all right, how many of them were, how often in a row none was, and how many steps to go without."""
    whole: bool = True
    right: int = 0
    misses: int = 0
    pause: int = 0


@dc.dataclass(eq=False)
class Request:
    """One continuation asked for. listen(request, events) is called in the engine's thread, the last time with an End. deadline: on time.monotonic's clock."""
    prompt: list[int]
    limit: int
    knobs: Knobs
    listen: Callable[[Request, list[Event]], None]
    end_tokens: tuple[int, ...] = ()
    stops: tuple[str, ...] = ()
    keep: frozenset[int] = frozenset()
    best: int = 0
    owner: str = ""
    priority: int = 0
    deadline: float | None = None
    after: Request | None = None
    matcher: Matcher | None = None                     # its place in a grammar, its own
    adapter: str | None = None                         # the name of a loaded one
    born: float = dc.field(default_factory=time.monotonic)
    sequence: schedule.Sequence | None = None
    luck: Luck = dc.field(default_factory=Luck)
    text: TextStream | None = None
    started: float | None = None                       # when it got its row
    first: float | None = None                         # when its first token was read
    latest: float | None = None
    cancelled: bool = False


class Refused(Exception):
    """The engine takes no more requests now; after `seconds` it may."""

    def __init__(self, message: str, seconds: int, draining: bool = False):
        super().__init__(message)
        self.seconds, self.draining = seconds, draining


class Observer:
    """What happens in the engine, for metrics; does nothing by itself."""

    def admitted(self, request: Request, waited: float) -> None: ...
    def first_token(self, seconds: float) -> None: ...
    def between_tokens(self, seconds: float) -> None: ...
    def ended(self, request: Request, reason: str, seconds: float) -> None: ...
    def stepped(self, work: Work) -> None: ...
    def judged(self, guesses: Guesses, right: int) -> None: ...


def fresh_seed() -> int:
    return secrets.randbits(32)


def narrow_seed(seed: int) -> int:
    """A seed of any size as 32 bits; those that fit stay."""
    return (seed ^ (seed >> 32)) & 0xFFFFFFFF if seed >= 0 else narrow_seed(~seed) ^ 0x80000000
