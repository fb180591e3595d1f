"""Around every request, whatever it asks: who asks (API keys), how often and how many at a time, where browsers may ask from (CORS), a line in the log, a count in the metrics.

The log names owners, never keys, and holds no prompt and no answer.
"""
from __future__ import annotations

import collections
import dataclasses as dc
import hashlib
import hmac
import json
import logging
import math
import pathlib
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from llmjax.core.errors import ConfigError
from llmjax.serve.errors import ApiError
from llmjax.serve.metrics import Metrics

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
log = logging.getLogger("llmjax.serve")
OPEN = frozenset({"/", "/health", "/ready", "/metrics", "/openapi.json"})


class Keys:
    """API keys by owner. Kept as digests, compared in constant time, all of them whatever matches."""

    def __init__(self, keys: Sequence[tuple[str, str]]):
        """keys: (owner, key). Raises ConfigError for an empty or doubled key."""
        self.digests = [(owner, self.digest(key)) for owner, key in keys]
        if any(not key.strip() for _, key in keys):
            raise ConfigError("an API key is empty")
        if len({d for _, d in self.digests}) < len(keys):
            raise ConfigError("an API key is given twice")

    @staticmethod
    def digest(key: str) -> bytes:
        return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()

    @classmethod
    def read(cls, given: Sequence[str], file: str | pathlib.Path | None) -> Keys:
        """Keys as given, and those of a file: a line each, "owner:key" or a key. Raises ConfigError."""
        keys = [(f"key-{i}", key) for i, key in enumerate(given)]
        if file is not None:
            try:
                lines = pathlib.Path(file).expanduser().read_text().splitlines()
            except OSError as error:
                raise ConfigError(f"{file}: the file of API keys cannot be read ({error.strerror})") from None
            for i, line in enumerate(x.strip() for x in lines):
                if line and not line.startswith("#"):
                    owner, found, key = line.partition(":")
                    keys.append((owner.strip(), key.strip()) if found else (f"line-{i + 1}", line))
            if not keys:
                raise ConfigError(f"{file}: there is no API key in it")
        return cls(keys)

    def owner(self, key: str) -> str | None:
        digest, found = self.digest(key), None
        for owner, known in self.digests:
            if hmac.compare_digest(digest, known):
                found = owner
        return found


class Rates:
    """A bucket of tokens per owner (requests: `count` per `seconds`, all of which may come at once), and how many of an owner's requests run together. None: unlimited."""

    def __init__(self, rate: tuple[int, float] | None = None, together: int | None = None):
        self.rate, self.together = rate, together
        self.levels: dict[str, tuple[float, float]] = {}
        self.running: collections.Counter[str] = collections.Counter()

    @staticmethod
    def parse(text: str) -> tuple[int, float]:
        """"600/min" -> (600, 60.0). Raises ConfigError."""
        match = re.fullmatch(r"(\d+)\s*/\s*(s|sec|second|m|min|minute|h|hour)", text.strip())
        if match is None or not int(match[1]):
            raise ConfigError(f"--rate={text}: requests per time are wanted, as 600/min")
        return int(match[1]), {"s": 1.0, "m": 60.0, "h": 3600.0}[match[2][0]]

    def enter(self, owner: str) -> None:
        """Raises ApiError (429) beyond a limit."""
        if self.together is not None and self.running[owner] >= self.together:
            raise ApiError(429, f"{self.together} requests of this key are running already; wait for one to end", code="concurrency_limit", retry_after=1)
        if self.rate is not None:
            count, seconds = self.rate
            now = time.monotonic()
            level, since = self.levels.get(owner, (float(count), now))
            level = min(float(count), level + (now - since) * count / seconds)
            if level < 1:
                self.levels[owner] = level, now
                raise ApiError(429, f"more than {count} requests in {seconds:g} seconds", code="rate_limit_exceeded", retry_after=math.ceil((1 - level) * seconds / count))
            self.levels[owner] = level - 1, now
            if len(self.levels) > 65536:                       # owners are addresses where there are no keys
                self.levels = {k: v for k, v in self.levels.items() if now - v[1] < seconds}
        self.running[owner] += 1

    def leave(self, owner: str) -> None:
        self.running[owner] -= 1
        if not self.running[owner]:
            del self.running[owner]


