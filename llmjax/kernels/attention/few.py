"""A few queries over the keys and values that a cache holds, on a CPU, by our own machine code (`core/native`): one call a layer that costs what the queries see, where XLA runs a dozen
programs and a branch (measured within a step, float32, two cores, one row, 9 query and 3 kv heads of 64 over 192 slots: 130 -> 30 microseconds)."""
from typing import Any

import jax
import jax.numpy as jnp

from llmjax.core import native
from llmjax.core.platform import partitioned, platform
from llmjax.kernels.attention.mask import visible, whereabouts

MOST = 128            # queries a row: measured (9 and 3 heads of 64, 32 and 8 of 128), 16 to 128 of them take 0.48 to 0.76 of the time of XLA's programs over pages, 0.3 to 1.25 over slots


def fits(q: jax.Array, k: Any, v: Any, *, width: int | None, softcap: float | None, slopes: jax.Array | None) -> bool:
    """Whether these can answer q [B, T, N, H] over k, v [P, page, K, …] here: arrays of one float dtype, dims of whole vectors, no cap and no slopes."""
    if platform() != "cpu" or partitioned() or q.shape[1] > MOST or softcap is not None or slopes is not None or not isinstance(k, jax.Array) or not isinstance(v, jax.Array):
        return False
    whole = all(size % native.WIDTH == 0 for size in (q.shape[-1], v.shape[-1] if width is None else width))
    return whole and k.dtype == v.dtype and k.dtype in (jnp.float32, jnp.bfloat16) and native.available()


def few(q: jax.Array, k: Any, v: Any, *, query_positions=None, key_positions=None, query_segments=None, key_segments=None,
        causal: bool, window: int | None, scale: float, sinks: jax.Array | None = None, width: int | None = None) -> jax.Array:
    """The sum of `reference`, same arguments and zeros; not differentiable. q [B, T, N, H], k [B, S, K, H], v [B, S, K, Hv] -> [B, T, N, Hv] in `q.dtype`. width: see `few_in_pages`."""
    see = visible(*whereabouts(q, k, query_positions, key_positions, query_segments, key_segments), causal=causal, window=window)
    return few_in_pages(q, k, v, jnp.arange(q.shape[0], dtype=jnp.int32)[:, None], see, scale=scale, sinks=sinks, width=width)


def few_in_pages(q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array, see: jax.Array, *, scale: float, sinks: jax.Array | None = None, width: int | None = None) -> jax.Array:
    """The sum of `reference` over the slots that `see` [B, T, S] names; zeros for a query that sees none. Not differentiable.

    q [B, T, N, H]; k [P, page, K, H], v [P, page, K, Hv]; slot s of row b lies in page table[b, s // page], int32 [B, W], entries beyond what is seen may be anything. width: values are
    the first so many numbers of keys (v is not read). sinks [N]: see `reference`. -> [B, T, N, Hv] in `q.dtype`; all sums are float32.
    """
    see = jnp.pad(jnp.broadcast_to(see, (*q.shape[:2], see.shape[2])), [(0, 0), (0, 0), (0, -see.shape[2] % native.WIDTH)])
    sinks = jnp.full((q.shape[2],), -jnp.inf, jnp.float32) if sinks is None else sinks.astype(jnp.float32)
    out = native.few_queries(q.astype(jnp.float32) * scale, k, v if width is None else k, jnp.clip(table, 0, k.shape[0] - 1), see, sinks, v.shape[-1] if width is None else width)
    return out.astype(q.dtype)
