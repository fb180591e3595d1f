"""A conversation whose history stays in the cache: a further turn costs its own tokens, not the whole conversation's."""
from __future__ import annotations

import copy
import dataclasses as dc
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.checkpoint import safetensors_file
from llmjax.checkpoint.table import Export
from llmjax.core import CheckpointError, ConfigError
from llmjax.decode.generate import sampling_of, token_stream
from llmjax.decode.kinds import Kind, cache_kind, make_cache
from llmjax.decode.prepare import prepared
from llmjax.decode.prompts import bucket
from llmjax.decode.reading import bounded, check_together, in_pieces
from llmjax.decode.sampling import row_keys, start_history
from llmjax.decode.steps import begin, can_rewind, grow, prefill, rewind
from llmjax.decode.stops import make_stops
from llmjax.decode.text import pieces
from llmjax.models import Cache, Decoder

Message = dict[str, str]
FORMAT = "llmjax conversation 2"
ABOUT = "about"                        # the tensor that holds all but the cache, as JSON
FIRST = 512                            # slots a conversation starts with; doubled as it grows


class Session:
    """One conversation with a model. `messages` is what was said; `ids` are the tokens the cache holds; `fed` counts tokens computed for prompts so far."""

    def __init__(self, model: Decoder, params: Any, tokenizer: Any, *, length: int | None = None, system: str | None = None, cache: Kind = None):
        """length: how long the conversation may get (the model's context unless given; over a streaming cache there is no end); the cache grows as it does. cache: its kind, as in complete.
        Raises ConfigError without a chat template, and for a paged cache."""
        if tokenizer is None or not tokenizer.chat_template:
            raise ConfigError("this model has no chat template: use `generate` with a plain prompt, or a tokenizer with a template")
        self.model, self.params = prepared(model, params)
        self.tokenizer = tokenizer
        self.kind = cache_kind(cache)
        check_together(self.kind, "a conversation, whose cache grows,", paged=True)
        longest = bounded(model.config, self.kind).context
        self.length = min(length or longest, longest)
        self.cache = self.empty_cache(FIRST)
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.ids: list[int] = []
        self.fed = 0

    def empty_cache(self, size: int) -> Cache:
        return make_cache(self.model, 1, min(size, self.length), self.kind)

    def reset(self) -> None:
        """Forgets the conversation but for a system message."""
        self.messages = [m for m in self.messages[:1] if m["role"] == "system"]
        self.ids, self.cache = [], self.empty_cache(FIRST)

    def fork(self) -> Session:
        """A second conversation with the same past; neither changes the other. Costs a copy of the cache. Raises ConfigError while an answer is being made."""
        self.check_idle("fork")
        other = copy.copy(self)
        other.cache, other.messages, other.ids = jax.tree.map(jnp.copy, self.cache), list(self.messages), list(self.ids)
        return other

    def save(self, path: str | pathlib.Path) -> None:
        """The conversation with its cache as one safetensors file, for `Session.load`. Raises ConfigError while an answer is being made."""
        self.check_idle("save")
        path = pathlib.Path(path)
        told = dict(format=FORMAT, model=fingerprint(self.model, self.params), messages=self.messages, ids=self.ids, fed=self.fed, length=self.length, size=self.cache.length,
                    empty=self.cache.empty, cache=self.kind.name)
        arrays = {ABOUT: np.frombuffer(json.dumps(told).encode(), np.uint8)} | {f"cache/{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(self.cache))}
        part = path.with_name(path.name + ".part")
        safetensors_file.write_file(part, [Export(name, x.shape, x.dtype, functools.partial(np.asarray, x)) for name, x in arrays.items()])
        part.replace(path)

    @classmethod
    def load(cls, path: str | pathlib.Path, model: Decoder, params: Any, tokenizer: Any) -> Session:
        """A conversation that `save` wrote, with the model it was had with; nothing of it is computed again. Raises FileNotFoundError, and CheckpointError for another model or another
        kind of file."""
        path = pathlib.Path(path)
        source = safetensors_file.SafeTensors([path], str(path))
        told = json.loads(source.read(ABOUT).tobytes()) if ABOUT in source.shapes else {}
        if told.get("format") != FORMAT:
            raise CheckpointError(f"{path}: this is no conversation that Session.save wrote")
        session = cls(model, params, tokenizer, length=told["length"], cache=told["cache"])
        if told["model"] != fingerprint(session.model, session.params):
            raise CheckpointError(f"{path}: the conversation was had with another model, other weights or another form of them; begin a Session and set its messages to go on")
        like = dc.replace(session.empty_cache(told["size"]), empty=told["empty"])
        leaves, tree = jax.tree.flatten(like)
        arrays = [source.read(f"cache/{i}") for i in range(len(leaves))]
        if any(x.shape != y.shape or x.dtype != y.dtype for x, y in zip(arrays, leaves)):
            raise CheckpointError(f"{path}: its cache is of another form; begin a Session and set its messages to go on")
        session.cache, session.messages, session.ids, session.fed = jax.tree.unflatten(tree, map(jnp.asarray, arrays)), told["messages"], told["ids"], told["fed"]
        return session

    def check_idle(self, what: str) -> None:
        """Raises ConfigError while the cache is in the hands of an answer that is being made."""
        if any(x.is_deleted() for x in jax.tree.leaves(self.cache)):
            raise ConfigError(f"{what}: an answer is being made; take all of its pieces, or close its iterator, first")

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
        history = start_history(sampling, self.model.config.vocab_size, [ids], length=min(self.length, self.model.config.context))
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
        while size < room and not self.kind.evicts:
            size = min(2 * size, self.length)
        if size > self.cache.length:
            self.cache = grow(self.model, self.cache, size)
        same = next((i for i, (a, b) in enumerate(zip(self.ids, ids)) if a != b), min(len(self.ids), len(ids)))
        same = min(same, len(ids) - 1)                                # the last one is always computed: its logits are wanted
        if same < len(self.ids):
            if can_rewind(self.cache):
                self.cache = rewind(self.cache, jnp.asarray([same], jnp.int32))
            else:
                self.cache, same = self.empty_cache(self.cache.length), 0
        new = ids[same:]
        self.fed += len(new)
        size = bucket(len(new))
        tokens = np.zeros((1, size), np.int32)
        tokens[0, :len(new)] = new
        positions = same + np.arange(size, dtype=np.int32)[None]
        segments = (np.arange(size) < len(new)).astype(np.int32)[None]
        cache = dc.replace(self.cache, empty=self.cache.empty and same == 0)
        logits, self.cache = (in_pieces if self.kind.evicts else prefill)(self.model, self.params, tokens, positions, segments, cache)
        self.ids = ids
        return logits


def fingerprint(model: Decoder, params: Any) -> str:
    """Tells models apart by their configuration and by a few numbers of every weight: a cache is of use to the weights that made it alone."""
    found = hashlib.sha256(repr(model.config).encode())
    for x in jax.tree.leaves(params):
        found.update(np.asarray(x[(0,) * (x.ndim - 1)][:8] if x.ndim else x).tobytes())
    return found.hexdigest()