@dc.dataclass
class Guard:
    """An ASGI application around another. paths: those with names of their own in the metrics. origins: where browsers may ask from ("*": anywhere)."""
    inner: Callable[[Scope, Receive, Send], Awaitable[None]]
    keys: Keys | None
    rates: Rates
    metrics: Metrics
    paths: frozenset[str]
    origins: tuple[str, ...] = ()
    form: Callable[[str, ApiError], dict[str, Any]] = lambda path, error: error.body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.inner(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": 1003})
            return
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        began, path, status = time.monotonic(), scope["path"], 0
        number = secrets.token_hex(8)
        told: dict[str, Any] = scope.setdefault("llmjax", {})
        extra = [(b"x-request-id", number.encode()), *self.allowed(headers)]

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            await send(message)
        owner, entered = None, False
        try:
            if scope["method"] == "OPTIONS" and "origin" in headers and "access-control-request-method" in headers:
                await answer(sending, 204, b"", [(b"access-control-allow-methods", b"GET, POST"), (b"access-control-max-age", b"600"),
                                                 (b"access-control-allow-headers", headers.get("access-control-request-headers", "*").encode("latin-1"))])
                return
            owner = told["owner"] = self.identify(scope, headers)
            if path not in OPEN:
                self.rates.enter(owner)
                entered = True
            await self.inner(scope, receive, sending)
        except ApiError as error:
            if not status:
                await answer_error(sending, error, self.form(path, error))
        except Exception:
            log.exception("an error in the server")
            if not status:
                wrong = ApiError(500, "an error in the server")
                await answer_error(sending, wrong, self.form(path, wrong))
        finally:
            if entered and owner is not None:
                self.rates.leave(owner)
            name = path if path in self.paths else "other"
            seconds = time.monotonic() - began
            self.metrics.requests.labels(name, str(status or 499)).inc()
            self.metrics.seconds.labels(name).observe(seconds)
            if path not in ("/health", "/ready", "/metrics"):
                log.info("request", extra={"fields": {"id": number, "method": scope["method"], "path": path[:100], "status": status or 499, "ms": round(1000 * seconds, 1), **told}})

    def identify(self, scope: Scope, headers: dict[str, str]) -> str:
        """Whose request it is. Raises ApiError (401)."""
        if self.keys is None or scope["path"] in OPEN:
            return (scope.get("client") or ("local",))[0]
        kind, _, key = headers.get("authorization", "").partition(" ")
        key = key.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
        if not key:
            raise ApiError(401, "an API key is wanted, in the header Authorization: Bearer …", code="missing_api_key")
        owner = self.keys.owner(key)
        if owner is None:
            raise ApiError(401, "this API key is not known", code="invalid_api_key")
        return owner

    def allowed(self, headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
        origin = headers.get("origin")
        if origin is None or not self.origins or not ("*" in self.origins or origin in self.origins):
            return []
        return [(b"access-control-allow-origin", b"*" if "*" in self.origins else origin.encode("latin-1")),
                (b"access-control-expose-headers", b"x-request-id, retry-after, x-llmjax-cache"), (b"vary", b"origin")]


async def answer(send: Send, status: int, body: bytes, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [*headers, *([] if status == 204 else [(b"content-length", str(len(body)).encode())])]})
    await send({"type": "http.response.body", "body": body})


async def answer_error(send: Send, error: ApiError, body: dict[str, Any]) -> None:
    headers = [(k.encode(), v.encode()) for k, v in error.headers.items()]
    await answer(send, error.status, json.dumps(body).encode(), [(b"content-type", b"application/json"), *headers])


class JsonLines(logging.Formatter):
    """A record as a line of JSON: time, level, event, and the fields it came with."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z", "level": record.levelname.lower(), "event": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)
