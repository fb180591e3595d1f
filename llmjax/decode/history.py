"""What draws depend on beside the logits: which tokens a row's text holds, how often, in which order, and mirostat's mu. One small pytree, carried by `loop` and by a server's step.

Legend: B rows, V vocabulary, H tokens looked back at.
"""
from __future__ import annotations

import dataclasses as dc
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass


@register_dataclass
@dc.dataclass(frozen=True)
class History:
    """Every leaf leads with B and is None where no row's knobs ask for it (an empty History has none).

    seen [B, V] bool: tokens of the prompt and of the answer. counts [B, V] int32: how often each was made. recent [B, H] int32: the newest H tokens of prompt and answer, newest first,
    -1 where there is none. made [B] int32: tokens made. mu [B] float32: mirostat's.
    """
    seen: jax.Array | None = None
    counts: jax.Array | None = None
    recent: jax.Array | None = None
    made: jax.Array | None = None
    mu: jax.Array | None = None


@dc.dataclass(frozen=True)
class Wanted:
    """Which parts of a History the knobs ask for, and how far back they look."""
    seen: bool
    counts: bool
    made: bool
    lookback: int


@functools.partial(jax.jit, static_argnames=("wanted", "vocab_size"))
def recall(prompt: jax.Array, answer: jax.Array, wanted: Wanted, vocab_size: int, mu: jax.Array | None) -> History:
    """prompt [B, P], answer [B, A] int32, both padded with -1 -> History."""
    rows = jnp.arange(len(prompt))[:, None]
    text = jnp.concatenate([prompt, answer], 1)
    known = jnp.where(text >= 0, text, vocab_size)
    seen = jnp.zeros((len(text), vocab_size), bool).at[rows, known].set(True, mode="drop") if wanted.seen else None
    counts = jnp.zeros((len(text), vocab_size), jnp.int32).at[rows, known[:, prompt.shape[1]:]].add(1, mode="drop") if wanted.counts else None
    recent = None
    if wanted.lookback:
        place = (text >= 0)[:, ::-1].cumsum(-1)[:, ::-1] - 1                       # how many tokens stand after this one
        recent = jnp.full((len(text), wanted.lookback), -1, jnp.int32).at[rows, jnp.where(text >= 0, place, wanted.lookback)].set(text, mode="drop")
    made = (answer >= 0).sum(-1).astype(jnp.int32) if wanted.made else None
    return History(seen, counts, recent, made, mu)


def begin_history(wanted: Wanted, vocab_size: int, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]] | None, mu: jax.Array | None) -> History:
    """The history of texts so far. prompts, answers: a list of ids per row."""
    def table(rows):
        out = np.full((len(rows), max(1, 1 << (max(map(len, rows), default=0) - 1).bit_length())), -1, np.int32)
        for i, ids in enumerate(rows):
            out[i, :len(ids)] = ids
        return out
    return recall(table(prompts), table(answers or [()] * len(prompts)), wanted, vocab_size, mu)


def remember(history: History, tokens: jax.Array, active: jax.Array, mu: jax.Array | None) -> History:
    """With tokens [B] made; rows where active [B] is false stay as they are. mu [B]: mirostat's after this draw."""
    rows = jnp.arange(len(tokens))
    seen, counts, recent, made = history.seen, history.counts, history.recent, history.made
    return History(None if seen is None else seen.at[rows, jnp.where(active, tokens, seen.shape[1])].set(True, mode="drop"),
                   None if counts is None else counts.at[rows, jnp.where(active, tokens, counts.shape[1])].add(1, mode="drop"),
                   None if recent is None else jnp.where(active[:, None], jnp.concatenate([tokens[:, None], recent[:, :-1]], 1), recent),
                   None if made is None else made + active,
                   None if history.mu is None else jnp.where(active, mu, history.mu))              # type: ignore[arg-type]
