"""Prompts read into a cache of any kind: how much room they and their answers take, and the pieces in which each kind is fed.

What goes together with what: beams are rows that change places, which pages do not; what is judged several tokens at a time would meet another rule of eviction than what came one by one.
"""
from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.core import ConfigError
from llmjax.decode.kinds import CacheKind, Kind, Paged, cache_bytes, cache_kind, make_cache
from llmjax.decode.prompts import Prompt, begun, bucket, padded, token_ids
from llmjax.decode.steps import copy_pages, prefill, repeat_rows
from llmjax.models import Cache, Decoder, HeavyHitters, State, Streaming

PIECE = 256            # tokens of a prompt that an evicting cache is fed at a time, whose attention takes O(PIECE · (PIECE + size))
ENDLESS = 1 << 24      # positions of a text over a streaming cache, in which distances do not grow with the text; int32 and its sums are far


@dc.dataclass
class Start:
    """Prompts that are read: logits [B, V] after them, the cache, and of each row its length, how many tokens it may make, and what a History of it begins with; room: positions of the
    longest row, prompt and answer."""
    logits: jax.Array
    cache: Cache
    lengths: np.ndarray
    limits: np.ndarray
    told: list[list[int]]
    room: int


def bounded(config: Any, kind: CacheKind) -> Any:
    """The configuration with the context that texts have over a cache of this kind: none over a streaming one."""
    return dc.replace(config, context=ENDLESS) if isinstance(kind.layout, Streaming) else config


def check_together(kind: CacheKind, what: str, *, paged: bool = False, heavy: bool = False, streaming: bool = False) -> None:
    """Raises ConfigError where `what` does not work over a cache of one of the kinds that are named."""
    barred: dict[type, bool] = {Paged: paged, HeavyHitters: heavy, Streaming: streaming}
    if barred.get(type(kind.layout)):
        raise ConfigError(f"{what} and a cache of kind {kind.name!r} do not go together: leave one out, or take a contiguous cache (which may be int8 or int4)")


def room_for(config: Any, kind: CacheKind, lengths: Sequence[int], max_new_tokens: int, spare: int = 0) -> tuple[np.ndarray, int]:
    """lengths of prompts -> (how many tokens each may make, positions that hold the longest of them with its answer and `spare` tokens)."""
    limits = np.minimum(max_new_tokens, bounded(config, kind).context - np.asarray(lengths, np.int32) + 1)
    return limits, -(-(max(lengths) + bucket(int(limits.max())) + spare) // 64) * 64


def prefilled(model: Decoder, params: Any, rows: list[list[int]], *, max_new_tokens: int, n: int, spare: int = 0, cache: Kind = None) -> Start:
    """Prompts (those of an encoder-decoder are what its encoder reads) fed, each n times; the cache, of kind `cache`, has room for the answers and `spare` tokens more."""
    config, kind, source = model.config, cache_kind(cache), None
    if config.encoder:
        tokens, _, segments = padded(rows, min(bucket(max(map(len, rows))), max(config.encoder.context, max(map(len, rows)))))
        source, rows = (tokens, segments), begun(rows, config)
    told = [r for r in rows for _ in range(n)]
    lengths = np.asarray([len(r) for r in told], np.int32)
    limits, room = room_for(config, kind, lengths.tolist(), max_new_tokens, spare)
    if isinstance(kind.layout, Paged):
        logits, made = in_pages(model, params, rows, n, kind, room)
    else:
        made = make_cache(model, len(rows), room, kind)
        tokens, positions, segments = padded(rows, min(bucket(max(map(len, rows))), room))
        logits, made = (in_pieces if kind.evicts else prefill)(model, params, tokens, positions, segments, made, *(() if source is None else (source,)))
        if n > 1:
            logits, made = jnp.repeat(logits, n, 0), repeat_rows(made, n)
    return Start(logits, made, lengths, limits, told, room)


def in_pieces(model: Decoder, params: Any, tokens: np.ndarray, positions: np.ndarray, segments: np.ndarray, cache: Cache) -> tuple[jax.Array, Cache]:
    """`prefill` in pieces of PIECE tokens. Heavy hitters are chosen after each."""
    logits, last = None, segments.sum(-1) - 1
    for begin in range(0, tokens.shape[1], PIECE):
        here = slice(begin, begin + PIECE)
        found, cache = prefill(model, params, tokens[:, here], positions[:, here], segments[:, here], cache)
        logits = found if logits is None else jnp.where((last >= begin)[:, None], found, logits)
    assert logits is not None
    return logits, cache


def in_pages(model: Decoder, params: Any, rows: list[list[int]], n: int, kind: CacheKind, room: int) -> tuple[jax.Array, Cache]:
    """Prompts in pages, each drawn row with pages of its own: the first of a prompt's n rows reads it, the others get copies (where a layer keeps a state per row all read)."""
    assert isinstance(kind.layout, Paged)
    cache = make_cache(model, len(rows) * n, room, kind)
    assert cache.table is not None
    table = np.arange(cache.table.size, dtype=np.int32).reshape(cache.table.shape)
    every = any(isinstance(kept, State) for part in cache.layers.values() for kept in part)
    if every:
        rows = [row for row in rows for _ in range(n)]
    tokens, positions, segments = padded(rows, min(bucket(max(map(len, rows))), room))
    logits, cache = prefill(model, params, tokens, positions, segments, dc.replace(cache, table=jnp.asarray(table if every else table[::n])))
    if n > 1 and not every:
        width = -(-max(map(len, rows)) // kind.layout.page)
        source = np.repeat(table[::n, None, :width], n - 1, 1)
        target = table.reshape(len(rows), n, -1)[:, 1:, :width]
        logits, cache = jnp.repeat(logits, n, 0), copy_pages(cache, source.reshape(-1), target.reshape(-1))
    return logits, dc.replace(cache, table=jnp.asarray(table))


def answer_bytes(model: Decoder, tokenizer: Any, prompts: Sequence[Prompt], *, max_new_tokens: int = 64, n: int = 1, cache: Kind = None) -> tuple[int, int, int]:
    """What `generate` with these arguments will allocate -> (rows, positions of each, bytes of the cache). Raises ConfigError as generate does."""
    kind = cache_kind(cache)
    ids = begun(token_ids(prompts, tokenizer, bounded(model.config, kind)), model.config)
    if not ids:
        return 0, 0, 0
    rows, room = len(ids) * n, room_for(model.config, kind, [len(x) for x in ids], max_new_tokens)[1]
    return rows, room, cache_bytes(make_cache, model, rows, room, kind)
