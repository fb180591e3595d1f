"""Who sees whom: the one mask of training, packing, prefill, chunked prefill, decoding and windows, and the check of an attention call's arguments.

Legend: B batch, T query length, S key length, N query heads, K kv heads, H head dim.
"""
import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Pattern:
    """The static part of a mask, hashable. `in_order`: queries and keys are the same tokens, those of a segment in order, positions counting up by one."""

    causal: bool
    window: int | None
    in_order: bool

    def reach(self, first: int, last: int, length: int) -> tuple[int, int]:
        """-> [start, stop) of the keys, among `length`, that queries `first` to `last` (inclusive) may see by their index alone; all of them where order says nothing."""
        if not self.in_order:
            return 0, length
        start = 0 if self.window is None else max(0, first - self.window + 1)
        stop = last + 1 if self.causal else length if self.window is None else last + self.window
        return min(start, length), min(stop, length)


def visible(query_positions, key_positions, query_segments=None, key_segments=None, *, causal: bool, window: int | None) -> jax.Array:
    """-> bool [B, T, S]: the same segment, not padding (segment 0), not later than the query if `causal`, and nearer than `window` positions.

    Positions and segments are int32 [B, T] and [B, S] (B may be 1 and broadcasts); segments are both given or both None (one document).
    """
    q, k = query_positions[:, :, None], key_positions[:, None, :]
    see = jnp.ones((1, 1, 1), bool)
    if causal:
        see = see & (k <= q)
    if window is not None:
        see = see & ((q - k if causal else jnp.abs(q - k)) < window)
    if key_segments is not None:
        see = see & (query_segments[:, :, None] == key_segments[:, None, :]) & (key_segments > 0)[:, None, :]
    return jnp.broadcast_to(see, (see.shape[0], q.shape[1], k.shape[2]))


def whereabouts(q, k, query_positions, key_positions, query_segments, key_segments):
    """-> the four with defaults filled in: positions None are a range ([1, T], [1, S]), segments stay None where both are."""
    if query_positions is None:
        query_positions = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
    if key_positions is None:
        key_positions = jnp.arange(k.shape[1], dtype=jnp.int32)[None]
    if query_segments is None and key_segments is not None:
        query_segments = jnp.ones((1, q.shape[1]), jnp.int32)
    if key_segments is None and query_segments is not None:
        key_segments = jnp.ones((1, k.shape[1]), jnp.int32)
    return query_positions, key_positions, query_segments, key_segments


def check(q, k, v, query_positions, key_positions, query_segments, key_segments, causal, in_order, window, softcap, sinks, slopes=None) -> Pattern:
    """Raises ValueError, naming the argument, its value and what is allowed, for what no implementation can mean; -> the static pattern."""
    if not (q.ndim == k.ndim == v.ndim == 4):
        raise ValueError(f"attention: q, k, v have shapes {q.shape}, {k.shape}, {v.shape}; they must be [B, T, N, H], [B, S, K, H], [B, S, K, Hv]")
    (B, T, N, H), (_, S, K, _) = q.shape, k.shape
    if k.shape != (B, S, K, H) or v.shape[:3] != (B, S, K):
        raise ValueError(f"attention: q {q.shape}, k {k.shape} and v {v.shape} disagree; k must be [{B}, S, K, {H}] and v [{B}, S, K, Hv]")
    if N % K:
        raise ValueError(f"attention: {N} query heads do not divide into groups over {K} kv heads; N must be a multiple of K")
    for name, array, length in (("query_positions", query_positions, T), ("key_positions", key_positions, S), ("query_segments", query_segments, T), ("key_segments",
    key_segments, S)):
        if array is not None and (array.ndim != 2 or array.shape[0] not in (1, B) or array.shape[1] != length or not jnp.issubdtype(array.dtype, jnp.integer)):
            raise ValueError(f"attention: {name} is {array.dtype}{list(array.shape)}; it must be integers of shape [{B}, {length}] (or [1, {length}])")
    if window is not None and window < 1:
        raise ValueError(f"attention: window={window}; it must be at least 1, or None for no window")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"attention: softcap={softcap}; it must be positive, or None for no cap")
    if sinks is not None and sinks.shape != (N,):
        raise ValueError(f"attention: sinks have shape {sinks.shape}; one number per query head is needed, [{N}]")
    if slopes is not None and (slopes.shape != (N,) or softcap is not None):
        raise ValueError(f"attention: slopes have shape {slopes.shape} and softcap={softcap}; one slope per query head is needed, [{N}], and no soft-cap beside them")
    if in_order and S != T:
        raise ValueError(f"attention: in_order=True with {T} queries and {S} keys; it promises that both are the same tokens, so T must equal S")
    return Pattern(causal, window, in_order)
