"""From a request's fields to the engine and back: what every endpoint that makes text has in common. The endpoints themselves (chat.py, completions.py, …) only know their own forms.

A `Question` is prompts and how to continue them; `answer` asks the engine and gives back, per choice, what it said (thoughts, text, calls) as it comes.
"""
from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses as dc
import functools
import json
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar

from llmjax.core.errors import ConfigError, DataError
from llmjax.decode.grammar import Choice as OneOf
from llmjax.decode.grammar import Constraint, Grammar, JsonSchema, Lark, Regex
from llmjax.serve.engine import Engine
from llmjax.serve.errors import ApiError, bad
from llmjax.serve.parsers import Listener, Said
from llmjax.serve.protocol import Sampled
from llmjax.serve.replies import PromptDetails, TokenChance, TokenLogprob, Usage
from llmjax.serve.requests import End, Event, Knobs, Piece, Refused, Request, fresh_seed, narrow_seed

if TYPE_CHECKING:
    from llmjax.serve.semantic import SemanticStore


FOUND: ContextVar[dict[str, str]] = ContextVar("FOUND")         # headers of the reply that is being made


@dc.dataclass(frozen=True)
class Question:
    """prompts: ids of each, each continued n times; listener: a fresh one per choice. owner: whose it is, for fairness and limits."""
    prompts: list[list[int]]
    n: int
    limit: int
    knobs: Knobs
    stops: tuple[str, ...]
    end_tokens: tuple[int, ...]
    best: int
    owner: str
    priority: int
    deadline: float | None
    keep: frozenset[int] = frozenset()
    listener: Callable[[], Listener] = Listener
    grammar: Grammar | None = None
    store: Store | None = None
    semantic: SemanticStore | None = None
    adapter: str | None = None
    topic: tuple[str, str] | None = None                   # what of it may be compared by its meaning; what must be the same, the limit asked for among it

    @property
    def key(self) -> tuple[Any, ...]:
        """All that what the engine says depends on, and whose it is: nobody learns from the time it takes what somebody else has asked."""
        return (self.owner, tuple(map(tuple, self.prompts)), self.n, self.limit, self.knobs, self.stops, self.end_tokens, self.best, self.keep,
                None if self.grammar is None else self.grammar.source, self.adapter)


class Store:
    """Whole answers to questions that were asked before in every detail, the last `size` of them. Only what would come again is kept: drawn by a seed that was given, or not drawn."""

    def __init__(self, size: int, seen: Callable[[bool], None] = lambda found: None):
        self.size, self.seen = size, seen
        self.kept: collections.OrderedDict[tuple[Any, ...], list[tuple[int, list[Event]]]] = collections.OrderedDict()

    def find(self, question: Question) -> list[tuple[int, list[Event]]] | None:
        found = self.kept.get(question.key)
        if found is not None:
            self.kept.move_to_end(question.key)
        self.seen(found is not None)
        return found

    def keep(self, question: Question, said: list[tuple[int, list[Event]]]) -> None:
        self.kept[question.key] = said
        while len(self.kept) > self.size:
            self.kept.popitem(last=False)


@dc.dataclass(frozen=True)
class Part:
    """Some of choice `index`: what it said, the tokens that came with it, and its end where this is the last. cached: tokens of its prompt that were in the cache."""
    index: int
    said: Said
    pieces: tuple[Piece, ...] = ()
    end: End | None = None
    cached: int = 0


def prompt_text(tokenizer: Any, text: str, room: int, where: str) -> None:
    """Refuses a text that is too long whatever its tokens are, before time is spent on it."""
    if len(text) > room * longest_token(tokenizer):
        raise bad(f"{where}: {len(text):,} characters are more than the {room:,} tokens there is room for", where, "context_length_exceeded")


LONGEST: dict[int, int] = {}


def longest_token(tokenizer: Any) -> int:
    if id(tokenizer) not in LONGEST:
        LONGEST[id(tokenizer)] = max(1, int(tokenizer.token_lengths().max()))
    return LONGEST[id(tokenizer)]


async def encode(tokenizer: Any, text: str, *, special: bool, room: int, where: str) -> list[int]:
    """A text's ids; long texts in another thread. Raises ApiError."""
    prompt_text(tokenizer, text, room, where)
    try:
        if len(text) < 20_000:
            return list(tokenizer.encode(text, add_special_tokens=special))
        return list(await asyncio.to_thread(tokenizer.encode, text, special))
    except DataError as error:
        raise bad(str(error), where) from None


def fits(ids: list[int], limit: int | None, room: int, vocab_size: int, where: str, limit_name: str) -> int:
    """How many new tokens there may be. Raises ApiError for a prompt, or a prompt and a limit, without room, and for foreign ids."""
    if not ids:
        raise bad(f"{where}: is empty; at least one token is needed", where)
    wrong = [x for x in ids if not 0 <= x < vocab_size]
    if wrong:
        raise bad(f"{where}: the id {wrong[0]} is outside the model's vocabulary of {vocab_size}", where)
    if len(ids) >= room:
        raise bad(f"{where}: {len(ids):,} tokens, and there is room for {room:,} with the answer; shorten it", where, "context_length_exceeded")
    if limit is not None and len(ids) + limit > room:
        raise bad(f"{limit_name}={limit}: the prompt has {len(ids):,} tokens, together {len(ids) + limit:,}; there is room for {room:,}", limit_name, "context_length_exceeded")
    return room - len(ids) if limit is None else limit


