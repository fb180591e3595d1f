"""Beam search with a length penalty, and in diverse groups. What is kept, when a beam is finished and when a search ends are transformers' rules, so that texts are comparable.

Legend: B prompts, G groups, K beams of a group, C candidates of a group, M room for new tokens, V vocabulary.
"""
from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass

from llmjax.core import ConfigError
from llmjax.decode.generate import sampling_of
from llmjax.decode.history import History, remember
from llmjax.decode.kinds import Kind, cache_kind
from llmjax.decode.prepare import prepared
from llmjax.decode.prompts import Prompt, bucket, token_ids
from llmjax.decode.reading import check_together, prefilled
from llmjax.decode.rows import Completion, Row
from llmjax.decode.sampling import Sampling, adjusted, start_history
from llmjax.decode.steps import forward_one, take_rows
from llmjax.decode.stops import make_stops
from llmjax.models import Cache, Decoder, jit_by_model

FAR = -1e9                             # what a score is moved by so that it is never chosen, as in transformers


@register_dataclass
@dc.dataclass(frozen=True)
class Texts:
    """tokens [B, G, K, M] int32, their log-probabilities [B, G, K, M], scores [B, G, K], lengths [B, G, K] int32."""
    tokens: jax.Array
    logprobs: jax.Array
    scores: jax.Array
    lengths: jax.Array


@register_dataclass
@dc.dataclass(frozen=True)
class Beams:
    """running: texts that go on, best first; finished: the best that are whole, and whether there is one [B, G, K]; open [B, G]: whether a running one may still become better;
    positions [B]: of the next token."""
    running: Texts
    finished: Texts
    there: jax.Array
    open: jax.Array
    positions: jax.Array
    count: jax.Array
    history: History
    cache: Cache


@register_dataclass
@dc.dataclass(frozen=True)
class Rules:
    """How a search goes. limits [B] int32; diversity, length_penalty: numbers; early (static): see `beam_search`."""
    limits: jax.Array
    diversity: jax.Array
    length_penalty: jax.Array
    early: bool | Literal["never"] = dc.field(default=False, metadata=dict(static=True))


def gathered(texts: Texts, index: jax.Array) -> Texts:
    """Of one group, [B, K, …] leaves: those at index [B, n]."""
    return jax.tree.map(lambda x: jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), 1), texts)


def step_group(running: Texts, finished: Texts, there: jax.Array, open_: jax.Array, scores: jax.Array, raw: jax.Array, count: jax.Array, end_tokens: jax.Array, rules: Rules):
    """One group's step. Texts with [B, K, …] leaves; scores [B, K, V] of every next token, raw [B, K, V] their log-probabilities -> (running, finished, there, open, parents [B, K])."""
    beams, vocab = scores.shape[1:]
    top, index = jax.lax.top_k((scores + running.scores[:, :, None]).reshape(len(scores), -1), max(2, 1 + len(end_tokens)) * beams)      # enough to go on with when the best of them end
    parent, token = index // vocab, index % vocab
    texts = gathered(running, parent)
    logprob = jnp.take_along_axis(raw.reshape(len(raw), -1), index, 1)
    texts = Texts(texts.tokens.at[:, :, count].set(token), texts.logprobs.at[:, :, count].set(logprob), top, jnp.full(top.shape, count + 1))
    hit = (token[..., None] == end_tokens[None, None]).any(-1) | (count + 1 >= rules.limits)[:, None]
    best, going = jax.lax.top_k(top + FAR * hit, beams)
    whole = hit & (jnp.arange(top.shape[1]) < beams)[None]
    frozen = ~open_ | (there.all(-1) & (rules.early is True))
    ended = dc.replace(texts, scores=top / (count + 1).astype(jnp.float32) ** rules.length_penalty + FAR * frozen[:, None] + FAR * ~whole)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), finished, ended)
    _, kept = jax.lax.top_k(both.scores, beams)
    there = jnp.take_along_axis(jnp.concatenate([there, whole], 1), kept, 1)
    finished, running = gathered(both, kept), dc.replace(gathered(texts, going), scores=best)
    length = rules.limits if rules.early == "never" else jnp.broadcast_to(count + 1, rules.limits.shape)
    length = jnp.where(rules.length_penalty > 0, length, count + 1).astype(jnp.float32)
    hope = running.scores[:, 0] / length ** rules.length_penalty
    worst = jnp.where(there, finished.scores.min(-1, keepdims=True), FAR)
    open_ = open_ & (hope[:, None] > worst).any(-1) & (count + 1 < rules.limits)
    return running, finished, there, open_ & ~(there.all(-1) & (rules.early is True)), jnp.take_along_axis(parent, going, 1)


