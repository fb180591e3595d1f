"""The HTTP application: which path does what, bodies in, replies and streams out. What an endpoint means stands in its own file; who may ask, in guard.py."""
from __future__ import annotations

import asyncio
import contextlib
import dataclasses as dc
import importlib.resources
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import pydantic
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from llmjax.core.errors import DataError
from llmjax.serve import answers, chat, completions, messages, protocol, replies, responses, vectors
from llmjax.serve.errors import ApiError, bad, from_validation
from llmjax.serve.guard import Guard, Keys, Rates, Receive, Scope, Send
from llmjax.serve.service import Service

STREAMED = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))
PING = 15.0                          # seconds of silence after which a stream says that it is alive


class ClientGone(Exception):
    """The client went away before its request was whole."""


async def read_body(receive: Receive, headers: Any, limit: int, seconds: float) -> bytes:
    """The whole body. Raises ApiError where it is too large (what comes is read on for a while, so that the client gets to read the answer) or too slow."""
    length = headers.get("content-length", "0")
    large, parts, size = length.isdigit() and int(length) > limit, [], 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                size += len(message.get("body", b""))
                large = large or size > limit
                if not large:
                    parts.append(message.get("body", b""))
                if not message.get("more_body") or size > 8 * limit:
                    break
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {seconds:g} seconds") from None
    if large:
        raise ApiError(413, f"the body has more than {limit:,} bytes", code="body_too_large")
    return b"".join(parts)


def parse(model: type[pydantic.BaseModel], body: bytes) -> Any:
    """The body as this model. Raises ApiError naming the field."""
    try:
        return model.model_validate_json(body)
    except pydantic.ValidationError as error:
        raise from_validation(error.errors(include_url=False), {f.alias or name: f for name, f in model.model_fields.items()}) from None


@contextlib.asynccontextmanager
async def while_connected(receive: Receive) -> AsyncIterator[None]:
    """What runs inside is cancelled when the client goes away, and then this ends quietly."""
    task, gone = asyncio.current_task(), False
    assert task is not None

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()
    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if not gone:
            raise
        task.uncancel()
    finally:
        watcher.cancel()


async def send_stream(send: Send, parts: AsyncIterator[bytes], patience: float, form: Callable[[ApiError], bytes], headers: Mapping[str, str]) -> None:
    """Server-sent events. Nothing is sent before the first is there, so that an error before it has its own status; one that comes later is an event. Raises TimeoutError for a reader
    that takes nothing for `patience` seconds."""
    task, spoke, sending, stuck = asyncio.current_task(), time.monotonic(), False, False
    assert task is not None

    async def say(data: bytes, more: bool = True) -> None:
        nonlocal spoke, sending
        spoke, sending = time.monotonic(), True
        await send({"type": "http.response.body", "body": data, "more_body": more})
        sending = False

    async def watch() -> None:
        """Looks now and then, which costs less than a timer for every part: whether the reader holds us up, and whether it has heard nothing for long."""
        nonlocal stuck
        while not stuck:
            await asyncio.sleep(min(PING / 3, patience / 4))
            silent = time.monotonic() - spoke
            if sending:
                stuck = silent > patience
            elif silent > PING:
                try:
                    await asyncio.wait_for(say(b": still here\n\n"), patience)
                except TimeoutError:
                    stuck = True
        task.cancel()
    first = await anext(parts, None)                               # type: ignore[arg-type]
    more = [(k.encode(), v.encode()) for k, v in headers.items()]             # as they are once the first part is there
    await send({"type": "http.response.start", "status": 200, "headers": [*more, *STREAMED]})
    watcher = asyncio.create_task(watch())
    try:
        try:
            if first is not None:
                await say(first)
            async for part in parts:
                await say(part)
        except ApiError as error:
            await say(form(error))
        await say(b"", more=False)
    except asyncio.CancelledError:
        if not stuck:
            raise
        task.uncancel()
        raise TimeoutError from None
    finally:
        watcher.cancel()


async def events(found: AsyncIterator[replies.Reply]) -> AsyncIterator[bytes]:
    """Replies as OpenAI streams them."""
    try:
        async for one in found:
            yield b"data: " + one.json_bytes() + b"\n\n"
        yield b"data: [DONE]\n\n"
    finally:
        await found.aclose()                                       # type: ignore[attr-defined]


