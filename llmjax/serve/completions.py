"""POST /v1/completions: plain continuations of texts or ids."""
from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from llmjax.serve import answers
from llmjax.serve.answers import Choice, Question
from llmjax.serve.protocol import CompletionRequest
from llmjax.serve.replies import CompletionChoice, CompletionLogprobs, CompletionReply, Reply
from llmjax.serve.requests import Piece
from llmjax.serve.service import Service, fresh_id


async def question(service: Service, body: CompletionRequest, owner: str) -> Question:
    """The request as the engine's question. Raises ApiError."""
    adapter = service.check_model(body.model)
    given: list[Any] = [body.prompt] if isinstance(body.prompt, str) or isinstance(body.prompt[0], int) else list(body.prompt)
    prompts = [await answers.encode(service.tokenizer, p, special=True, room=service.room, where="prompt") if isinstance(p, str) else p for p in given]
    for ids in prompts:
        answers.fits(ids, body.max_tokens, service.room, service.engine.model.config.vocab_size, "prompt", "max_tokens")
    stops, ends = answers.stops_of(body, service.engine)
    return Question(prompts, body.n, body.max_tokens, answers.knobs_of(body, service.engine.model.config.vocab_size), stops, ends, body.logprobs or 0, owner, body.priority, service.deadline(),
                    grammar=await answers.structure_of(service.engine, body, body.response_format), adapter=adapter)


def logprobs(service: Service, pieces: list[Piece], offset: int, wanted: int) -> CompletionLogprobs:
    """offset: characters of the answer that came before."""
    tokens, places = [], []
    for p in pieces:
        assert p.token is not None
        tokens.append(answers.token_text(service.tokenizer, p.token)[0])
        places.append(offset)
        offset += len(tokens[-1])
    best = [{answers.token_text(service.tokenizer, t)[0]: x for t, x in reversed(p.best)} for p in pieces] if wanted else None
    return CompletionLogprobs(tokens=tokens, token_logprobs=[min(0.0, p.logprob) for p in pieces], top_logprobs=best, text_offset=places)


async def reply(service: Service, body: CompletionRequest, asked: Question) -> CompletionReply:
    choices = await answers.whole(answers.answer(service.engine, asked), len(asked.prompts) * body.n)
    shown = [CompletionChoice(index=i, text=c.text, finish_reason=c.finish, logprobs=None if body.logprobs is None else logprobs(service, c.pieces, 0, body.logprobs))
             for i, c in enumerate(choices)]
    return CompletionReply(id=fresh_id("cmpl"), object="text_completion", created=int(time.time()), model=body.model, choices=shown,
                           usage=answers.usage(asked, sum(len(c.pieces) for c in choices), sum(c.cached for c in choices[::body.n])))


async def stream(service: Service, body: CompletionRequest, asked: Question) -> AsyncIterator[Reply]:
    """Chunks as the answers come. Closing it lets the engine forget the request."""
    base: dict[str, Any] = dict(id=fresh_id("cmpl"), object="text_completion", created=int(time.time()), model=body.model)
    kept = [Choice() for _ in range(len(asked.prompts) * body.n)]
    counts = body.stream_options is not None and body.stream_options.include_usage
    if counts:
        base["usage"] = None
    parts = answers.answer(service.engine, asked)
    made, offsets = 0, [0] * len(kept)
    try:
        async for part in parts:
            kept[part.index].add(part)
            made += len(part.pieces)
            found = None
            if body.logprobs is not None and part.pieces:
                found = logprobs(service, list(part.pieces), offsets[part.index], body.logprobs)
                offsets[part.index] = found.text_offset[-1] + len(found.tokens[-1])
            if part.said.text or found or part.end:
                finish = kept[part.index].finish if part.end else None
                yield CompletionReply(**base, choices=[CompletionChoice(index=part.index, text=part.said.text, logprobs=found, finish_reason=finish)])
    finally:
        await parts.aclose()                                       # type: ignore[attr-defined]
    if counts:
        yield CompletionReply(**{**base, "usage": answers.usage(asked, made, sum(c.cached for c in kept[::body.n]))}, choices=[])
