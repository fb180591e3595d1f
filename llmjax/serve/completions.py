"""POST /v1/completions: plain continuations of texts or ids."""
from __future__ import annotations

import dataclasses as dc
import time
from collections.abc import AsyncIterator
from typing import Any

from llmjax.serve import answers
from llmjax.serve.answers import Choice, Question
from llmjax.serve.parsers import Said
from llmjax.serve.protocol import CompletionRequest
from llmjax.serve.replies import CompletionChoice, CompletionLogprobs, CompletionReply, Reply
from llmjax.serve.requests import End, Piece
from llmjax.serve.service import Service, fresh_id


@dc.dataclass(frozen=True)
class Echo:
    """A prompt that is given back, and what its tokens' log-probabilities are."""
    text: str = ""
    logprobs: CompletionLogprobs | None = None

    @property
    def width(self) -> int:
        """Characters before the answer."""
        return self.logprobs.text_offset[-1] + len(self.logprobs.tokens[-1]) if self.logprobs else len(self.text)


def given(body: CompletionRequest) -> list[Any]:
    """The prompts, each a text or ids."""
    return [body.prompt] if isinstance(body.prompt, str) or isinstance(body.prompt[0], int) else list(body.prompt)


async def question(service: Service, body: CompletionRequest, owner: str) -> Question:
    """The request as the engine's question. Raises ApiError."""
    adapter = service.check_model(body.model)
    prompts = [await answers.encode(service.tokenizer, p, special=True, room=service.room, where="prompt") if isinstance(p, str) else p for p in given(body)]
    for ids in prompts:
        answers.fits(ids, body.max_tokens, service.room, service.engine.model.config.vocab_size, "prompt", "max_tokens")
    stops, ends = answers.stops_of(body, service.engine)
    return Question(prompts, body.n, body.max_tokens, answers.knobs_of(body, service.engine.model.config.vocab_size), stops, ends, body.logprobs or 0, owner, body.priority, service.deadline(),
                    grammar=await answers.structure_of(service.engine, body, body.response_format), adapter=adapter,
                    topic=(body.prompt, str(body.max_tokens)) if isinstance(body.prompt, str) else None)


def logprobs(service: Service, pieces: list[Piece], offset: int, wanted: int) -> CompletionLogprobs:
    """offset: characters of the answer that came before."""
    tokens, places = [], []
    for p in pieces:
        assert p.token is not None
        tokens.append(answers.token_text(service.tokenizer, p.token)[0])
        places.append(offset)
        offset += len(tokens[-1])
    best: list[dict[str, float] | None] | None = [{answers.token_text(service.tokenizer, t)[0]: x for t, x in reversed(p.best)} for p in pieces] if wanted else None
    return CompletionLogprobs(tokens=tokens, token_logprobs=[min(0.0, p.logprob) for p in pieces], top_logprobs=best, text_offset=places)


async def echoes(service: Service, body: CompletionRequest, asked: Question) -> list[Echo]:
    """The prompts, where they are wanted back, with their log-probabilities (`decode.score`) where those are."""
    if not body.echo:
        return [Echo()] * len(asked.prompts)
    found = []
    for prompt, ids in zip(given(body), asked.prompts):
        told = None
        if body.logprobs is not None:
            scored = await service.scorer(ids, asked.adapter, body.logprobs)
            pieces = [Piece("", t, 0.0 if p is None else p, tuple(best or ())) for t, p, best in zip(ids, scored.logprobs, scored.alternatives or [None] * len(ids))]
            told = logprobs(service, pieces, 0, body.logprobs)
            told.token_logprobs[0] = None
            if told.top_logprobs is not None:                      # with the token that stands there, as OpenAI has it
                told.top_logprobs[:] = [None, *({token: p, **(best or {})} for token, p, best in zip(told.tokens[1:], told.token_logprobs[1:], told.top_logprobs[1:]) if p is not None)]
        found.append(Echo(prompt if isinstance(prompt, str) else service.tokenizer.decode(ids), told))
    return found


async def answered(service: Service, asked: Question) -> AsyncIterator[answers.Part]:
    """What the engine says, or, where no token is wanted, the end of each choice."""
    if asked.limit:
        parts = answers.answer(service.engine, asked)
        try:
            async for part in parts:
                yield part
        finally:
            await parts.aclose()                                   # type: ignore[attr-defined]
    else:
        for i in range(len(asked.prompts) * asked.n):
            yield answers.Part(i, Said(), end=End("length"))


def joined(first: CompletionLogprobs | None, second: CompletionLogprobs | None) -> CompletionLogprobs | None:
    """One after the other; the second's offsets go on from the first."""
    if first is None or second is None:
        return first or second
    top = None if first.top_logprobs is None and second.top_logprobs is None else [*(first.top_logprobs or ()), *(second.top_logprobs or ())]
    return CompletionLogprobs(tokens=first.tokens + second.tokens, token_logprobs=first.token_logprobs + second.token_logprobs, top_logprobs=top, text_offset=first.text_offset + second.text_offset)


async def reply(service: Service, body: CompletionRequest, asked: Question) -> CompletionReply:
    choices = await answers.whole(answered(service, asked), len(asked.prompts) * body.n)
    before = [e for e in await echoes(service, body, asked) for _ in range(body.n)]
    shown = [CompletionChoice(index=i, text=e.text + c.text, finish_reason=c.finish,
                              logprobs=None if body.logprobs is None else joined(e.logprobs, logprobs(service, c.pieces, e.width, body.logprobs)))
             for i, (c, e) in enumerate(zip(choices, before))]
    return CompletionReply(id=fresh_id("cmpl"), object="text_completion", created=int(time.time()), model=body.model, choices=shown,
                           usage=answers.usage(asked, sum(len(c.pieces) for c in choices), sum(c.cached for c in choices[::body.n])))


async def stream(service: Service, body: CompletionRequest, asked: Question) -> AsyncIterator[Reply]:
    """Chunks as the answers come. Closing it lets the engine forget the request."""
    base: dict[str, Any] = dict(id=fresh_id("cmpl"), object="text_completion", created=int(time.time()), model=body.model)
    kept = [Choice() for _ in range(len(asked.prompts) * body.n)]
    counts = body.stream_options is not None and body.stream_options.include_usage
    if counts:
        base["usage"] = None
    before = [e for e in await echoes(service, body, asked) for _ in range(body.n)]
    parts = answered(service, asked)
    made, offsets = 0, [e.width for e in before]
    try:
        if body.echo:
            for i, e in enumerate(before):
                yield CompletionReply(**base, choices=[CompletionChoice(index=i, text=e.text, logprobs=e.logprobs, finish_reason=None)])
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