async def named_events(found: AsyncIterator[replies.Reply]) -> AsyncIterator[bytes]:
    """Events with names, as the newer forms stream them."""
    try:
        async for one in found:
            yield named_event(one)
    finally:
        await found.aclose()                                       # type: ignore[attr-defined]


def named_event(one: Any) -> bytes:
    return f"event: {one.type}\ndata: ".encode() + json.dumps(one.data, ensure_ascii=False).encode() + b"\n\n"


def plain_error(error: ApiError) -> bytes:
    return b"data: " + json.dumps(error.body).encode() + b"\n\n"


@dc.dataclass(frozen=True)
class Endpoint:
    """A path that takes a body. act: what it does, giving a reply, or what to stream; error: how a stream tells of an error; form, problem: how a reply that is an error
    looks, and its model."""
    path: str
    body: type[pydantic.BaseModel]
    reply: type[replies.Reply]
    act: Callable[[Service, Any, str], Awaitable[replies.Reply | AsyncIterator[bytes]]]
    streams: bool = False
    error: Callable[[ApiError], bytes] = plain_error
    form: Callable[[ApiError], dict[str, Any]] = lambda error: error.body
    problem: type[replies.Reply] = replies.ErrorReply


def talking(module: Any, events: Callable[[AsyncIterator[replies.Reply]], AsyncIterator[bytes]]) -> Callable[[Service, Any, str], Awaitable[replies.Reply | AsyncIterator[bytes]]]:
    """What an endpoint that makes text does, out of its file's question, reply and stream."""
    async def act(service: Service, body: Any, owner: str) -> replies.Reply | AsyncIterator[bytes]:
        asked = await module.question(service, body, owner)
        if asked.knobs.temperature == 0 or getattr(body, "seed", None) is not None:         # else another answer is wanted each time
            asked = dc.replace(asked, store=service.store, semantic=service.semantic)
        return events(module.stream(service, body, asked)) if body.stream else await module.reply(service, body, asked)
    return act


async def on_embeddings(service: Service, body: protocol.EmbeddingRequest, owner: str) -> replies.Reply:
    if service.check_model(body.model) is not None:
        raise bad(f"model={body.model!r}: embeddings are those of {service.name!r} alone, without adapters", "model")
    if service.embedder is None:
        raise bad("this server makes no embeddings", "model")
    return await vectors.reply(service.embedder, body)


async def on_tokenize(service: Service, body: protocol.TokenizeRequest, owner: str) -> replies.Reply:
    service.check_model(body.model)
    if body.messages is not None:
        text, special = service.conversation(body.messages, body.tools, body.add_generation_prompt), False
    else:
        text, special = body.prompt or "", body.add_special_tokens
    ids = await answers.encode(service.tokenizer, text, special=special, room=2**20, where="prompt")
    more: dict[str, Any] = {"token_strs": [answers.token_text(service.tokenizer, i)[0] for i in ids]} if body.return_token_strs else {}
    return replies.TokenizeReply(tokens=ids, count=len(ids), max_model_len=service.room, **more)


async def on_detokenize(service: Service, body: protocol.DetokenizeRequest, owner: str) -> replies.Reply:
    service.check_model(body.model)
    try:
        return replies.DetokenizeReply(prompt=service.tokenizer.decode(body.tokens))
    except DataError as error:
        raise bad(str(error), "tokens") from None


ENDPOINTS = (Endpoint("/v1/chat/completions", protocol.ChatRequest, replies.ChatReply, talking(chat, events), True),
             Endpoint("/v1/completions", protocol.CompletionRequest, replies.CompletionReply, talking(completions, events), True),
             Endpoint("/v1/responses", responses.ResponsesRequest, responses.ResponsesReply, talking(responses, named_events), True, lambda e: named_event(responses.error_event(e))),
             Endpoint("/v1/messages", messages.MessagesRequest, messages.MessagesReply, talking(messages, named_events), True, lambda e: named_event(messages.error_event(e)), messages.form,
                      messages.MessagesProblem),
             Endpoint("/v1/embeddings", protocol.EmbeddingRequest, replies.EmbeddingReply, on_embeddings),
             Endpoint("/tokenize", protocol.TokenizeRequest, replies.TokenizeReply, on_tokenize),
             Endpoint("/detokenize", protocol.DetokenizeRequest, replies.DetokenizeReply, on_detokenize))


