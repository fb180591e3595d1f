"""All kv heads as one, for few queries on a CPU: each query is widened with zeros to the width of all heads, so that only its own head's numbers count, and keys and values are read as they
lie in the cache. With the heads apart XLA's CPU products first turn the cache round, which costs more than the products (measured, float32, one query, two cores: 9 query and 3 kv heads
of 64 over 1,024 keys 3.9 times as fast, 32 and 8 of 128 over 2,048 twice, 32 and 32 over 512 twice)."""
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llmjax.core.platform import partitioned, platform

MOST = 64             # query heads times queries: the products cost K times as much


def pays(q: jax.Array, k: Any) -> bool:
    """Whether `merged` is the faster way for q [B, T, N, H] and k [..., K, H] on this platform. Quantised keys have scales of their own heads and cannot be merged."""
    return platform() == "cpu" and not partitioned() and isinstance(k, jax.Array) and k.shape[2] > 1 and q.shape[1] * q.shape[2] <= MOST


def widened(q: jax.Array, kv_heads: int) -> jax.Array:
    """q [B, T, N, H] -> [B, T, N, K·H]: each query at its own kv head's place, zeros elsewhere."""
    B, T, N, H = q.shape
    return jnp.where(own(kv_heads), q.reshape(B, T, kv_heads, N // kv_heads, 1, H), 0).reshape(B, T, N, -1)


def narrowed(out: jax.Array, kv_heads: int) -> jax.Array:
    """out [B, T, N, K·Hv] -> [B, T, N, Hv]: of each query's values those of its own kv head."""
    B, T, N, _ = out.shape
    return jnp.where(own(kv_heads), out.reshape(B, T, kv_heads, N // kv_heads, kv_heads, -1), 0).sum(4).reshape(B, T, N, -1)


def own(kv_heads: int) -> jax.Array:
    return jnp.eye(kv_heads, dtype=bool)[:, None, :, None]                                 # [K, 1, K, 1]


def merged(attention: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, *where: Any, **settings: Any) -> jax.Array:
    """attention(q, k, v, *where, **settings) with all kv heads as one. q [B, T, N, H], k [B, S, K, H], v [B, S, K, Hv] -> [B, T, N, Hv]; equal but for the order of sums."""
    K = k.shape[2]
    return narrowed(attention(widened(q, K), *(x.reshape(*x.shape[:2], 1, -1) for x in (k, v)), *where, **settings), K)