def step(state: Beams, logits: jax.Array, sampling: Sampling, end_tokens: jax.Array, rules: Rules) -> Beams:
    """All groups, one after the other: each is fined for tokens that earlier ones took at this place (Vijayakumar et al. 2016, arXiv:1610.02424, Hamming diversity). logits [B·G·K, V]."""
    rows, groups, beams = state.running.scores.shape
    vocab = logits.shape[-1]
    raw = jax.nn.log_softmax(logits)
    scores = adjusted(raw, sampling, state.history).reshape(rows, groups, beams, vocab)
    raw, chosen, parts = raw.reshape(scores.shape), jnp.zeros((rows, vocab)), []
    for g in range(groups):
        running, finished = (jax.tree.map(lambda x: x[:, g], texts) for texts in (state.running, state.finished))         # noqa: B023
        part = step_group(running, finished, state.there[:, g], state.open[:, g], scores[:, g] - rules.diversity * chosen[:, None], raw[:, g], state.count, end_tokens, rules)
        chosen = chosen + jax.nn.one_hot(part[0].tokens[:, :, state.count], vocab).sum(1)
        parts.append(part)
    running, finished, there, open_, parents = jax.tree.map(lambda *xs: jnp.stack(xs, 1), *parts)
    index = (parents + (jnp.arange(rows * groups) * beams).reshape(rows, groups, 1)).reshape(-1)
    history = jax.tree.map(lambda x: x[index], state.history)
    history = remember(history, running.tokens[..., state.count].reshape(-1), jnp.ones(len(index), bool), history.mu)
    return Beams(running, finished, there, open_, state.positions + 1, state.count + 1, history, take_rows(state.cache, index))


@jit_by_model(donate_argnames=("cache", "history"), static_argnames=("groups", "beams", "room"))
def search(model: Decoder, params: Any, logits: jax.Array, cache: Cache, lengths: jax.Array, sampling: Sampling, history: History, end_tokens: jax.Array, rules: Rules, groups: int, beams: int,
           room: int) -> Texts:
    """logits [B·G·K, V] after prompts of lengths [B] -> the finished texts, best first in each group."""
    shape = (len(lengths), groups, beams)
    empty = Texts(jnp.zeros((*shape, room), jnp.int32), jnp.zeros((*shape, room)), jnp.full(shape, FAR), jnp.zeros(shape, jnp.int32))
    first = dc.replace(empty, scores=jnp.broadcast_to(jnp.where(jnp.arange(beams) == 0, 0.0, FAR), shape))           # the beams are one text so far
    state = Beams(first, empty, jnp.zeros(shape, bool), jnp.ones(shape[:2], bool), lengths, jnp.zeros((), jnp.int32), history, cache)

    def body(s: Beams):
        tokens = jax.lax.dynamic_index_in_dim(s.running.tokens, s.count - 1, 3, keepdims=False)
        active = jnp.broadcast_to(s.open[..., None], shape).reshape(-1)
        logits, cache = forward_one(model, params, tokens.reshape(-1), jnp.repeat(s.positions - 1, groups * beams), active, s.cache)
        return step(dc.replace(s, cache=cache), logits, sampling, end_tokens, rules)
    return jax.lax.while_loop(lambda s: s.open.any(), body, step(state, logits, sampling, end_tokens, rules)).finished


