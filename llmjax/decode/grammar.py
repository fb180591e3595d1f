"""What an answer may be: a JSON schema, a regular expression, a Lark grammar, one of several texts. A `Grammar` is one compiled for a tokenizer, a `Matcher` the place of one answer in it:
host objects around llguidance (`llmjax[grammar]`), which know nothing of models. The step takes a matcher's mask as packed bits (`sampling.adjusted`).

Legend: V vocabulary.
"""
from __future__ import annotations

import dataclasses as dc
import functools
import json
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from llmjax.core import ConfigError
from llmjax.core.errors import MissingExtra


@dc.dataclass(frozen=True)
class JsonSchema:
    """A JSON text that fits `schema`, a mapping (True, or {}: any JSON). Separators are json.dumps's (", " and ": ") so that no white space goes on for ever; flexible=True leaves white
    space to the model."""
    schema: Any
    flexible: bool = False


@dc.dataclass(frozen=True)
class Regex:
    """A text that the whole pattern matches (Rust's regex syntax; no look-around, no back references)."""
    pattern: str


@dc.dataclass(frozen=True)
class Lark:
    """A text of a context-free grammar in Lark's notation, its first rule called `start`."""
    text: str


@dc.dataclass(frozen=True)
class Choice:
    """One of these texts."""
    options: Sequence[str]


Constraint = JsonSchema | Regex | Lark | Choice


@functools.cache
def library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise MissingExtra("llguidance", "grammar", "decoding by a grammar") from None
    return llguidance


def written(constraint: Constraint) -> str:
    """The constraint in llguidance's own form. Raises ConfigError."""
    matcher = library().LLMatcher
    match constraint:
        case JsonSchema(schema, flexible):
            schema = {} if schema is True else schema
            if not isinstance(schema, dict):
                raise ConfigError(f"JsonSchema: a schema is a mapping, not {str(schema)[:80]!r}")
            spaces = {"whitespace_flexible": True} if flexible else {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
            try:
                return matcher.grammar_from_json_schema(json.dumps(schema), defaults=spaces)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"JsonSchema: {error}") from None
        case Regex(pattern):
            return matcher.grammar_from_regex(pattern)
        case Lark(text):
            return matcher.grammar_from_lark(text)
        case Choice(options):
            if isinstance(options, str) or not options or not all(isinstance(x, str) and x for x in options):
                raise ConfigError("Choice: a list of texts is wanted, none of them empty")
            return matcher.grammar_from_lark("start: " + " | ".join(json.dumps(x, ensure_ascii=False) for x in options))
    raise ConfigError(f"grammar={constraint!r}: JsonSchema, Regex, Lark or Choice is wanted")


