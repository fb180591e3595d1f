"""The engine: one thread that owns the device. It takes orders (new requests, cancellations), asks the schedule for a plan, sends the next step before it reads the last one, and gives
what was drawn to whoever waits for it. No HTTP here, and no asyncio: a listener is a function, called in the engine's thread.
"""
from __future__ import annotations

import collections
import contextlib
import dataclasses as dc
import logging
import math
import threading
import time
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from llmjax import decode
from llmjax.core.errors import ConfigError
from llmjax.core.model_config import LanguageHead, Recurrent
from llmjax.decode.history import History
from llmjax.decode.pages import Pages
from llmjax.decode.speculative import NGram
from llmjax.decode.text import TextStream
from llmjax.serve import schedule
from llmjax.serve.adapters import Paths, attached
from llmjax.serve.drafts import Drafts, write_masks
from llmjax.serve.feeding import fill, padded, placed, set_knobs
from llmjax.serve.requests import End, Event, Observer, Piece, Refused, Request
from llmjax.serve.schedule import Schedule, Shape, Work
from llmjax.serve.step import FULL, PLAIN, Drawn, Memory, Rows, clean, compiled, empty_rows, no_mask, recall

log = logging.getLogger("llmjax.serve")


@dc.dataclass(frozen=True)
class EngineSettings:
    """rows: sequences that run together. length: positions of a sequence, prompt and answer (None: the model's context). page: positions of a page. memory: bytes of the cache (None: room
    for 1,024 tokens of every row, or a quarter of the length where that is less; at least for one whole sequence). chunk: tokens of a prompt computed at a time. queue: requests that may wait.
    speculate: guess what comes next from the text so far (serve/drafts.py); None: nothing is guessed but what a grammar forces."""
    rows: int = 32
    length: int | None = None
    page: int = 16
    memory: int | None = None
    chunk: int = 128
    queue: int = 256
    share_prefixes: bool = True
    speculate: NGram | None = None


DEFAULT = EngineSettings()


