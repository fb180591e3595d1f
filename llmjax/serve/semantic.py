"""Answers given again to questions that mean nearly the same, by the cosine of their embeddings.

What people blame such caches for is false hits, so only the last thing asked is compared by meaning. All else must be the same: whose key it is, the model and its adapter, every knob, the
conversation before, the tools, and the numbers in the question (an encoder hardly tells "in 2024" from "in 2025"). Only what would come again is kept at all, as in the exact store.
"""
from __future__ import annotations

import collections
import dataclasses as dc
import itertools
import re
from collections.abc import Callable, Hashable

import numpy as np

from llmjax.core.errors import ConfigError, DataError
from llmjax.serve import answers
from llmjax.serve.answers import Question
from llmjax.serve.errors import ApiError
from llmjax.serve.requests import Event
from llmjax.serve.vectors import Embedder

Said = list[tuple[int, list[Event]]]


@dc.dataclass(frozen=True)
class Kept:
    key: Hashable
    vector: np.ndarray
    said: Said


class SemanticStore:
    """The last `size` answers, found from a cosine of `threshold` on. seen: told of each look-up whether it found something."""

    def __init__(self, embedder: Embedder, threshold: float, size: int = 1024, seen: Callable[[bool], None] = lambda found: None):
        self.embedder, self.threshold, self.size, self.seen = embedder, threshold, size, seen
        self.kept: collections.OrderedDict[int, Kept] = collections.OrderedDict()
        self.places: dict[Hashable, list[int]] = {}
        self.numbers = itertools.count()

    @staticmethod
    def key(question: Question) -> Hashable:
        assert question.topic is not None
        text, context = question.topic
        return dc.replace(question, prompts=[], limit=0).key, context, tuple(re.findall(r"\d+", text))

    async def vector(self, question: Question) -> np.ndarray | None:
        """The question's embedding [D] of length 1; None for one that the encoder cannot read, which is then neither found nor kept."""
        assert question.topic is not None
        e = self.embedder
        try:
            ids = await answers.encode(e.tokenizer, question.topic[0], special=True, room=e.context, where="prompt")
            found = (await e([ids]))[0] if 0 < len(ids) <= e.context else None
        except (ApiError, ConfigError, DataError):
            return None
        return None if found is None or not np.isfinite(found).all() else found

    def find(self, question: Question, vector: np.ndarray) -> tuple[Said, float] | None:
        """(the nearest kept answer, its cosine), or None."""
        places = self.places.get(self.key(question), [])
        likeness = np.stack([self.kept[i].vector for i in places]) @ vector if places else np.zeros(1)
        best = int(np.argmax(likeness))
        found = bool(places) and float(likeness[best]) >= self.threshold
        self.seen(found)
        if not found:
            return None
        self.kept.move_to_end(places[best])
        return self.kept[places[best]].said, float(likeness[best])

    def keep(self, question: Question, vector: np.ndarray, said: Said) -> None:
        number, key = next(self.numbers), self.key(question)
        self.kept[number] = Kept(key, vector, said)
        self.places.setdefault(key, []).append(number)
        while len(self.kept) > self.size:
            old, gone = self.kept.popitem(last=False)
            self.places[gone.key].remove(old)
            if not self.places[gone.key]:
                del self.places[gone.key]
