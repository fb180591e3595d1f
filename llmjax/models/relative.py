"""Relative positions as a bias on attention's scores: T5's buckets, DeBERTa's disentangled terms.

A stack has one table; what all its layers share is worked out once per call (`Distances`, kept in the Context).
Legend: B batch, T query length, S key length, N heads, H head dim, D embed, P rows of DeBERTa's table.
"""
from __future__ import annotations

import dataclasses as dc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass

from llmjax.core import take
from llmjax.core.positions import Disentangled, RelativeBuckets


@register_dataclass
@dc.dataclass(frozen=True)
class Distances:
    """Of RelativeBuckets: bias [B or 1, N, T, S] float32. Of Disentangled: rows [P, D], and index [B or 1, T, S] int32, which of them stands for a query and a key."""
    bias: jax.Array | None = None
    rows: jax.Array | None = None
    index: jax.Array | None = None


def bucket_table(spec: RelativeBuckets, causal: bool) -> np.ndarray:
    """The bucket of each distance key - query from -max_distance to max_distance. As in T5: half of the buckets are exact, the others logarithmic. Computed on the host in float32: where
    a logarithm is a whole number, a last digit would change the bucket."""
    count = spec.buckets if causal else spec.buckets // 2
    exact = count // 2
    far = np.arange(spec.max_distance + 1)
    ratio = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(exact)) / np.float32(np.log(spec.max_distance / exact)) * np.float32(count - exact)
    near = np.where(far < exact, far, np.minimum(exact + ratio.astype(np.int32), count - 1))
    ahead = np.zeros_like(near[1:]) if causal else near[1:] + count
    return np.concatenate([near[::-1], ahead]).astype(np.int32)


def bucket_bias(spec: RelativeBuckets, causal: bool, table: Any, query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
    """table [buckets, N], positions [B or 1, T] and [B or 1, S] -> [B or 1, N, T, S] float32."""
    reach = spec.max_distance
    distance = jnp.clip(key_positions[:, None, :] - query_positions[:, :, None], -reach, reach) + reach
    return take(table, jnp.asarray(bucket_table(spec, causal))[distance], jnp.float32).transpose(0, 3, 1, 2)


def row_table(spec: Disentangled) -> np.ndarray:
    """The row of each distance query - key from -max_distance to max_distance (He et al. 2021, eq. 3; logarithmic as in DeBERTa v2's code), in float32 on the host as above."""
    far = np.arange(spec.max_distance + 1)
    if spec.logarithmic:
        middle = spec.span // 2
        ratio = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(middle)) / np.log(np.float32((spec.max_distance - 1) / middle)) * np.float32(middle - 1)
        far = np.where(far <= middle, far, np.ceil(ratio).astype(np.int32) + middle)
    return np.clip(np.concatenate([-far[:0:-1], far]) + spec.span, 0, 2 * spec.span - 1).astype(np.int32)


def row_index(spec: Disentangled, query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
    """-> [B or 1, T, S] int32."""
    reach = spec.max_distance
    distance = jnp.clip(query_positions[:, :, None] - key_positions[:, None, :], -reach, reach) + reach
    return jnp.asarray(row_table(spec))[distance]


def disentangled(q: jax.Array, k: jax.Array, pq: jax.Array | None, pk: jax.Array | None, distances: Distances, scale: float) -> jax.Array:
    """Position to content and content to position (He et al. 2021, eq. 4). q [B, T, N, H], k [B, S, N, H]; pq, pk [P, N, H] or None -> [B, N, T, S] float32."""
    index = distances.index
    assert index is not None
    bias = jnp.zeros((), jnp.float32)
    if pk is not None:
        scores = jnp.einsum("btnh,pnh->bntp", q, pk, preferred_element_type=jnp.float32)
        bias = bias + jnp.take_along_axis(scores, index[:, None], -1)
    if pq is not None:
        scores = jnp.einsum("bsnh,pnh->bnsp", k, pq, preferred_element_type=jnp.float32)
        bias = bias + jnp.take_along_axis(scores, index.swapaxes(1, 2)[:, None], -1).swapaxes(-1, -2)
    return scale * bias
