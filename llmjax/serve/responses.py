"""POST /v1/responses: OpenAI's newer form, for text: input and instructions in, output items out, as events where streamed. Nothing is stored, so no earlier response can be named."""
from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from llmjax.serve import answers, chat
from llmjax.serve.answers import Choice, Question
from llmjax.serve.errors import ApiError, from_validation
from llmjax.serve.protocol import Body, ChatRequest, Count, Message
from llmjax.serve.replies import Reply
from llmjax.serve.service import Service, fresh_id


class InputMessage(Message):
    type: Literal["message"] = "message"
    id: str | None = None
    status: str | None = None


class FunctionOutput(Body):
    type: Literal["function_call_output"]
    call_id: str
    output: str
    id: str | None = None
    status: str | None = None


class FunctionCallItem(Body):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class FunctionTool(Body):
    type: Literal["function"]
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class PlainFormat(Body):
    type: Literal["text", "json_object"]


class SchemaForm(Body):
    type: Literal["json_schema"]
    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextOptions(Body):
    format: Annotated[PlainFormat | SchemaForm, Field(discriminator="type")] | None = None


class ResponsesRequest(Body):
    """POST /v1/responses, text only."""
    model: str
    input: str | Annotated[list[FunctionOutput | FunctionCallItem | InputMessage], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=10)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    stream: bool = False
    store: Literal[False] | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | None = None
    parallel_tool_calls: bool = True
    text: TextOptions | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None


class TextContent(Reply):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]


class OutputItem(Reply):
    type: Literal["message", "function_call", "reasoning"]
    id: str
    status: str
    role: Literal["assistant"] | None = None
    content: list[TextContent] | None = None
    summary: list[Any] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None


class ResponsesUsage(Reply):
    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class ResponsesReply(Reply):
    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete", "in_progress"]
    error: None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    temperature: float
    top_p: float
    tool_choice: str
    tools: list[dict[str, Any]]
    usage: ResponsesUsage | None
    metadata: dict[str, str]


class Event(Reply):
    """A streamed event; what it carries depends on its type."""
    type: str
    data: dict[str, Any]