class Engine:
    """Continuous batching over one model. `submit` and `cancel` may be called from any thread."""

    def __init__(self, model: Any, params: Any, tokenizer: Any, settings: EngineSettings = DEFAULT, observer: Observer | None = None,
                 adapters: Paths = MappingProxyType({})):
        """adapters: folders of LoRA adapters, by the names that requests call them by. Raises ConfigError for a model that generates no text, or whose layers a paged cache cannot hold."""
        config = model.config
        if not isinstance(config.head, LanguageHead) or config.encoder:
            raise ConfigError("serving text takes a decoder with a language head; this model answers embeddings only")
        self.model, self.params = decode.prepare(model, params)
        self.tokenizer, self.settings, self.observer = tokenizer, settings, observer or Observer()
        places = {x.sharding for x in jax.tree.leaves(self.params) if isinstance(x, jax.Array) and len(x.sharding.device_set) > 1}
        self.mesh: jax.sharding.Mesh | None = next((p.mesh for p in places if isinstance(p, NamedSharding)), None)      # type: ignore[assignment]
        self.adapters = (None, *adapters)                  # the place of a name here is what the step knows it by
        self.params = attached(self.model, self.params, adapters, self.mesh)
        if settings.page < 1 or settings.page & (settings.page - 1):
            raise ConfigError(f"page={settings.page}: a power of two is wanted")
        self.length = min(settings.length or config.context, config.context)
        self.fixed = any(isinstance(x.mixer, Recurrent) for x in config.layers)      # a state stands in its row; and no prefix of it can be found again
        if self.fixed and settings.speculate is not None:
            raise ConfigError("speculation: a layer of this model keeps a state, which cannot take a token back; serve it without")
        self.drafts = Drafts(settings.speculate)
        self.share = settings.share_prefixes and not self.fixed
        self.total = self.count_pages()
        self.length = min(self.length, self.total * settings.page)
        self.shapes = schedule.shapes(settings.rows, min(settings.chunk, self.length), self.fixed)
        self.orders: collections.deque[tuple[str, Any]] = collections.deque()
        self.wake = threading.Condition()
        self.requests: dict[schedule.Sequence, Request] = {}
        self.waiting = 0                                   # requests sent and not yet ended
        self.closed = self.ended = self.ready = False
        self.failure: str | None = None
        self.beat = time.monotonic()
        self.delay = 0.0                                   # tests: seconds every step takes longer
        self.programs: dict[Shape, Any] = {}
        self.known: list[Shape] = []                       # forms that are compiled
        self.reset()
        self.like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.memory)
        self.masks: dict[int, jax.Array] = {}              # of no grammar, by rows: sent once
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self.compiling = threading.Thread(target=self.warm_rest, name="compile", daemon=True)

    # size

    def page_bytes(self) -> int:
        """Bytes of one page in all layers."""
        def size(pages: int) -> int:
            cache = jax.eval_shape(lambda: decode.init_paged(self.model, 1, pages, page=self.settings.page, length=self.length))
            return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(cache))
        return max(1, size(2) - size(1))

    def count_pages(self) -> int:
        whole = -(-self.length // self.settings.page)
        if self.settings.memory is not None:
            count = self.settings.memory // self.page_bytes()
            if count < 2:
                raise ConfigError(f"memory={self.settings.memory}: one page of the cache takes {self.page_bytes()} bytes; give more")
            return count
        return max(whole, self.settings.rows * min(-(-whole // 4), -(-1024 // self.settings.page)))

    def describe(self) -> str:
        size = self.page_bytes() * self.total
        return f"{self.settings.rows} rows of up to {self.length} tokens, {self.total} pages of {self.settings.page} tokens in the cache ({size / 2**20:,.0f} MiB), {len(self.shapes)} programs"

    def reset(self) -> None:
        """Fresh cache, pages and schedule."""
        self.pages = Pages(self.total, self.settings.page)
        self.schedule = Schedule(self.settings.rows, self.pages, self.known, share=self.share, guess=None if self.fixed else lambda s, most: self.drafts.guess(s.request, most))
        with self.on_mesh():
            cache = decode.init_paged(self.model, self.settings.rows, self.total, page=self.settings.page, length=self.length)
            rows, size = self.settings.rows + 1, self.model.config.vocab_size
            history = History(seen=jnp.zeros((rows, size), bool), counts=jnp.zeros((rows, size), jnp.int32))
            self.memory = self.placed_on_mesh(Memory(dc.replace(cache, table=None), jnp.zeros(rows, jnp.int32), history))

    def on_mesh(self) -> Any:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def placed_on_mesh(self, state: Any) -> Any:
        return state if self.mesh is None else jax.device_put(state, decode.cache_shardings(state, self.mesh))

    # from other threads

    def start(self) -> None:
        self.thread.start()

    def submit(self, *requests: Request) -> None:
        """Raises Refused where the queue is full or the server is about to end, ConfigError for a prompt or limit that can never fit."""
        for r in requests:
            if r.adapter not in self.adapters:
                raise ConfigError(f"the adapter {r.adapter!r} is not loaded")
            if len(r.prompt) + r.limit > self.length:
                raise ConfigError(f"the prompt has {len(r.prompt)} tokens and {r.limit} more are asked for, together {len(r.prompt) + r.limit}; there is room for {self.length}")
        with self.wake:
            if self.closed or self.ended:
                raise Refused("the server is shutting down", 5, draining=True)
            if self.failure:
                raise Refused("the engine has failed", 30, draining=True)
            if self.waiting + len(requests) > self.settings.queue + self.settings.rows:
                raise Refused(f"the queue is full ({self.settings.queue} wait); try again later", 1 + self.waiting // max(1, self.settings.rows))
            self.waiting += len(requests)
            self.orders.extend(("new", r) for r in requests)
            self.wake.notify()

    def cancel(self, *requests: Request) -> None:
        """Ends requests that nobody wants any more; their pages are free with the next plan."""
        with self.wake:
            for r in requests:
                r.cancelled = True
                self.orders.append(("cancel", r))
            self.wake.notify()

    def close(self) -> None:
        """No new requests; what runs goes on."""
        with self.wake:
            self.closed = True
            self.wake.notify()

    def stop(self, timeout: float = 15.0) -> None:
        """Ends the thread; what still runs ends with an error."""
        with self.wake:
            self.closed = self.ended = True
            self.wake.notify()
        for thread in (self.thread, self.compiling):
            if thread.is_alive():
                thread.join(timeout)

    @property
    def stopped(self) -> bool:
        """Whether no thread of it is left: one that is within a compilation when Python ends takes the process down with it."""
        return not self.thread.is_alive() and not self.compiling.is_alive()

    @property
    def stalled(self) -> float:
        """Seconds since the engine last moved while there was something to do; 0 where there is nothing."""
        return time.monotonic() - self.beat if self.waiting and self.thread.is_alive() else 0.0

    @property
    def alive(self) -> bool:
        return self.failure is None and (self.thread.is_alive() or not self.thread.ident)

    # the engine's thread

    def run(self) -> None:
        try:
            with self.on_mesh():
                self.work()
        except Exception as error:
            log.exception("the engine failed")
            self.failure = f"{type(error).__name__}: {error}"
        finally:
            self.ready = False
            with self.wake:
                self.ended = True
                left = [r for kind, r in self.orders if kind == "new"]
                self.orders.clear()
            for request in left + list(self.requests.values()):
                self.finish(request, End("error", message="the server stopped", status=503))

    def work(self) -> None:
        self.warm()
        self.ready = True
        flying: list[tuple[Work, Drawn]] = []
        while True:
            self.take_orders(wait=not flying and not self.schedule.busy)
            if self.ended:
                break
            self.beat = time.monotonic()
            try:
                flying = self.turn(flying)
            except Exception as error:
                log.exception("a step failed")
                self.recover(f"the step failed: {type(error).__name__}")
                flying = []

    def turn(self, flying: list[tuple[Work, Drawn]]) -> list[tuple[Work, Drawn]]:
        """Sends the next steps, then reads the last ones. Where most of what is under way waits to be read before it can go on, it is read first: those would go on every second turn
        else, and not even together."""
        under_way = [feed.sequence.waits for work, _ in flying for feed in work.feeds if feed.draws]
        if 2 * sum(under_way) > len(under_way):
            for work, drawn in flying:
                self.read(work, drawn)
            flying = []
        works = self.schedule.plan()
        for work in works:
            for feed in work.feeds:
                request = feed.sequence.request
                if request.started is None:
                    request.started = time.monotonic()
                    self.observer.admitted(request, request.started - request.born)
        sent = [(work, self.send(work)) for work in works]
        for work, drawn in flying:
            self.read(work, drawn)
        return sent

    def warm(self) -> None:
        """Compiles what the step needs; what only makes it faster comes later, in a thread of its own, which tells by an order when a form is there."""
        for shape in self.shapes[:schedule.FIRST]:
            if self.ended:
                return
            self.prepare(shape)
            self.learn(shape)
        self.compiling.start()

    def warm_rest(self) -> None:
        for shape in self.shapes[schedule.FIRST:]:
            if self.ended:
                return
            try:
                with self.on_mesh():
                    self.prepare(shape)
            except Exception:
                log.exception("a faster form of the step did not compile; the others serve in its place")
                return
            with self.wake:
                self.orders.append(("form", shape))
                self.wake.notify()

    def prepare(self, shape: Shape) -> None:
        began = time.monotonic()
        self.programs[shape] = compiled(self.model, self.params, self.like, self.idle(shape))
        self.beat = time.monotonic()
        log.debug("compiled %s in %.1f s", shape, self.beat - began)

    def learn(self, shape: Shape) -> None:
        """Runs a form that is compiled on idle rows, for its first call takes longer (half a second was measured on a CPU), and lets the schedule use it."""
        self.memory, drawn = self.programs[shape](self.params, self.memory, self.idle(shape))
        jax.block_until_ready(drawn)
        self.known.append(shape)
        self.schedule.learn(shape)

    def idle(self, shape: Shape) -> Rows:
        size = self.model.config.vocab_size
        if shape.rows not in self.masks:
            self.masks[shape.rows] = jax.device_put(no_mask(shape.rows, size)) if self.mesh is None else no_mask(shape.rows, size)      # type: ignore[assignment]
        return empty_rows(shape.rows, shape.width, -(-self.length // self.settings.page), self.settings.rows, size, self.masks[shape.rows])

    def take_orders(self, wait: bool) -> None:
        with self.wake:
            while wait and not self.orders and not self.ended:
                self.wake.wait()
            orders, self.orders = self.orders, collections.deque()
        self.beat = time.monotonic()
        for kind, request in orders:
            if kind == "form":
                try:
                    self.learn(request)
                except Exception:                          # no memory for it, say; the cache it was given is gone
                    log.exception("a faster form of the step does not run; the others serve in its place")
                    self.recover("a form of the step failed")
            elif kind == "new":
                if not request.cancelled:
                    self.open(request)
                else:
                    self.finish(request, End("cancelled"))
            elif request.sequence is not None and not request.sequence.done:
                self.finish(request, End("cancelled"))
        late = [r for r in self.requests.values() if r.deadline is not None and r.deadline < self.beat]
        for request in late:
            self.finish(request, End("error", message="the request ran out of time", status=504))

    def open(self, request: Request) -> None:
        after = request.after.sequence if request.after is not None else None
        sequence = schedule.Sequence(next(self.schedule.numbers), len(request.prompt), list(request.prompt), request.limit, request.owner, request.priority, after, request,
                                     waits=request.matcher is not None or self.drafts.wanted(request), adapter=request.adapter)
        request.sequence = sequence
        if self.tokenizer is not None:
            request.text = TextStream(self.tokenizer, request.prompt, request.stops, least=request.knobs.min_tokens or 0, keep=request.keep)
        self.requests[sequence] = request
        self.schedule.add(sequence)

    def finish(self, request: Request, end: End, before: Sequence[Event] = ()) -> None:
        if request.sequence is not None:
            self.schedule.end(request.sequence)
            self.requests.pop(request.sequence, None)
        with self.wake:
            self.waiting -= 1
        self.observer.ended(request, end.reason, time.monotonic() - request.born)
        request.listen(request, [*before, end])

    def recover(self, message: str) -> None:
        """After a step that raised: its cache is gone. What ran ends with an error, what waits goes on with a fresh cache."""
        running = list(self.schedule.running)
        waiting = [s for s in self.requests if s not in running]
        for sequence in running:
            self.finish(self.requests[sequence], End("error", message=message))
        self.reset()
        for sequence in waiting:
            sequence.tag = None
            self.schedule.add(sequence)

    def send(self, work: Work) -> Drawn:
        """A call of the step; nothing is waited for."""
        shape = work.shape
        rows = self.idle(shape)
        level, top, mask = PLAIN, False, None
        for i, feed in placed(work, self.fixed):
            request: Request = feed.sequence.request
            fill(rows, i, feed, self.settings.rows)
            rows.adapter[i:i + feed.rows] = self.adapters.index(request.adapter)
            if not feed.draws:
                continue
            set_knobs(rows, i, feed)
            if request.knobs.remembers and not feed.again:
                self.recall(feed.sequence)
            level, top = max(level, request.knobs.level, FULL if request.matcher else PLAIN), top or request.best > 0
            if request.matcher is not None:
                mask = no_mask(shape.rows, self.model.config.vocab_size) if mask is None else mask
                write_masks(request.matcher, feed.guesses.tokens, mask[i:i + feed.rows])
        rows = dc.replace(rows, level=np.int32(level), top=np.bool_(top), mask=rows.mask if mask is None else mask)
        self.memory, drawn = self.programs[shape](self.params, self.memory, rows)
        self.observer.stepped(work)
        return drawn

    def recall(self, sequence: schedule.Sequence) -> None:
        """What its row remembers, from its text so far."""
        assert sequence.row is not None
        prompt, answer = sequence.ids[:sequence.prompt], sequence.ids[sequence.prompt:]
        self.memory = dc.replace(self.memory, history=recall(self.memory.history, np.int32(sequence.row), padded(prompt), padded(answer)))

    def read(self, work: Work, drawn: Drawn) -> None:
        """Waits for a step and gives every sequence its tokens: that after its newest, and those after guesses that were right."""
        if self.delay:
            time.sleep(self.delay)
        tokens, logprobs = np.asarray(drawn.tokens).tolist(), np.asarray(drawn.logprobs).tolist()
        best = None
        now = time.monotonic()
        for i, feed in placed(work, self.fixed):
            if not feed.draws or feed.sequence.done or feed.epoch != feed.sequence.epoch:
                continue
            request, right = feed.sequence.request, self.drafts.judge(feed, tokens[i:i + feed.rows])
            if feed.guesses.tokens:
                self.observer.judged(feed.guesses, right)
            for k in range(i, i + right + 1):
                if not math.isfinite(logprobs[k]):
                    self.poisoned(request)
                    break
                if request.best and best is None:
                    best = np.asarray(drawn.best_ids).tolist(), np.asarray(drawn.best).tolist()
                found = () if not request.best or best is None else tuple(zip(best[0][k][:request.best], best[1][k][:request.best]))
                self.schedule.drew(feed, tokens[k], k - i)
                self.clock(request, now)
                self.tell(request, tokens[k], logprobs[k], found)
                if feed.sequence.done:
                    break

    def clock(self, request: Request, now: float) -> None:
        """A token of it came."""
        if request.first is None:
            request.first = now
            self.observer.first_token(now - request.born)
        else:
            assert request.latest is not None
            self.observer.between_tokens(now - request.latest)
        request.latest = now

    def tell(self, request: Request, token: int, logprob: float, best: tuple) -> None:
        """Gives a token to its listener, and the end with it where it is the last."""
        sequence = request.sequence
        assert sequence is not None
        if token in request.end_tokens:
            self.finish(request, End("stop", request.text.flush() if request.text else "", stopped_at=token))
            return
        if request.matcher is not None:
            try:
                request.matcher.advance(token)
            except ConfigError as error:
                self.finish(request, End("error", message=str(error)))
                return
        text = request.text.push(token) if request.text else ""
        piece = Piece(text, token, logprob, best)
        if request.text and request.text.stopped:
            self.finish(request, End("stop", stopped_at=request.text.stopped_by), [piece])
        elif sequence.made >= sequence.limit:
            self.finish(request, End("length", request.text.flush() if request.text else ""), [piece])
        else:
            request.listen(request, [piece])

    def poisoned(self, request: Request) -> None:
        """Its logits are not finite: it ends, and nothing of it stays in the cache."""
        sequence = request.sequence
        assert sequence is not None
        mine = list(sequence.pages)
        self.finish(request, End("error", message="the model's answer is not finite (NaN or infinity) for this input"))
        alone = [page for page in mine if not self.pages.references[page]]          # a page that others read holds nothing of this sequence's alone
        for page in alone:
            self.pages.forget(page)
        wanted = np.full(-(-self.length // self.settings.page), -1, np.int32)
        wanted[:len(alone)] = alone
        self.memory = dc.replace(self.memory, cache=clean(self.memory.cache, wanted))
