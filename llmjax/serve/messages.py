"""POST /v1/messages: Anthropic's form of a conversation, for text and tools."""
from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from llmjax.serve import answers, chat
from llmjax.serve.answers import Choice, Question
from llmjax.serve.errors import ApiError, from_validation
from llmjax.serve.protocol import Body, ChatRequest, Count, Stop
from llmjax.serve.replies import Reply
from llmjax.serve.responses import Event
from llmjax.serve.service import Service, fresh_id

KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error"}


class TextBlock(Body):
    type: Literal["text"]
    text: str
    cache_control: dict[str, Any] | None = None


class ToolUse(Body):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    cache_control: dict[str, Any] | None = None


class ToolResult(Body):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None
    cache_control: dict[str, Any] | None = None


class Turn(Body):
    role: Literal["user", "assistant"]
    content: str | list[Annotated[TextBlock | ToolUse | ToolResult, Field(discriminator="type")]]


class ToolSpec(Body):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    cache_control: dict[str, Any] | None = None


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class MessagesRequest(Body):
    """POST /v1/messages (Anthropic)."""
    model: str
    messages: Annotated[list[Turn], Field(min_length=1)]
    max_tokens: Count
    system: str | list[TextBlock] | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    stop_sequences: Annotated[list[Stop], Field(max_length=16)] = []
    stream: bool = False
    tools: Annotated[list[ToolSpec], Field(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    metadata: dict[str, Any] | None = None


class Block(Reply):
    type: Literal["text", "tool_use", "thinking"]
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None


class MessagesUsage(Reply):
    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int


class MessagesReply(Reply):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Block]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: MessagesUsage


class Cause(Reply):
    type: str
    message: str


class MessagesProblem(Reply):
    type: Literal["error"]
    error: Cause


def form(error: ApiError) -> dict[str, Any]:
    """An error as Anthropic's clients read it."""
    return {"type": "error", "error": {"type": KINDS.get(error.status, "api_error"), "message": error.message}}


def text_of(content: str | list[TextBlock] | None) -> str:
    return content if isinstance(content, str) else "".join(b.text for b in content or ())


def as_chat(body: MessagesRequest) -> ChatRequest:
    """The same request as OpenAI's. Raises ApiError."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": text_of(body.system)}] if body.system else []
    for turn in body.messages:
        blocks = [TextBlock(type="text", text=turn.content)] if isinstance(turn.content, str) else turn.content
        for b in blocks:
            if isinstance(b, ToolResult):
                messages.append({"role": "tool", "tool_call_id": b.tool_use_id, "content": text_of(b.content)})
        said = "".join(b.text for b in blocks if isinstance(b, TextBlock))
        calls = [{"id": b.id, "type": "function", "function": {"name": b.name, "arguments": json.dumps(b.input)}} for b in blocks if isinstance(b, ToolUse)]
        if said or calls or not any(isinstance(b, ToolResult) for b in blocks):
            messages.append({"role": turn.role, "content": said, **({"tool_calls": calls} if calls else {})})
    fields: dict[str, Any] = dict(model=body.model, messages=messages, max_tokens=body.max_tokens, temperature=body.temperature, top_p=body.top_p or 1.0, top_k=body.top_k,
                                  stop=body.stop_sequences or None)
    if body.tools:
        fields["tools"] = [{"type": "function", "function": {"name": t.name, "parameters": t.input_schema, **({"description": t.description} if t.description else {})}} for t in body.tools]
    if body.tool_choice is not None:
        c = body.tool_choice
        fields["tool_choice"] = {"type": "function", "function": {"name": c.name or ""}} if c.type == "tool" else {"auto": "auto", "any": "required", "none": "none"}[c.type]
        fields["parallel_tool_calls"] = not c.disable_parallel_tool_use
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        raise from_validation(error.errors(include_url=False), {}) from None


async def question(service: Service, body: MessagesRequest, owner: str) -> Question:
    return await chat.question(service, as_chat(body), owner)


def ended(choice: Choice) -> tuple[Any, str | None]:
    """(stop_reason, stop_sequence)."""
    if choice.calls:
        return "tool_use", None
    at = choice.end.stopped_at if choice.end else None
    if isinstance(at, str):
        return "stop_sequence", at
    return ("max_tokens" if choice.finish == "length" else "end_turn"), None


def usage(asked: Question, choice: Choice) -> MessagesUsage:
    return MessagesUsage(input_tokens=sum(map(len, asked.prompts)) - choice.cached, output_tokens=len(choice.pieces), cache_read_input_tokens=choice.cached)


async def reply(service: Service, body: MessagesRequest, asked: Question) -> MessagesReply:
    choice = (await answers.whole(answers.answer(service.engine, asked), 1))[0]
    blocks = [Block(type="thinking", thinking=choice.thought, signature="")] if choice.thought else []
    blocks += [Block(type="text", text=choice.text)] if choice.text or not choice.calls else []
    blocks += [Block(type="tool_use", id=c.id, name=c.name, input=json.loads(c.arguments)) for c in choice.calls]
    reason, sequence = ended(choice)
    return MessagesReply(id=fresh_id("msg"), type="message", role="assistant", model=body.model, content=blocks, stop_reason=reason, stop_sequence=sequence, usage=usage(asked, choice))


async def stream(service: Service, body: MessagesRequest, asked: Question) -> AsyncIterator[Reply]:
    """Events, in Anthropic's order: message_start, content blocks with their deltas, message_delta, message_stop."""
    parts, choice = answers.answer(service.engine, asked), Choice()
    index, kind = -1, ""

    def event(name: str, **data: Any) -> Event:
        return Event(type=name, data={"type": name, **data})

    def opened(wanted: str, block: dict[str, Any]) -> list[Event]:
        nonlocal index, kind
        closed = [event("content_block_stop", index=index)] if kind else []
        index, kind = index + 1, wanted
        return [*closed, event("content_block_start", index=index, content_block=block)]
    start = MessagesReply(id=fresh_id("msg"), type="message", role="assistant", model=body.model, content=[], stop_reason=None, stop_sequence=None, usage=usage(asked, choice))
    try:
        yield event("message_start", message=start.model_dump(exclude_unset=True))
        async for part in parts:
            choice.add(part)
            for wanted, text, name in (("thinking", part.said.thought, "thinking"), ("text", part.said.text, "text")):
                if text:
                    for one in opened(wanted, {"type": wanted, name: ""}) if kind != wanted else []:
                        yield one
                    yield event("content_block_delta", index=index, delta={"type": f"{wanted}_delta", name: text})
            for call in part.said.calls:
                for one in opened(f"tool {call.id}", {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}):
                    yield one
                yield event("content_block_delta", index=index, delta={"type": "input_json_delta", "partial_json": call.arguments})
    finally:
        await parts.aclose()                                       # type: ignore[attr-defined]
    if kind:
        yield event("content_block_stop", index=index)
    reason, sequence = ended(choice)
    yield event("message_delta", delta={"stop_reason": reason, "stop_sequence": sequence}, usage=usage(asked, choice).model_dump())
    yield event("message_stop")


def error_event(error: ApiError) -> Event:
    return Event(type="error", data=form(error))
