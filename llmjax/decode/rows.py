"""What the host knows of an answer while it grows, and what is told of it in the end."""
from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from llmjax.decode.stops import Stops, new_text, stop_in

Finish = Literal["end", "stop", "length"]


@dc.dataclass(frozen=True)
class Completion:
    """One continuation. ids: new tokens, the end token left out; text: None without a tokenizer; logprobs: of each id under the model's softmax; finish: why it ended.

    score: the mean log-probability of what was made, the end token too; or what a scorer said, or a beam's score. alternatives: at each id the most probable ones, (id, log-probability),
    best first; prompt_logprobs, prompt_alternatives: the same of the prompt's ids, None for the first. None where not asked for.
    """
    ids: list[int]
    text: str | None
    logprobs: list[float]
    finish: Finish
    score: float = 0.0
    alternatives: list[list[tuple[int, float]]] | None = None
    prompt_logprobs: list[float | None] | None = None
    prompt_alternatives: list[list[tuple[int, float]] | None] | None = None


def pairs(ids: np.ndarray, logprobs: np.ndarray, count: int) -> list[list[tuple[int, float]]]:
    """ids, logprobs [T, n] -> the first `count` places as lists of (id, log-probability)."""
    return [list(zip(a, b)) for a, b in zip(ids[:count].tolist(), logprobs[:count].tolist())]


@dc.dataclass
class Row:
    """An answer to `prompt` that grows up to `limit` tokens; ids hold its end token, if it has come."""
    prompt: list[int]
    stops: Stops
    limit: int
    ids: list[int] = dc.field(default_factory=list)
    logprobs: list[float] = dc.field(default_factory=list)
    alternatives: list[list[tuple[int, float]]] | None = None
    finish: Finish | None = None

    @property
    def position(self) -> int:
        """Of the next token."""
        return len(self.prompt) + len(self.ids)

    def take(self, tokens: Sequence[int], logprobs: Sequence[float], others: tuple[np.ndarray, np.ndarray] | None = None) -> None:
        """Tokens that were made, as far as the answer goes; others: ids and log-probabilities [tokens, n] of their alternatives."""
        for k, (token, logprob) in enumerate(zip(tokens, logprobs)):
            if self.finish:
                return
            self.ids.append(int(token))
            self.logprobs.append(float(logprob))
            if others is not None:
                self.alternatives = self.alternatives or []
                self.alternatives += pairs(others[0][k:k + 1], others[1][k:k + 1], 1)
            if token in self.stops.tokens:
                self.finish = "end"
            elif len(self.ids) >= self.limit:
                self.finish = "length"

    def end_at_text(self, tokenizer: Any) -> None:
        """Ends the row where a stop string stands in it."""
        if not self.finish and stop_in(tokenizer, self.prompt, self.ids, self.stops) is not None:
            self.finish = "stop"

    def completion(self, tokenizer: Any) -> Completion:
        ended = self.finish == "end" and bool(self.ids) and self.ids[-1] in self.stops.tokens
        ids, finish = self.ids[:-1] if ended else list(self.ids), self.finish or "length"
        told = self.logprobs
        text = None if tokenizer is None else new_text(tokenizer, self.prompt, ids)
        cut = stop_in(tokenizer, self.prompt, ids, self.stops)
        if cut is not None:
            ids, text, finish = ids[:cut[0]], cut[1], "stop"
            told = self.logprobs[:len(ids)]
        others = None if self.alternatives is None else self.alternatives[:len(ids)]
        return Completion(ids, text, self.logprobs[:len(ids)], finish, float(np.mean(told)) if told else 0.0, others)
