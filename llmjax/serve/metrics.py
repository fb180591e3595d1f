"""Figures for Prometheus: what the engine and the HTTP side count, in a registry of their own."""
from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from llmjax.serve.engine import Engine
from llmjax.serve.requests import Observer, Request
from llmjax.serve.schedule import Guesses, Work

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120)


class Metrics(Observer):
    """An Observer of the engine; `text()` is the page that Prometheus reads."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        known: dict[str, Any] = dict(registry=self.registry)
        self.requests = Counter("llmjax_http_requests_total", "requests by endpoint and status", ["endpoint", "status"], **known)
        self.seconds = Histogram("llmjax_http_request_seconds", "seconds from a request to the end of its answer", ["endpoint"], buckets=SECONDS, **known)
        self.first = Histogram("llmjax_time_to_first_token_seconds", "seconds from a request's arrival to its first token", buckets=SECONDS, **known)
        self.between = Histogram("llmjax_time_between_tokens_seconds", "seconds from a token of a sequence to the next", buckets=SECONDS, **known)
        self.queued = Histogram("llmjax_queue_seconds", "seconds a sequence waited for a row", buckets=SECONDS, **known)
        self.finished = Counter("llmjax_sequences_total", "sequences ended, by reason", ["reason"], **known)
        self.prompt = Counter("llmjax_prompt_tokens_total", "tokens of prompts admitted", **known)
        self.found = Counter("llmjax_prefix_hit_tokens_total", "tokens of prompts that stood in the cache already", **known)
        self.made = Counter("llmjax_generated_tokens_total", "tokens generated", **known)
        self.steps = Counter("llmjax_steps_total", "steps sent to the device", ["kind"], **known)
        self.batch = Histogram("llmjax_batch_rows", "rows in a decoding step", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256), **known)
        self.guessed = Counter("llmjax_guessed_tokens_total", "tokens fed before they were drawn, by where they came from and whether they came true", ["source", "result"], **known)
        self.stored = Counter("llmjax_response_store_total", "look-ups in the stores of whole answers", ["store", "result"], **known)

    def watch(self, engine: Engine) -> None:
        """Adds what is read off the engine when Prometheus asks."""
        def gauge(name: str, text: str, read: Any) -> None:
            Gauge(name, text, registry=self.registry).set_function(read)
        gauge("llmjax_sequences_running", "sequences that have a row", lambda: len(engine.schedule.running))
        gauge("llmjax_sequences_waiting", "sequences that wait for a row", lambda: max(0, engine.waiting - len(engine.schedule.running)))
        gauge("llmjax_cache_pages", "pages of the cache", lambda: engine.pages.count)
        gauge("llmjax_cache_pages_used", "pages that some sequence refers to", lambda: engine.pages.used)
        gauge("llmjax_preemptions", "sequences put back for want of pages since the start", lambda: engine.schedule.preemptions)
        gauge("llmjax_programs_missing", "faster forms of the step that are not compiled yet", lambda: len(engine.shapes) - len(engine.known))
        gauge("llmjax_stalled_seconds", "seconds since the engine last moved while there was something to do", lambda: engine.stalled)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    # Observer

    def admitted(self, request: Request, waited: float) -> None:
        self.queued.observe(waited)
        self.prompt.inc(len(request.prompt))
        if request.sequence is not None:
            self.found.inc(request.sequence.hit)

    def first_token(self, seconds: float) -> None:
        self.first.observe(seconds)
        self.made.inc()

    def between_tokens(self, seconds: float) -> None:
        self.between.observe(seconds)
        self.made.inc()

    def ended(self, request: Request, reason: str, seconds: float) -> None:
        self.finished.labels(reason).inc()

    def stepped(self, work: Work) -> None:
        self.steps.labels("decode" if work.decoding else "prefill").inc()
        if work.decoding:
            self.batch.observe(len(work.feeds))

    def judged(self, guesses: Guesses, right: int) -> None:
        forced = min(right, guesses.forced)
        for source, true, fed in (("grammar", forced, guesses.forced), ("ngram", right - forced, len(guesses.tokens) - guesses.forced)):
            self.guessed.labels(source, "right").inc(true)
            self.guessed.labels(source, "wrong").inc(fed - true)