def as_chat(body: ResponsesRequest) -> ChatRequest:
    """The same request as a conversation. Raises ApiError."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": body.instructions}] if body.instructions else []
    for item in [InputMessage(role="user", content=body.input)] if isinstance(body.input, str) else body.input:
        if isinstance(item, InputMessage):
            messages.append(item.model_dump(exclude_none=True, exclude={"type", "id", "status"}))
        elif isinstance(item, FunctionCallItem):
            messages.append({"role": "assistant", "tool_calls": [{"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": item.arguments}}]})
        else:
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": item.output})
    fields: dict[str, Any] = dict(model=body.model, messages=messages, temperature=body.temperature, top_p=body.top_p, parallel_tool_calls=body.parallel_tool_calls)
    if body.max_output_tokens is not None:
        fields["max_tokens"] = body.max_output_tokens
    if body.tools:
        fields |= {"tools": [{"type": "function", "function": t.model_dump(exclude_none=True, exclude={"type"})} for t in body.tools], "tool_choice": body.tool_choice}
    form = body.text.format if body.text else None
    if isinstance(form, SchemaForm):
        fields["response_format"] = {"type": "json_schema", "json_schema": {"name": form.name, "schema": form.schema_}}
    elif form is not None:
        fields["response_format"] = {"type": form.type}
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        raise from_validation(error.errors(include_url=False), {}) from None


async def question(service: Service, body: ResponsesRequest, owner: str) -> Question:
    return await chat.question(service, as_chat(body), owner)


def items(choice: Choice) -> list[OutputItem]:
    found = []
    if choice.text or not choice.calls:
        found.append(OutputItem(type="message", id=fresh_id("msg"), status="completed", role="assistant", content=[TextContent(type="output_text", text=choice.text, annotations=[])]))
    return found + [OutputItem(type="function_call", id=fresh_id("fc"), status="completed", call_id=c.id, name=c.name, arguments=c.arguments) for c in choice.calls]


def response(body: ResponsesRequest, number: str, status: Any, output: list[OutputItem], asked: Question | None = None, choice: Choice | None = None) -> ResponsesReply:
    usage = None
    if asked is not None and choice is not None:
        u = answers.usage(asked, len(choice.pieces), choice.cached)
        usage = ResponsesUsage(input_tokens=u.prompt_tokens, input_tokens_details={"cached_tokens": choice.cached}, output_tokens=u.completion_tokens,
                               output_tokens_details={"reasoning_tokens": 0}, total_tokens=u.total_tokens)
    return ResponsesReply(id=number, object="response", created_at=int(time.time()), status=status, error=None, incomplete_details={"reason": "max_output_tokens"} if status == "incomplete" else None,
                          instructions=body.instructions, model=body.model, output=output, parallel_tool_calls=body.parallel_tool_calls, temperature=body.temperature, top_p=body.top_p,
                          tool_choice=body.tool_choice or "auto", tools=[t.model_dump(exclude_none=True) for t in body.tools or ()], usage=usage, metadata=body.metadata or {})


async def reply(service: Service, body: ResponsesRequest, asked: Question) -> ResponsesReply:
    choice = (await answers.whole(answers.answer(service.engine, asked), 1))[0]
    return response(body, fresh_id("resp"), "incomplete" if choice.finish == "length" else "completed", items(choice), asked, choice)


async def stream(service: Service, body: ResponsesRequest, asked: Question) -> AsyncIterator[Reply]:
    """Events, in OpenAI's order: created, item and part added, deltas, done, completed."""
    number, parts, choice = fresh_id("resp"), answers.answer(service.engine, asked), Choice()
    text, count = "", 0
    item = OutputItem(type="message", id=fresh_id("msg"), status="in_progress", role="assistant", content=[])

    def event(kind: str, **data: Any) -> Event:
        nonlocal count
        count += 1
        return Event(type=f"response.{kind}", data={"type": f"response.{kind}", "sequence_number": count - 1, **data})
    place: dict[str, Any] = dict(item_id=item.id, output_index=0, content_index=0)
    try:
        yield event("created", response=response(body, number, "in_progress", []).model_dump(exclude_unset=True))
        async for part in parts:
            choice.add(part)
            if part.said.text and not text:
                yield event("output_item.added", output_index=0, item=item.model_dump(exclude_unset=True))
                yield event("content_part.added", **place, part={"type": "output_text", "text": "", "annotations": []})
            if part.said.text:
                text += part.said.text
                yield event("output_text.delta", **place, delta=part.said.text, logprobs=[])
    finally:
        await parts.aclose()                                       # type: ignore[attr-defined]
    output = items(choice)
    if text:
        output[0].id = item.id
        yield event("output_text.done", **place, text=text, logprobs=[])
        yield event("content_part.done", **place, part={"type": "output_text", "text": text, "annotations": []})
        yield event("output_item.done", output_index=0, item=output[0].model_dump(exclude_unset=True))
    for i, one in enumerate(output):
        if one.type == "function_call":
            shown = one.model_dump(exclude_unset=True)
            yield event("output_item.added", output_index=i, item={**shown, "arguments": "", "status": "in_progress"})
            yield event("function_call_arguments.delta", item_id=one.id, output_index=i, delta=one.arguments)
            yield event("function_call_arguments.done", item_id=one.id, output_index=i, arguments=one.arguments, name=one.name)
            yield event("output_item.done", output_index=i, item=shown)
    status = "incomplete" if choice.finish == "length" else "completed"
    yield event(status, response=response(body, number, status, output, asked, choice).model_dump(exclude_unset=True))


def error_event(error: ApiError) -> Event:
    return Event(type="error", data={"type": "error", "code": error.code or error.body["error"]["type"], "message": error.message, "param": error.param})