def knobs_of(body: Sampled, vocab_size: int) -> Knobs:
    """Raises ApiError for a bias on a foreign id."""
    top_k = None if body.top_k in (None, 0, -1) else body.top_k
    greedy = body.temperature < 1e-5
    seed = 0 if greedy else fresh_seed() if body.seed is None else narrow_seed(body.seed)      # greedy: nothing is drawn, and the same question is to have the same key
    bias = tuple((int(k), float(v)) for k, v in (body.logit_bias or {}).items())
    wrong = [k for k, _ in bias if k >= vocab_size]
    if wrong:
        raise bad(f"logit_bias: the id {wrong[0]} is outside the model's vocabulary of {vocab_size}", "logit_bias")
    return Knobs(0.0 if greedy else body.temperature, top_k, None if body.top_p == 1 else body.top_p, body.min_p or None, seed, 0,
                 None if body.repetition_penalty == 1 else body.repetition_penalty, body.frequency_penalty or None, body.presence_penalty or None, bias, body.min_tokens or None)


@functools.lru_cache(maxsize=256)
def compiled_grammar(source: str, tokenizer: Any, vocab_size: int, ends: tuple[int, ...]) -> Grammar:
    kind, value = json.loads(source)
    made: dict[str, Callable[[Any], Constraint]] = {"json": JsonSchema, "regex": Regex, "choice": OneOf, "lark": Lark}
    return Grammar(made[kind](value), tokenizer, vocab_size, ends)


async def grammar_of(engine: Engine, kind: str, value: Any, where: str) -> Grammar:
    """A constraint ("json", "regex", "choice", "lark") compiled, the last ones kept. Raises ApiError for one that cannot be followed or satisfied."""
    try:
        return await asyncio.to_thread(compiled_grammar, json.dumps([kind, value]), engine.tokenizer, engine.model.config.vocab_size, tuple(engine.model.config.end_tokens))
    except (ConfigError, RecursionError) as error:
        raise bad(f"{where}: {error}", where, "invalid_schema") from None


async def structure_of(engine: Engine, body: Sampled, response_format: Any) -> Grammar | None:
    """The grammar that response_format or structured_outputs asks for. Raises ApiError."""
    s = body.structured_outputs
    if s is not None:
        if response_format is not None and response_format.type != "text":
            raise bad("structured_outputs and response_format both say what the answer must be; give one", "structured_outputs")
        found = next((kind, value) for kind, value in (("json", s.json_), ("regex", s.regex), ("choice", s.choice), ("lark", s.grammar)) if value is not None)
        return await grammar_of(engine, *found, "structured_outputs")
    if response_format is None or response_format.type == "text":
        return None
    schema = (response_format.schema_ or {"type": "object"}) if response_format.type == "json_object" else response_format.json_schema.schema_
    return await grammar_of(engine, "json", schema, "response_format")


