"""POST /v1/embeddings: texts as vectors, by the served model or by another one that was given for it."""
from __future__ import annotations

import asyncio
import base64
import dataclasses as dc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from llmjax import decode
from llmjax.core.errors import ConfigError, DataError
from llmjax.serve import answers
from llmjax.serve.errors import bad
from llmjax.serve.protocol import EmbeddingRequest
from llmjax.serve.replies import EmbeddingItem, EmbeddingReply, EmbeddingUsage


@dc.dataclass
class Embedder:
    """A model that makes vectors, in a thread of its own, so that nobody's words wait for them."""
    model: Any
    params: Any
    tokenizer: Any
    context: int
    thread: ThreadPoolExecutor = dc.field(default_factory=lambda: ThreadPoolExecutor(1, "embed"))

    async def __call__(self, texts: list[list[int]]) -> np.ndarray:
        """Ids of texts -> [len(texts), D] float32 of length 1. Raises ConfigError."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.thread, lambda: decode.embed(self.model, self.params, None, texts, batch_size=8))


async def reply(embedder: Embedder, body: EmbeddingRequest) -> EmbeddingReply:
    """Raises ApiError for an empty text, one that is too long, and foreign ids."""
    given: list[Any] = [body.input] if isinstance(body.input, str) or isinstance(body.input[0], int) else list(body.input)
    rows = []
    for i, text in enumerate(given):
        where = f"input.{i}" if len(given) > 1 else "input"
        rows.append(await answers.encode(embedder.tokenizer, text, special=True, room=embedder.context, where=where) if isinstance(text, str) else text)
        if len(rows[-1]) > embedder.context:
            raise bad(f"{where}: {len(rows[-1]):,} tokens, there is room for {embedder.context:,}; shorten it", where, "context_length_exceeded")
    try:
        found = await embedder(rows)
    except (ConfigError, DataError) as error:
        raise bad(str(error).replace("text ", "input.", 1), "input") from None
    if not np.isfinite(found).all():
        raise bad("input: the model's answer is not finite (NaN or infinity) for this input", "input")
    count = sum(map(len, rows))
    data = [EmbeddingItem(object="embedding", index=i, embedding=base64.b64encode(v.astype("<f4").tobytes()).decode() if body.encoding_format == "base64" else v.tolist())
            for i, v in enumerate(found)]
    return EmbeddingReply(object="list", data=data, model=body.model, usage=EmbeddingUsage(prompt_tokens=count, total_tokens=count))