class Handler:
    """An Endpoint as an ASGI application."""

    def __init__(self, service: Service, endpoint: Endpoint):
        self.service, self.endpoint = service, endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        limits, request, began = self.service.limits, Request(scope), False
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, f"content-type: {kind[:60]}: application/json is wanted")
        try:
            raw = await read_body(receive, request.headers, limits.body, limits.body_seconds)
        except ClientGone:
            return
        body = parse(self.endpoint.body, raw)

        async def sending(message: Any) -> None:
            nonlocal began
            began = True
            await send(message)
        found: dict[str, str] = {}
        answers.FOUND.set(found)
        async with while_connected(receive):
            made = await self.endpoint.act(self.service, body, scope["llmjax"]["owner"])
            if isinstance(made, replies.Reply):
                if getattr(made, "usage", None):
                    scope["llmjax"]["tokens"] = made.usage.model_dump(include={"prompt_tokens", "completion_tokens", "input_tokens", "output_tokens"})      # type: ignore[attr-defined]
                await Response(made.json_bytes(), headers=found, media_type="application/json")(scope, receive, sending)
                return
            try:
                await send_stream(sending, made, limits.patience, self.endpoint.error, found)
            except TimeoutError:
                scope["llmjax"]["end"] = "the reader took nothing"
            finally:
                await made.aclose()                                                       # type: ignore[attr-defined]


def form(path: str, error: ApiError) -> dict[str, Any]:
    """An error in the form that this path's clients read."""
    return next((e.form(error) for e in ENDPOINTS if e.path == path), error.body)


def make_app(service: Service, *, keys: Keys | None = None, rates: Rates | None = None, origins: tuple[str, ...] = ()) -> Guard:
    """The whole application, as ASGI. Starting it starts the engine."""
    policy = {"content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
                                         "frame-ancestors 'none'", "referrer-policy": "no-referrer", "x-content-type-options": "nosniff"}
    page = importlib.resources.files("llmjax.serve").joinpath("page.html").read_bytes()

    async def index(_: Request) -> Response:
        return HTMLResponse(page, headers=policy)

    async def health(_: Request) -> Response:
        """Whether the process is worth keeping."""
        stalled = service.engine.stalled
        if not service.engine.alive or stalled > service.stall:
            return JSONResponse({"status": "failed", "detail": {"failure": service.engine.failure, "stalled_seconds": round(stalled, 1)}}, 503)
        return JSONResponse({"status": "ok"})

    async def ready(_: Request) -> Response:
        """Whether requests should be sent here."""
        status = "draining" if service.draining else "ok" if service.engine.ready else "starting"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    async def metrics(_: Request) -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def card(name: str) -> replies.ModelReply:
        return replies.ModelReply(id=name, object="model", created=service.created, owned_by="llmjax", max_model_len=service.room, parent=service.name if name in service.adapters else None)

    async def models(_: Request) -> Response:
        return Response(replies.ModelList(object="list", data=[card(n) for n in (service.name, *service.aliases, *service.adapters)]).json_bytes(), media_type="application/json")

    async def model(request: Request) -> Response:
        service.check_model(request.path_params["name"])
        return Response(card(request.path_params["name"]).json_bytes(), media_type="application/json")

    async def document(_: Request) -> Response:
        from llmjax.serve.openapi import describe
        return JSONResponse(describe(ENDPOINTS))

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = {404: f"there is no path {request.url.path[:100]}", 405: f"{request.method} is not what this path takes"}.get(error.status_code, error.detail)
        found = ApiError(error.status_code, message)
        return JSONResponse(form(request.url.path, found), error.status_code, headers=error.headers)

    async def on_api(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return JSONResponse(form(request.url.path, error), error.status, headers=error.headers)

    async def on_surprise(request: Request, _: Exception) -> Response:
        return await on_api(request, ApiError(500, "an error in the server"))

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        service.engine.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.engine.stop)
    gets = {"/": index, "/health": health, "/ready": ready, "/metrics": metrics, "/v1/models": models, "/v1/models/{name:path}": model, "/openapi.json": document}
    routes = [Route(path, function, methods=["GET"]) for path, function in gets.items()] + [Route(e.path, Handler(service, e), methods=["POST"]) for e in ENDPOINTS]
    inner = Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: on_http, ApiError: on_api, Exception: on_surprise})
    paths = frozenset({*gets, *(e.path for e in ENDPOINTS)})

    service.metrics.watch(service.engine)
    return Guard(inner, keys, rates or Rates(), service.metrics, paths, origins, form)