def stops_of(body: Sampled, engine: Engine) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(stop strings, end tokens); the text of a special token is that token."""
    texts = [body.stop] if isinstance(body.stop, str) else list(body.stop or ())
    if any(not t for t in texts):
        raise bad("stop: an empty text would stop at once; leave it out", "stop")
    known = engine.tokenizer.special_tokens
    ends = () if body.ignore_eos else tuple(engine.model.config.end_tokens)
    return tuple(t for t in texts if t not in known), tuple({*ends, *body.stop_token_ids, *(known[t] for t in texts if t in known)})


class Mailbox:
    """What other threads tell the coroutines of a loop. It is woken once for all that comes before it looks: a step of the engine is a token for each of many requests, and to wake a loop costs
    as much as to send one."""
    boxes: ClassVar[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Mailbox]] = weakref.WeakKeyDictionary()

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop, self.lock, self.waiting = weakref.ref(loop), threading.Lock(), collections.deque[tuple[asyncio.Queue, Any]]()

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> Mailbox:
        return cls.boxes.setdefault(loop, cls(loop))

    def put(self, queue: asyncio.Queue, message: Any) -> None:
        with self.lock:
            first = not self.waiting                                       # else what stands before it has woken the loop, which looks until nothing is left
            self.waiting.append((queue, message))
        loop = self.loop()
        if first and loop is not None:
            with contextlib.suppress(RuntimeError):                        # the loop has ended
                loop.call_soon_threadsafe(self.deliver)

    def deliver(self) -> None:
        while self.waiting:
            queue, message = self.waiting.popleft()
            queue.put_nowait(message)


async def answer(engine: Engine, question: Question) -> AsyncIterator[Part]:
    """Everything said, as it comes; ends when all choices have. Left early, the engine forgets the rest at once. Raises ApiError where the engine refuses or fails."""
    said: list[tuple[int, list[Event]]] = []
    known, vector = question.store.find(question) if question.store is not None else None, None
    if known is not None:
        FOUND.get()["x-llmjax-cache"] = "exact"
    elif question.semantic is not None and question.topic is not None:
        vector = await question.semantic.vector(question)
        near = None if vector is None else question.semantic.find(question, vector)
        if near is not None:
            known, FOUND.get()["x-llmjax-cache"] = near[0], f"semantic {near[1]:.4f}"
    if known is not None:
        readers = [question.listener() for _ in range(len(question.prompts) * question.n)]
        for index, events in known:
            yield heard(readers[index], index, events, 0)
        return
    mailbox, queue = Mailbox.of(asyncio.get_running_loop()), asyncio.Queue[tuple[int, list[Event]]]()
    numbers: dict[Request, int] = {}

    def listen(request: Request, events: list[Event]) -> None:
        mailbox.put(queue, (numbers[request], events))
    born = time.monotonic()
    leader = None
    for i, prompt in enumerate(question.prompts):
        for k in range(question.n):
            knobs, ends = dc.replace(question.knobs, fold=i * question.n + k), question.end_tokens
            ends = tuple(dict.fromkeys((*ends, *question.grammar.end_tokens))) if question.grammar else ends
            request = Request(prompt, question.limit, knobs, listen, ends, question.stops, question.keep, question.best, question.owner, question.priority, question.deadline,
                              leader if k else None, question.grammar.matcher() if question.grammar else None, question.adapter, born)
            leader = request if not k else leader
            numbers[request] = len(numbers)
    requests = list(numbers)
    listeners, left = [question.listener() for _ in requests], len(requests)
    try:
        engine.submit(*requests)
    except Refused as error:
        raise ApiError(503 if error.draining else 429, str(error), code="draining" if error.draining else "queue_full", retry_after=error.seconds) from None
    except ConfigError as error:
        raise bad(str(error)) from None
    try:
        while left:
            index, events = await queue.get()
            end = events[-1] if isinstance(events[-1], End) else None
            if end is not None:
                left -= 1
                if end.reason == "error":
                    raise ApiError(end.status, end.message)
            said.append((index, events))
            sequence = requests[index].sequence
            yield heard(listeners[index], index, events, sequence.hit if sequence else 0)
        if question.store is not None:
            question.store.keep(question, said)
        if question.semantic is not None and vector is not None:
            question.semantic.keep(question, vector, said)
    finally:
        if left:
            engine.cancel(*(r for r in requests if r.sequence is None or not r.sequence.done))


def heard(listener: Listener, index: int, events: list[Event], cached: int) -> Part:
    """What events of a choice say."""
    end = events[-1] if isinstance(events[-1], End) else None
    text = "".join(e.text for e in events)
    said = listener.push(text) if text else Said()
    if end is not None:
        last = listener.close()
        said = Said(said.thought + last.thought, said.text + last.text, said.calls + last.calls)
    return Part(index, said, tuple(e for e in events if isinstance(e, Piece)), end, cached)


@dc.dataclass
class Choice:
    """A choice as it has become."""
    thought: str = ""
    text: str = ""
    calls: list = dc.field(default_factory=list)
    pieces: list[Piece] = dc.field(default_factory=list)
    end: End | None = None
    cached: int = 0

    def add(self, part: Part) -> None:
        self.thought, self.text = self.thought + part.said.thought, self.text + part.said.text
        self.calls += part.said.calls
        self.pieces += part.pieces
        self.end, self.cached = part.end or self.end, max(self.cached, part.cached)

    @property
    def finish(self) -> Any:
        assert self.end is not None
        return "length" if self.end.reason == "length" else "tool_calls" if self.calls else "stop"


async def whole(parts: AsyncIterator[Part], count: int) -> list[Choice]:
    choices = [Choice() for _ in range(count)]
    async for part in parts:
        choices[part.index].add(part)
    return choices


def usage(question: Question, made: int, cached: int) -> Usage:
    """A prompt counts once, however many choices it has."""
    asked = sum(map(len, question.prompts))
    return Usage(prompt_tokens=asked, completion_tokens=made, total_tokens=asked + made, prompt_tokens_details=PromptDetails(cached_tokens=min(cached, asked)))


def token_text(tokenizer: Any, token: int) -> tuple[str, list[int]]:
    raw = tokenizer.token_bytes(token) if token < tokenizer.vocab_size else b""
    return raw.decode("utf-8", "replace"), list(raw)


def token_logprob(tokenizer: Any, piece: Piece) -> TokenLogprob:
    assert piece.token is not None
    text, raw = token_text(tokenizer, piece.token)
    best = [TokenChance(token=token_text(tokenizer, t)[0], logprob=p, bytes=token_text(tokenizer, t)[1]) for t, p in piece.best]
    return TokenLogprob(token=text, logprob=min(0.0, piece.logprob), bytes=raw, top_logprobs=best)