def beam_search(model: Decoder, params: Any, tokenizer: Any, prompts: Sequence[Prompt], *, beams: int = 4, groups: int = 1, diversity: float = 0.0, length_penalty: float = 1.0,
                early_stopping: bool | Literal["never"] = False, n: int = 1, max_new_tokens: int = 64, stop: Sequence[int] | None = None, cache: Kind = None,
                **knobs: Any) -> list[Completion]:
    """The n best of `beams` texts for each prompt, best first: [prompt 0 best, prompt 0 second, …]. A text's score is the sum of its log-probabilities over length^length_penalty.

    groups: beams are divided among so many, each of which loses `diversity` for every token that an earlier group took at the same place; scores hold that loss. early_stopping: True ends
    with as many whole texts as beams; False when the best running one, at its length now, is worse than the worst whole one; "never" when it would be at its best length. stop: ids that
    end a text (None: the model's own). knobs: of sampling.Sampling those that are about more than drawing (penalties, biases, bans, min_tokens), on log-probabilities, as transformers
    applies them. cache: as in complete, contiguous (of any dtype) alone. Raises ConfigError for what cannot be done.
    """
    for name, value in (("beams", beams), ("groups", groups), ("n", n), ("max_new_tokens", max_new_tokens)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}={value!r}: a whole number from 1 is wanted")
    if beams % groups or n > beams:
        raise ConfigError(f"beams={beams}: a multiple of groups={groups}, and n={n} at least, is wanted")
    if early_stopping not in (True, False, "never"):
        raise ConfigError(f'early_stopping={early_stopping!r}: True, False or "never" is wanted')
    if diversity < 0 or (diversity and groups == 1):
        raise ConfigError(f"diversity={diversity}: 0 or more, and of use only with groups")
    drawing = [k for k, v in knobs.items() if v is not None and k in ("temperature", "top_k", "top_p", "min_p", "typical_p", "top_n_sigma", "mirostat_tau", "mirostat_eta")]
    if drawing:
        raise ConfigError(f"{drawing[0]}: beam search draws nothing; leave it out, or use complete")
    check_together(cache_kind(cache), "beams", paged=True, heavy=True, streaming=True)
    stops = make_stops(stop, tokenizer, model.config)
    if stops.texts:
        raise ConfigError(f"stop={stops.texts[0]!r}: beams end with ids; give the id, or use complete")
    rows = token_ids(prompts, tokenizer, model.config)
    if not rows:
        return []
    sampling = sampling_of(len(rows) * beams, stops, tokenizer, model.config, knobs)
    model, params = prepared(model, params)
    s = prefilled(model, params, rows, max_new_tokens=max_new_tokens, n=beams, cache=cache)
    history = start_history(sampling, model.config.vocab_size, s.told, length=s.room)
    rules = Rules(jnp.asarray(s.limits[::beams]), jnp.float32(diversity), jnp.float32(length_penalty), early_stopping)
    found = jax.device_get(search(model, params, s.logits, s.cache, s.lengths[::beams], sampling, history, np.asarray(stops.tokens, np.int32), rules, groups=groups, beams=beams // groups,
                                  room=bucket(int(s.limits.max()))))
    out = []
    for b in range(len(rows)):
        tokens, logprobs, scores, lengths = (x[b].reshape(beams, *x.shape[3:]) for x in (found.tokens, found.logprobs, found.scores, found.lengths))
        for k in np.argsort(-scores, kind="stable")[:n]:
            row = Row(s.told[b * beams], stops, int(s.limits[b * beams]))
            row.take(tokens[k, :lengths[k]].tolist(), logprobs[k])
            out.append(dc.replace(row.completion(tokenizer), score=float(scores[k])))
    return out