class Grammar:
    """A constraint compiled for a tokenizer and a model's vocabulary; shared by any number of matchers."""

    def __init__(self, constraint: Constraint, tokenizer: Any, vocab_size: int, end_tokens: Sequence[int] = ()):
        """end_tokens: what may follow a whole answer (the tokenizer's own end token unless given). Raises MissingExtra without llguidance; ConfigError for a constraint that cannot be
        compiled or that no text satisfies, and for a tokenizer without text pieces or without an end token."""
        if tokenizer is None:
            raise ConfigError("a grammar is about text, and there is no tokenizer")
        ends = tuple(end_tokens) or (() if tokenizer.eos_id is None else (tokenizer.eos_id,))
        if not ends:
            raise ConfigError("a grammar needs an end token to close its answers with, and neither model nor tokenizer names one")
        self.words, self.end_tokens = -(-vocab_size // 32), ends
        self.pieces = pieces_of(tokenizer, vocab_size, ends)
        self.source = written(constraint)
        wrong, messages = library().LLMatcher.validate_grammar_with_warnings(self.source, self.pieces)
        if wrong:
            raise ConfigError(f"{type(constraint).__name__}: {' '.join(messages[0].split())[:300]}")

    def matcher(self) -> Matcher:
        """The start of an answer."""
        return Matcher(self, library().LLMatcher(self.pieces, self.source, log_level=0))


class Matcher:
    """One answer's place in its grammar. Raises ConfigError where a token does not fit, or the grammar needs more than llguidance's limits."""

    def __init__(self, grammar: Grammar, inner: Any):
        self.grammar, self.inner = grammar, inner

    def mask(self, out: np.ndarray | None = None) -> np.ndarray:
        """Which tokens may come next: [ceil(V / 32)] int32, bit i of word w being token 32 w + i, written into `out` where given. An end token's bit is on where the answer may end."""
        out = np.zeros(self.grammar.words, np.int32) if out is None else out
        if self.done:
            out[:] = 0
            for x in self.grammar.end_tokens:
                out.view(np.uint32)[x >> 5] |= np.uint32(1 << (x & 31))
            return out
        self.inner.unsafe_compute_mask_ptr(out.ctypes.data, out.nbytes)
        self.check()
        return out

    def advance(self, token: int) -> None:
        """A token was made. After the end only an end token fits."""
        if self.done and token in self.grammar.end_tokens:
            return
        if not self.inner.consume_token(int(token)):
            raise ConfigError(f"token {token} does not fit the grammar here: {self.inner.get_error().strip().splitlines()[0][:200] if self.inner.get_error() else 'it is over'}")

    def forced(self) -> list[int]:
        """The tokens that must come next, as the tokenizer spells them; not yet advanced over. Empty where there is a choice. The mask before each of them leaves it alone, so a text is the
        same whether they are drawn or fed undrawn."""
        return [] if self.done else [int(x) for x in self.inner.compute_ff_tokens()]

    def fits(self, tokens: Sequence[int]) -> int:
        """How many of the tokens could be made one after the other."""
        return self.inner.validate_tokens([int(x) for x in tokens])

    @property
    def done(self) -> bool:
        """Whether the answer is whole and nothing can follow."""
        return self.inner.is_stopped()

    @property
    def complete(self) -> bool:
        """Whether the answer is whole as it stands; more may follow."""
        return self.inner.is_accepting()

    def copy(self) -> Matcher:
        return Matcher(self.grammar, self.inner.deep_copy())

    def check(self) -> None:
        if self.inner.is_error():
            raise ConfigError(f"the grammar: {' '.join(self.inner.get_error().split())[:300]}")


KNOWN: weakref.WeakKeyDictionary[Any, dict[tuple, Any]] = weakref.WeakKeyDictionary()


def pieces_of(tokenizer: Any, vocab_size: int, end_tokens: tuple[int, ...]) -> Any:
    """llguidance's view of a tokenizer, made once each."""
    made = KNOWN.setdefault(tokenizer, {})
    key = (vocab_size, end_tokens)
    if key not in made:
        made[key] = library().LLTokenizer(library().TokenizerWrapper(Pieces(tokenizer, vocab_size, end_tokens[0])), eos_token=list(end_tokens))
    return made[key]


class Pieces:
    """The bytes of every id, and text as ids: what llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: Any, vocab_size: int, end_token: int):
        known = min(tokenizer.vocab_size, vocab_size)
        self.eos_token_id, self.bos_token_id = end_token, tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(known)] + [b""] * (vocab_size - known)      # a model's table may have rows its tokenizer has no token for
        self.special_token_ids = sorted({i for i in tokenizer.special_tokens.values() if i < vocab_size} | {end_token})
        self.tokenizer, self.special = tokenizer, set(self.special_token_ids)
        self.ids = {piece: i for i, piece in reversed(list(enumerate(self.tokens))) if piece and i not in self.special}
        self.longest = max(map(len, self.ids), default=0)
        text = 'a {"b": [1, "c"]}'
        if b"".join(self.tokens[i] for i in tokenizer.encode(text) if i < vocab_size).strip() != text.encode():
            raise ConfigError("this tokenizer's ids have no text of their own (its decoder sees all of them at once): a grammar cannot be followed")

    def __call__(self, text: str) -> list[int]:
        """Ids whose bytes are exactly the text's: the tokenizer's own where it adds no space and sees no special token in it, else the longest pieces from the left."""
        want, ids = text.encode(), self.tokenizer.encode(text)
        if not self.special.intersection(ids) and all(i < len(self.tokens) for i in ids) and b"".join(self.tokens[i] for i in ids) == want:
            return ids
        out: list[int] = []
        at = 0
        while at < len(want):
            size = next((n for n in range(min(self.longest, len(want) - at), 0, -1) if want[at:at + n] in self.ids), None)
            if size is None:
                return out                                               # what cannot be spelled is never forced
            out.append(self.ids[want[at:at + size]])
            at += size
        return out
