"""Rearrange patterns: how one tensor of a file and one or several of our parameters hold the same numbers.

    "(n h) d -> d n h"        a torch Linear of all heads -> our [D, N, H]
    "(n p 2) d -> d n (2 p)"  a number is an axis of that size (here: the two halves of a rotated pair)
    "d [n h] -> d n h"        several parameters lie one after the other along what stands in brackets (GPT-2's q, k, v)
    "(n [h]) d -> d n h"      … within each head (GPT-NeoX)
    "f [1] -> f"              … interleaved one by one (gpt-oss gate and up)

The left side is the file's, the right side ours. Sizes come from the shapes of our parameters (and `known`, where a shape leaves two letters of one dimension open), never
from the file: the file is then checked against the shape that follows.
"""
from __future__ import annotations

import dataclasses as dc
import functools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

Sizes = Mapping[str, int]


@dc.dataclass(frozen=True)
class Pattern:
    """left, right: groups of letters, a group per dimension. cut: (group of the left side, first, last + 1 letter in it) along which several parameters are joined."""
    left: tuple[tuple[str, ...], ...]
    right: tuple[tuple[str, ...], ...]
    cut: tuple[int, int, int] | None


@functools.cache
def parse(text: str) -> Pattern:
    """Reads a pattern; a malformed one is our own bug, hence assertions."""
    left_text, arrow, right_text = text.partition("->")
    left, cut = parse_side(left_text)
    right, right_cut = parse_side(right_text if arrow else left_text)
    assert right_cut is None or not arrow, f"{text}: brackets belong to the left side"
    letters = [a for g in left for a in g if a != "1"]
    assert sorted(letters) == sorted(a for g in right for a in g if a != "1"), f"{text}: the two sides have different letters"
    assert len(set(letters)) == len(letters), f"{text}: a letter stands twice"
    return Pattern(left, right, cut)


def parse_side(text: str) -> tuple[tuple[tuple[str, ...], ...], tuple[int, int, int] | None]:
    groups: list[tuple[str, ...]] = []
    cut: tuple[int, int, int] | None = None
    current: list[str] = []
    start, alone, inside = 0, False, False
    for token in re.findall(r"[()\[\]]|\w+", text):
        if token == "(" or (token == "[" and not inside):
            current, alone, inside = [], token == "[", True
        if token == "[":
            start = len(current)
        elif token == "]":
            cut = (len(groups), start, len(current))
        elif token not in "()":
            if inside:
                current.append(token)
            else:
                groups.append((token,))
        if token == ")" or (token == "]" and alone):
            groups.append(tuple(current))
            inside = False
    return tuple(groups), cut


def solve(groups: Sequence[tuple[str, ...]], shape: Sequence[int], known: Sizes) -> dict[str, int]:
    """The size of each letter, from the dimensions its groups have. Raises ValueError where they cannot fit."""
    if len(groups) != len(shape):
        raise ValueError(f"{len(groups)} dimensions are expected, it has shape {tuple(shape)}")
    sizes: dict[str, int] = {"1": 1}
    for group, n in zip(groups, shape):
        given = {a: int(a) if a.isdigit() else known[a] for a in group if a.isdigit() or a in known} if len(group) > 1 else {}
        open_ = [a for a in group if a not in given]
        rest = math.prod(given.values())
        if len(open_) > 1:
            raise ValueError(f"the sizes of {' and '.join(open_)} do not follow from a dimension of {n}")
        if n % rest or (not open_ and n != rest):
            raise ValueError(f"a dimension of {n} does not split into {' × '.join(group)}")
        sizes |= given | {a: n // rest for a in open_}
    return sizes


def file_shape(pattern: Pattern, pieces: Sequence[Sizes]) -> tuple[int, ...]:
    """The shape of the file's tensor that holds these parameters."""
    shape = [math.prod(pieces[0][a] for a in group) for group in pattern.left]
    if pattern.cut:
        axis, start, stop = pattern.cut
        outer, inner = (math.prod(pieces[0][a] for a in part) for part in (pattern.left[axis][:start], pattern.left[axis][stop:]))
        shape[axis] = outer * sum(bracket(pattern, piece) for piece in pieces) * inner
    return tuple(shape)


def bracket(pattern: Pattern, piece: Sizes) -> int:
    """How many numbers of the joined axis a parameter fills."""
    assert pattern.cut
    axis, start, stop = pattern.cut
    return math.prod(piece[a] for a in pattern.left[axis][start:stop])


def split(x: np.ndarray, pattern: Pattern, pieces: Sequence[Sizes], number: int) -> np.ndarray:
    """The `number`-th parameter in a file's tensor x, in our shape (a view where numpy can give one)."""
    sizes = pieces[number]
    if pattern.cut:
        axis, start, stop = pattern.cut
        outer, inner = (math.prod(sizes[a] for a in part) for part in (pattern.left[axis][:start], pattern.left[axis][stop:]))
        lengths = [bracket(pattern, piece) for piece in pieces]
        x = x.reshape(*x.shape[:axis], outer, sum(lengths), inner, *x.shape[axis + 1:])
        begin = sum(lengths[:number])
        x = x[(slice(None),) * (axis + 1) + (slice(begin, begin + lengths[number]),)]
    return move(x, pattern.left, pattern.right, sizes)


def join(xs: Sequence[np.ndarray], pattern: Pattern, pieces: Sequence[Sizes]) -> np.ndarray:
    """The inverse of `split`: the file's tensor out of our parameters."""
    moved = [move(x, pattern.right, pattern.left, sizes) for x, sizes in zip(xs, pieces)]
    if not pattern.cut:
        return moved[0]
    axis, start, stop = pattern.cut
    parts = []
    for x, sizes in zip(moved, pieces):
        outer, inner = (math.prod(sizes[a] for a in part) for part in (pattern.left[axis][:start], pattern.left[axis][stop:]))
        parts.append(x.reshape(*x.shape[:axis], outer, bracket(pattern, sizes), inner, *x.shape[axis + 1:]))
    return np.concatenate(parts, axis + 1).reshape(file_shape(pattern, pieces))


def move(x: np.ndarray, source: Sequence[tuple[str, ...]], target: Sequence[tuple[str, ...]], sizes: Sizes) -> np.ndarray:
    names = [a for group in source for a in group if a != "1"]
    x = x.reshape([sizes[a] for a in names])
    x = x.transpose([names.index(a) for group in target for a in group if a != "1"])
    return x.reshape([math.prod(sizes[a] for a in group) for group in target])
