"""From products to probabilities: what the short and the long form of blockwise attention share."""
import dataclasses

import jax.numpy as jnp

from llmjax.core.contract import accumulate
from llmjax.kernels.attention.mask import Pattern, visible


@dataclasses.dataclass(frozen=True)
class Sum:
    """The static part of one attention call, hashable."""

    pattern: Pattern
    softcap: float | None
    scale: float

    def cap(self, scores):
        return scores if self.softcap is None else self.softcap * jnp.tanh(scores / self.softcap)

    def slope(self, capped):
        """d cap(s) / d s, from cap(s)."""
        return 1.0 if self.softcap is None else 1.0 - jnp.square(capped / self.softcap)

    def scores(self, q, k, slopes, where):
        """q [B, K, G, t, H], k [B, K, s, H], slopes [K, G] or None, where: positions and segments of these t queries and s keys -> float32 [B, K, G, t, s], -inf where a query
        does not see a key."""
        return self.seen(self.cap(self.products(q, k)), slopes, where)

    def seen(self, scores, slopes, where):
        """scores [B, K, G, t, s] less slope × distance, -inf where a query does not see a key."""
        see = visible(*where, causal=self.pattern.causal, window=self.pattern.window)
        if slopes is not None:
            distance = jnp.abs(where[0][:, :, None] - where[1][:, None, :]).astype(jnp.float32)
            scores = scores - slopes[None, :, :, None, None] * distance[:, None, None]
        return jnp.where(see[:, None, None], scores, -jnp.inf)

    def products(self, q, k):
        """-> scale q·k, float32 [B, K, G, t, s]; the queries of a kv head are one long axis, so that keys are never repeated."""
        return spread(accumulate("bkph,bksh->bkps", gather(q), k), q) * self.scale


def gather(x):
    """[B, K, G, t, h] -> [B, K, G t, h]."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def spread(x, like):
    """[B, K, G t, h] -> [B, K, G, t, h], G and t as in `like`."""
    return x.reshape(*like.shape[:4], x.shape[-1])


def take(where, queries, keys):
    """Positions and segments of a slice of the queries and a slice of the keys."""
    query_positions, key_positions, query_segments, key_segments = where
    if query_segments is not None:
        query_segments, key_segments = query_segments[:, queries], key_segments[:, keys]
    return query_positions[:, queries], key_positions[:, keys], query_segments, key_segments


def gather_turned(x):
    """[B, K, G, h, t] -> [B, K, h, G t]."""
    return x.swapaxes(2, 3).reshape(*x.shape[:2], x.shape[3], -1)


def exponentials(scores, sinks):
    """scores [B, K, G, t, s] (-inf: unseen), sinks [K, G] or None -> exp(scores - top), their sum with the sink's (1 where it would be 0) and top, both [B, K, G, t, 1].

    No NaN in rows that see nothing: their exponentials are zeros.
    """
    top = scores.max(-1, keepdims=True)
    if sinks is not None:
        top = jnp.maximum(top, sinks[None, :, :, None, None])
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    weights = jnp.exp(scores - top)
    denominator = weights.sum(-1, keepdims=True)
    if sinks is not None:
        denominator = denominator + jnp.exp(sinks[None, :, :, None, None] - top)
    return weights, jnp.where(denominator == 0, 1.0, denominator), top
