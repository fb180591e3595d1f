"""Attention over few enough keys to keep every probability, in parts that are seen in different ways: what caches that give keys up need (models/evicting.py).

Legend: B batch, T query length, S keys of a part, N query heads, K kv heads, G queries per kv head, H head dim.
"""
import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from llmjax.core.contract import accumulate
from llmjax.kernels.attention.scores import exponentials


@dataclasses.dataclass(frozen=True)
class Part:
    """Keys k [B, S, K, H] and values v [B, S, K, Hv] with the queries q [B, T, N, H] that meet them; see bool and distance int32, both [B, K or 1, T, S]."""
    q: jax.Array
    k: jax.Array
    v: jax.Array
    see: jax.Array
    distance: jax.Array


def weighed(parts: Sequence[Part], *, softcap: float | None, scale: float, sinks: jax.Array | None = None, slopes: jax.Array | None = None) -> tuple[jax.Array, list[jax.Array]]:
    """One softmax over the keys of all parts (see `reference`; slopes fall with the parts' own distances). -> ([B, T, N, Hv] in q's dtype, of each part the probabilities
    [B, K, G, T, S] float32). A query that sees nothing gives zeros. O(T S) memory."""
    B, T, N, _ = parts[0].q.shape
    K = parts[0].k.shape[2]
    sinks, slopes = (None if x is None else x.astype(jnp.float32).reshape(K, N // K) for x in (sinks, slopes))

    def scores(part):
        q = part.q.reshape(B, T, K, N // K, -1).transpose(0, 2, 3, 1, 4)
        s = accumulate("bkgth,bskh->bkgts", q, part.k.astype(q.dtype)) * scale
        s = s if softcap is None else softcap * jnp.tanh(s / softcap)
        s = s if slopes is None else s - slopes[None, :, :, None, None] * jnp.abs(part.distance).astype(jnp.float32)[:, :, None]
        return jnp.where(part.see[:, :, None], s, -jnp.inf)
    weights, denominator, _ = exponentials(jnp.concatenate([scores(part) for part in parts], -1), sinks)
    ends = [sum(part.k.shape[1] for part in parts[:i + 1]) for i in range(len(parts) - 1)]
    probs = jnp.split(weights / denominator, ends, -1)
    dtype = parts[0].q.dtype
    out = jnp.zeros((), jnp.float32)
    for p, part in zip(probs, parts):
        out = out + accumulate("bkgts,bskh->bkgth", p.astype(dtype), part.v.astype(dtype))
    return out.astype(dtype).transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1), probs
