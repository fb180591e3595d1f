"""Contrastive search: of the most probable next tokens the one whose hidden state is least like what stands already (Su et al. 2022, arXiv:2202.06417, equation 5).

Legend: B prompts, K candidates, L length of a text, D embed, V vocabulary, M room for new tokens.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.core import ConfigError
from llmjax.decode.prepare import prepared
from llmjax.decode.prompts import Prompt, bucket, padded, token_ids
from llmjax.decode.rows import Completion, Row
from llmjax.decode.steps import init_cache, repeat_rows, take_rows
from llmjax.decode.stops import make_stops
from llmjax.models import Cache, Decoder, jit_by_model


def unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


@jit_by_model(donate_argnames="cache", static_argnames=("top_k", "room"))
def search(model: Decoder, params: Any, tokens: jax.Array, segments: jax.Array, cache: Cache, alpha: jax.Array, limits: jax.Array, end_tokens: jax.Array, top_k: int,
           room: int) -> tuple[jax.Array, jax.Array]:
    """tokens, segments [B, L] int32, an empty cache of B rows, limits [B] -> (tokens [B, M], their log-probabilities [B, M])."""
    rows = len(tokens)
    x, cache = model.apply({"params": params}, tokens, None, segments, cache, method="features")
    lengths = segments.sum(-1)
    last = jnp.take_along_axis(x, lengths[:, None, None] - 1, 1)
    logits = model.apply({"params": params}, last, method="unembed")[:, 0]
    states = jnp.pad(unit(x) * segments[..., None], ((0, 0), (0, room), (0, 0)))       # unit vectors, 0 where nothing stands
    known = jnp.pad(segments > 0, ((0, 0), (0, room)))
    made, told = jnp.zeros((rows, room), jnp.int32), jnp.zeros((rows, room))

    def body(carry):
        count, done, logits, cache, states, known, made, told = carry
        logprobs, candidates = jax.lax.top_k(jax.nn.log_softmax(logits), top_k)                                       # [B, K]
        here = lengths + count
        active = jnp.repeat(~done, top_k)[:, None].astype(jnp.int32)
        x, tried = model.apply({"params": params}, candidates.reshape(-1, 1), jnp.repeat(here, top_k)[:, None], active, repeat_rows(cache, top_k), method="features")
        x = x.reshape(rows, top_k, -1)
        likeness = jnp.einsum("bkd,bld->bkl", unit(x), states, preferred_element_type=jnp.float32, precision="highest")
        worst = jnp.where(known[:, None], likeness, -1.0).max(-1)
        best = jnp.argmax((1 - alpha) * jnp.exp(logprobs) - alpha * worst, -1)
        token, logprob = (jnp.take_along_axis(y, best[:, None], 1)[:, 0] for y in (candidates, logprobs))
        x = jnp.take_along_axis(x, best[:, None, None], 1)
        at = jnp.arange(rows)
        states, known = states.at[at, here].set(unit(x)[:, 0], mode="drop"), known.at[at, here].set(True, mode="drop")
        made, told = made.at[:, count].set(token), told.at[:, count].set(logprob)
        done = done | (token[:, None] == end_tokens[None]).any(-1) | (count + 1 >= limits)
        return count + 1, done, model.apply({"params": params}, x, method="unembed")[:, 0], take_rows(tried, at * top_k + best), states, known, made, told
    start = (jnp.zeros((), jnp.int32), limits <= 0, logits, cache, states, known, made, told)
    *_, made, told = jax.lax.while_loop(lambda carry: ~carry[1].all(), body, start)
    return made, told


def contrastive_search(model: Decoder, params: Any, tokenizer: Any, prompts: Sequence[Prompt], *, top_k: int = 4, penalty_alpha: float = 0.6, max_new_tokens: int = 64,
                       stop: Sequence[int] | None = None) -> list[Completion]:
    """One continuation of each prompt. Of the top_k most probable tokens v each takes the one with the largest (1 - penalty_alpha) p(v) - penalty_alpha max_j cos(h_v, h_j), h being hidden
    states before the head, j all tokens of the text. Each step computes top_k rows. stop: ids that end a text (None: the model's own). Raises ConfigError for what cannot be done."""
    for name, value, most in (("top_k", top_k, model.config.vocab_size), ("max_new_tokens", max_new_tokens, None)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most and value > most):
            raise ConfigError(f"{name}={value!r}: a whole number from 1{f' to {most}' if most else ''} is wanted")
    if not 0 <= penalty_alpha <= 1:
        raise ConfigError(f"penalty_alpha={penalty_alpha!r}: a number from 0 to 1 is wanted")
    if model.config.encoder:
        raise ConfigError("contrastive search compares a text with itself: it is for decoders, and this is an encoder-decoder")
    stops = make_stops(stop, tokenizer, model.config)
    if stops.texts:
        raise ConfigError(f"stop={stops.texts[0]!r}: contrastive search ends with ids; give the id, or use complete")
    rows = token_ids(prompts, tokenizer, model.config)
    if not rows:
        return []
    model, params = prepared(model, params)
    limits = np.minimum(max_new_tokens, model.config.context - np.asarray([len(r) for r in rows]) + 1).astype(np.int32)
    room, length = bucket(int(limits.max())), bucket(max(map(len, rows)))
    tokens, _, segments = padded(rows, length)
    cache = init_cache(model, len(rows), -(-(length + room) // 64) * 64)
    made, told = jax.device_get(search(model, params, tokens, segments, cache, jnp.float32(penalty_alpha), limits, np.asarray(stops.tokens, np.int32), top_k=top_k, room=room))
    found = [Row(ids, stops, int(limit)) for ids, limit in zip(rows, limits)]
    for row, ids, logprobs in zip(found, made, told):
        row.take(ids.tolist(), logprobs)
    return [row.completion(tokenizer) for row in found]
