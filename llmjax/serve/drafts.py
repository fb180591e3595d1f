"""Tokens that are fed before they are drawn: those a grammar forces (jump-ahead), and those that stood after the same words before (prompt lookup, `--speculate`).

A guess is a row of the call of its own: it names its sequence's pages, writes its keys there and sees those of the rows before it, since a layer writes before it looks. So rows with any
number of guesses, or none, go through the programs that decode anyway. At every guess a token is drawn as if the guesses before it were the text: with the key of (seed, position), the
request's knobs, and its grammar's mask at that place. What was drawn stands up to the first that is not the guess after it. Keys beyond are written over later.

What is made is thus what is made without guesses, token for token, greedy or sampled, for a seed (up to the order of sums in products of another size). A guess x is taken with probability
p(x), which is the acceptance min(1, p(x) / q(x)) of speculative.py for a guess that is certain, q(x) = 1 (Leviathan et al. 2023, arXiv:2211.17192, section 2.3).

Forced tokens are llguidance's: where the grammar leaves one text, its spelling is the tokenizer's own of that text, up to where another choice of text could change the spelling, and its
mask leaves that token alone, drawn or guessed; so nothing is healed afterwards, and a text is the same with jump-ahead and without.

Guesses are not made for a sequence whose draws depend on what the text holds (penalties), nor for models with a state per row, which cannot take a token back.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmjax.core.errors import ConfigError, nearest
from llmjax.decode.grammar import Matcher
from llmjax.decode.speculative import NGram, lookup
from llmjax.serve.requests import Luck, Request
from llmjax.serve.schedule import Feed, Guesses


def parse_speculation(text: str) -> NGram:
    """"ngram:5" (guesses a step) or "ngram:5:3" (and the longest run of tokens that is looked for). Raises ConfigError."""
    kind, *numbers = text.split(":")
    if kind != "ngram" or not 1 <= len(numbers) <= 2 or not all(n.isascii() and n.isdigit() and 1 <= int(n) <= 64 for n in numbers):
        raise ConfigError(f"--speculate={text}: ngram:TOKENS is wanted, or ngram:TOKENS:LONGEST, with numbers from 1 to 64" + (nearest(kind, ("ngram",)) if kind != "ngram" else ""))
    return NGram(*map(int, numbers))


class Drafts:
    """What may come next, as far as it can be known without the model. ngram: None for forced tokens alone."""

    def __init__(self, ngram: NGram | None):
        self.ngram = ngram

    def wanted(self, request: Request) -> bool:
        """Whether its next tokens may be guessed, for which its newest has to be read first."""
        return not request.knobs.remembers and (self.ngram is not None or request.matcher is not None)

    def guess(self, request: Request, most: int) -> Guesses:
        """At most `most` tokens."""
        sequence, matcher = request.sequence, request.matcher
        if sequence is None or most < 1 or not self.wanted(request):
            return Guesses()
        forced = [] if matcher is None else matcher.forced()[:most]
        found: list[int] = []
        count = min(most - len(forced), self.reach(request.luck))
        if self.ngram is not None and count > 0:
            found = lookup([*sequence.ids, *forced], self.ngram.longest, count)
            if matcher is not None:
                found = found[:max(0, matcher.fits([*forced, *found]) - len(forced))]
        return Guesses((*forced, *found), len(forced))

    def reach(self, luck: Luck) -> int:
        """How many tokens to look up: all where the last were all right, else about as many as were."""
        if self.ngram is None or luck.pause:
            return 0
        return self.ngram.tokens if luck.whole else min(self.ngram.tokens, 2 * luck.right + 1)

    def judge(self, feed: Feed, drawn: Sequence[int]) -> int:
        """How many of a feed's guesses are what was drawn before them. Where none was looked up rightly it is not tried for 1, 3, 7, then 15 steps, in which the sequence need not wait
        to be read: a text that copies nothing hardly pays, and one that begins to is soon found out."""
        guesses, sequence = feed.guesses, feed.sequence
        request: Request = sequence.request
        luck = request.luck
        right = next((i for i, (a, b) in enumerate(zip(guesses.tokens, drawn)) if a != b), len(guesses.tokens))
        if len(guesses.tokens) > guesses.forced:
            luck.whole, luck.right = right == len(guesses.tokens), max(0, right - guesses.forced)
            luck.misses = 0 if luck.right else luck.misses + 1
            luck.pause = min(1 << luck.misses, 16) - 1 if luck.misses else 0
        elif luck.pause:
            luck.pause -= 1
        sequence.waits = request.matcher is not None or (self.wanted(request) and not luck.pause)
        return right


def write_masks(matcher: Matcher, guesses: Sequence[int], out: np.ndarray) -> None:
    """The masks before each guess and after the last: out [1 + guesses, ceil(V / 32)] int32."""
    matcher.mask(out[0])
    if guesses:
        walker = matcher.copy()
        for token, bits in zip(guesses, out[1:]):
            walker.advance(token)
            walker.mask(bits)
