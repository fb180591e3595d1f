"""Where an answer ends: end tokens, stop strings."""
from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence
from typing import Any

from llmjax.core import ConfigError


@dc.dataclass(frozen=True)
class Stops:
    """End tokens, stop strings; stop=None means the model's own end tokens, [] nothing. Texts stop beside the model's own end tokens. least: a text that is complete within so many
    tokens does not stop."""
    tokens: tuple[int, ...]
    texts: tuple[str, ...]
    least: int = 0


def make_stops(stop: str | Sequence[str | int] | None, tokenizer: Any, config: Any) -> Stops:
    if stop is None:
        return Stops(config.end_tokens, ())
    items = [stop] if isinstance(stop, str | int) else list(stop)
    texts = tuple(x for x in items if isinstance(x, str))
    if any(not t for t in texts):
        raise ConfigError("stop: an empty text would stop at once; leave it out")
    if texts and tokenizer is None:
        raise ConfigError(f"stop={texts[0]!r} is text and there is no tokenizer: give ids, or a tokenizer")
    wrong = [x for x in items if not isinstance(x, str) and not 0 <= x < config.vocab_size]
    if wrong:
        raise ConfigError(f"stop: id {wrong[0]} is outside the model's vocabulary of {config.vocab_size}")
    named = bool(texts)
    known = tokenizer.special_tokens if tokenizer is not None else {}
    tokens = tuple(int(x) for x in items if not isinstance(x, str)) + tuple(known[t] for t in texts if t in known)
    texts = tuple(t for t in texts if t not in known)
    return Stops(tokens + (config.end_tokens if named else ()), texts)


def new_text(tokenizer: Any, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The text of new ids as a continuation of the prompt's (SentencePiece keeps its first space then), special tokens left out."""
    pieces = tokenizer.stream(skip_special_tokens=True, after=prompt)
    return "".join([*(pieces.push(i) for i in ids if i < tokenizer.vocab_size), pieces.flush()])       # a model's table may have rows its tokenizer has no token for


def find_stop(text: str, stops: Sequence[str], after: int = 0) -> int | None:
    """Where the earliest stop string begins that ends beyond `after` characters, or None."""
    places = [i for i in (text.find(s, max(0, after - len(s) + 1)) for s in stops) if i >= 0]
    return min(places) if places else None


def stop_in(tokenizer: Any, prompt: Sequence[int], ids: Sequence[int], stops: Stops) -> tuple[int, str] | None:
    """Where a stop string ends the answer `ids` to a prompt: (how many ids are needed to see it, the text before it), or None."""
    if not stops.texts:
        return None
    detokenizer, text, floor = tokenizer.stream(skip_special_tokens=True, after=prompt), "", 0
    for count, token in enumerate([*ids, None], 1):
        text += detokenizer.flush() if token is None else detokenizer.push(token) if token < tokenizer.vocab_size else ""
        if count <= stops.least:
            floor = len(text)
        at = find_stop(text, stops.texts, floor)
        if at is not None:
            return min(count, len(ids)), text[:at]
    return None
