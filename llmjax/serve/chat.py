"""POST /v1/chat/completions."""
from __future__ import annotations

import dataclasses as dc
import time
from collections.abc import AsyncIterator
from typing import Any

from llmjax.serve import answers
from llmjax.serve.answers import Choice, Part, Question
from llmjax.serve.errors import bad
from llmjax.serve.parsers import Call
from llmjax.serve.protocol import ChatRequest
from llmjax.serve.replies import ChatChoice, ChatChunk, ChatDelta, ChatLogprobs, ChatMessage, ChatReply, ChunkChoice, FunctionReply, Reply, ToolCallDelta, ToolCallReply
from llmjax.serve.service import Service, content_text, fresh_id


async def question(service: Service, body: ChatRequest, owner: str) -> Question:
    """The request as the engine's question. Raises ApiError."""
    adapter = service.check_model(body.model)
    tools = None if body.tool_choice == "none" else body.tools
    variables = dict(body.chat_template_kwargs)
    if body.reasoning_effort is not None:
        if "reasoning_effort" not in str(service.tokenizer.chat_template):
            raise bad("reasoning_effort: this model's chat template does not know it", "reasoning_effort")
        variables["reasoning_effort"] = body.reasoning_effort
    text = service.conversation(body.messages, tools, **variables)
    prompt = await answers.encode(service.tokenizer, text, special=False, room=service.room, where="messages")
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    limit = answers.fits(prompt, wanted, service.room, service.engine.model.config.vocab_size, "messages", name)
    stops, ends = answers.stops_of(body, service.engine)
    service.listener(text, tools)                                  # refuses what it does not know before the answer begins
    keep = service.markers() if tools or service.speech.thinks else frozenset()
    grammar = await answers.structure_of(service.engine, body, body.response_format)
    if tools and body.tool_choice not in (None, "auto"):
        if grammar is not None:
            raise bad("tool_choice demands a call, and response_format or structured_outputs another answer; give one", "tool_choice")
        wanted_tools = [t for t in tools if body.tool_choice == "required" or t.function.name == body.tool_choice.function.name]      # type: ignore[union-attr]
        grammar = await answers.grammar_of(service.engine, "lark", service.demand(wanted_tools, body.parallel_tool_calls and body.tool_choice == "required"), "tools")
    knobs = answers.knobs_of(body, service.engine.model.config.vocab_size)
    return Question([prompt], body.n, limit, knobs, stops, ends, (body.top_logprobs or 0) if body.logprobs else 0, owner, body.priority, service.deadline(), keep,
                    lambda: service.listener(text, tools), grammar, adapter=adapter, topic=topic(service, body))


def topic(service: Service, body: ChatRequest) -> tuple[str, str] | None:
    """The last thing the user said, and all else that the answer depends on; None where something else was said last."""
    *before, last = body.messages
    if last.role != "user":
        return None
    around = body.model_dump_json(include={"tools", "tool_choice", "parallel_tool_calls", "chat_template_kwargs", "reasoning_effort", "max_tokens", "max_completion_tokens"})
    return content_text(last), "\n".join([*(m.model_dump_json() for m in before), last.name or "", around])


def call_reply(call: Call) -> ToolCallReply:
    return ToolCallReply(id=call.id, type="function", function=FunctionReply(name=call.name, arguments=call.arguments))


def message(choice: Choice) -> ChatMessage:
    more: dict[str, Any] = {}
    if choice.calls:
        more["tool_calls"] = [call_reply(c) for c in choice.calls]
    if choice.thought:
        more["reasoning_content"] = choice.thought
    return ChatMessage(role="assistant", content=choice.text if choice.text or not choice.calls else None, refusal=None, **more)


async def reply(service: Service, body: ChatRequest, asked: Question) -> ChatReply:
    choices = await answers.whole(answers.answer(service.engine, asked), body.n)
    shown = [ChatChoice(index=i, message=message(c), finish_reason=c.finish,
                        logprobs=ChatLogprobs(content=[answers.token_logprob(service.tokenizer, p) for p in c.pieces]) if body.logprobs else None) for i, c in enumerate(choices)]
    return ChatReply(id=fresh_id("chatcmpl"), object="chat.completion", created=int(time.time()), model=body.model, choices=shown,
                     usage=answers.usage(asked, sum(len(c.pieces) for c in choices), max(c.cached for c in choices)))


async def stream(service: Service, body: ChatRequest, asked: Question) -> AsyncIterator[Reply]:
    """Chunks as the answer comes. Closing it lets the engine forget the request."""
    base: dict[str, Any] = dict(id=fresh_id("chatcmpl"), object="chat.completion.chunk", created=int(time.time()), model=body.model)
    kept = [Choice() for _ in range(body.n)]
    counts = body.stream_options is not None and body.stream_options.include_usage
    if counts:
        base["usage"] = None
    made, begun, parts = 0, set(), answers.answer(service.engine, asked)
    try:
        async for part in parts:
            choice = kept[part.index]
            called = len(choice.calls)
            choice.add(dc.replace(part, pieces=()))
            made += len(part.pieces)
            for shown in chunk_choices(service, body, part, called, choice, part.index not in begun):
                yield ChatChunk(**base, choices=[shown])
            begun.add(part.index)
    finally:
        await parts.aclose()                                       # type: ignore[attr-defined]
    if counts:
        yield ChatChunk(**{**base, "usage": answers.usage(asked, made, max(c.cached for c in kept))}, choices=[])


def chunk_choices(service: Service, body: ChatRequest, part: Part, called: int, choice: Choice, first: bool) -> list[ChunkChoice]:
    """What to send for a part: who speaks, where it is the first; what was said; how it ended."""
    logprobs = ChatLogprobs(content=[answers.token_logprob(service.tokenizer, p) for p in part.pieces]) if body.logprobs and part.pieces else None
    delta: dict[str, Any] = {}
    if part.said.thought:
        delta["reasoning_content"] = part.said.thought
    if part.said.text:
        delta["content"] = part.said.text
    if part.said.calls:
        delta["tool_calls"] = [ToolCallDelta(index=called + k, **dict(call_reply(c))) for k, c in enumerate(part.said.calls)]
    found = []
    if first:
        found.append(ChunkChoice(index=part.index, delta=ChatDelta(role="assistant", content=""), logprobs=None, finish_reason=None))
    if delta or logprobs:
        found.append(ChunkChoice(index=part.index, delta=ChatDelta(**delta), logprobs=logprobs, finish_reason=None))
    if part.end is not None:
        found.append(ChunkChoice(index=part.index, delta=ChatDelta(), logprobs=None, finish_reason=choice.finish))
    return found
