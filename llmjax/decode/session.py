"""A conversation whose history stays in the cache: a further turn costs its own tokens, not the whole conversation's."""
from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.core import ConfigError
from llmjax.decode.generate import sampling_of, token_stream
from llmjax.decode.prepare import prepare
from llmjax.decode.prompts import bucket
from llmjax.decode.sampling import row_keys, start_history
from llmjax.decode.steps import begin, can_rewind, grow, init_cache, prefill, rewind
from llmjax.decode.stops import make_stops, pieces
from llmjax.models import Decoder

Message = dict[str, str]
FIRST = 512                            # slots a conversation starts with; doubled as it grows


class Session:
    """One conversation with a model. `messages` is what was said; `ids` are the tokens the cache holds; `fed` counts tokens computed for prompts so far."""

    def __init__(self, model: Decoder, params: Any, tokenizer: Any, *, length: int | None = None, system: str | None = None):
        """length: how long the conversation may get (the model's context unless given); the cache grows as it does. Raises ConfigError without a chat template."""
        if tokenizer is None or not tokenizer.chat_template:
            raise ConfigError("this model has no chat template: use `generate` with a plain prompt, or a tokenizer with a template")
        self.model, self.params = prepare(model, params)
        self.tokenizer = tokenizer
        self.length = min(length or model.config.context, model.config.context)
        self.cache = init_cache(self.model, 1, min(FIRST, self.length))
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.ids: list[int] = []
        self.fed = 0

    def reset(self) -> None:
        """Forgets the conversation but for a system message."""
        self.messages = [m for m in self.messages[:1] if m["role"] == "system"]
        self.ids, self.cache = [], init_cache(self.model, 1, min(FIRST, self.length))

    def say(self, text: str, *, max_new_tokens: int = 512, stop: str | Sequence[str | int] | None = None, seed: int = 0, **knobs: Any) -> Iterator[str]:
        """The user's turn -> the answer in pieces as it comes. Both join the history when the answer ends (an answer that is abandoned stays as far as it came).
        Raises ConfigError where the conversation no longer fits the cache."""
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True))
        if len(ids) >= self.length:
            raise ConfigError(f"the conversation has {len(ids)} tokens, there is room for {self.length}: start a new one (/reset), or give more length")
        limit = min(max_new_tokens, self.length - len(ids))
        logits = self.feed(ids, len(ids) + limit)
        stops = dc.replace(make_stops(stop, self.tokenizer, self.model.config), least=knobs.get("min_tokens") or 0)
        sampling = sampling_of(1, stops, self.tokenizer, self.model.config, knobs)
        history = start_history(sampling, self.model.config.vocab_size, [ids], length=self.length)
        state = begin(logits, self.cache, np.asarray([len(ids)], np.int32), np.asarray([limit], np.int32), row_keys(seed, 1), history, sampling,
                      np.asarray(stops.tokens, np.int32), bucket(limit))
        kept, answer = [state], []
        try:
            for piece in pieces(token_stream(self.model, self.params, state, sampling, stops, kept), self.tokenizer, stops, ids):
                answer.append(piece)
                yield piece
        finally:
            last = kept[0]
            made = np.asarray(last.tokens[0, :int(last.count)]).tolist()
            self.cache, self.ids = last.cache, ids + made[:-1]       # the newest token is drawn, not yet fed
            self.messages = [*messages, {"role": "assistant", "content": "".join(answer)}]

    def feed(self, ids: list[int], room: int) -> jax.Array:
        """Brings the cache to hold exactly `ids`, with room for `room` positions, by computing only what it lacks. -> logits [1, V] after the last."""
        size = self.cache.length
        while size < room:
            size = min(2 * size, self.length)
        if size > self.cache.length:
            self.cache = grow(self.model, self.cache, size)
        same = next((i for i, (a, b) in enumerate(zip(self.ids, ids)) if a != b), min(len(self.ids), len(ids)))
        same = min(same, len(ids) - 1)                                # the last one is always computed: its logits are wanted
        if same < len(self.ids):
            if can_rewind(self.cache):
                self.cache = rewind(self.cache, jnp.asarray([same], jnp.int32))
            else:
                self.cache, same = init_cache(self.model, 1, self.cache.length), 0
        new = ids[same:]
        self.fed += len(new)
        size = bucket(len(new))
        tokens = np.zeros((1, size), np.int32)
        tokens[0, :len(new)] = new
        positions = same + np.arange(size, dtype=np.int32)[None]
        segments = (np.arange(size) < len(new)).astype(np.int32)[None]
        cache = dc.replace(self.cache, empty=self.cache.empty and same == 0)
        logits, self.cache = prefill(self.model, self.params, tokens, positions, segments, cache)
        self.ids = ids
        return logits
