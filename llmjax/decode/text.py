"""New ids as text while they come: whole characters only, and nothing that may turn out to begin a stop string."""
from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from llmjax.decode.stops import Stops, find_stop


class TextStream:
    """`push(id)` -> the text that became certain with it; `stopped_by`: the stop string that was met; the text before it is all there is; `flush()` -> what was held back."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = (), stops: Sequence[str] = (), *, least: int = 0, keep: Collection[int] = ()):
        """prompt: ids that stand before. least: a stop string that is complete within so many tokens does not stop. keep: special tokens whose text is given nevertheless."""
        self.stops, self.least, self.keep, self.tokenizer = tuple(stops), least, frozenset(keep), tokenizer
        self.stream = tokenizer.stream(skip_special_tokens=True, after=prompt)
        self.held, self.floor, self.count = "", 0, 0
        self.stopped_by: str | None = None

    @property
    def stopped(self) -> bool:
        return self.stopped_by is not None

    def push(self, token: int) -> str:
        self.count += 1
        if self.stopped or token >= self.tokenizer.vocab_size:               # a model's table may have rows its tokenizer has no token for
            return ""
        if token in self.keep:
            return self.certain(self.stream.flush() + self.tokenizer.token_bytes(token).decode("utf-8", "replace"))
        return self.certain(self.stream.push(token))

    def flush(self) -> str:
        if self.stopped:
            return ""
        text = self.certain(self.stream.flush())
        if self.stopped:
            return text
        left, self.held = self.held, ""
        return text + left

    def certain(self, text: str) -> str:
        self.held += text
        if self.count <= self.least:
            self.floor = len(self.held)
        at = find_stop(self.held, self.stops, self.floor)
        if at is not None:
            self.stopped_by = next(s for s in self.stops if self.held.startswith(s, at))
            ready, self.held = self.held[:at], ""
            return ready
        sure = len(self.held) - begun(self.held, self.stops)
        ready, self.held = self.held[:sure], self.held[sure:]
        self.floor = max(0, self.floor - sure)
        return ready


def pieces(ids: Iterator[int], tokenizer: Any, stops: Stops, prompt: Sequence[int]) -> Iterator[str]:
    """Ids as text that continues the prompt's and never holds half a character nor any part of a stop string."""
    stream = TextStream(tokenizer, prompt, stops.texts, least=stops.least)
    for token in ids:
        text = stream.push(token)
        if text:
            yield text
        if stream.stopped:
            return
    text = stream.flush()
    if text:
        yield text


def begun(text: str, words: Iterable[str]) -> int:
    """How many characters at the end of a text may be the beginning of one of the words."""
    return max((k for w in words for k in range(1, min(len(w), len(text) + 1)) if text.endswith(w[:k])), default=0)
