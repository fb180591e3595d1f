"""Local and global attention (Longformer: Beltagy et al. 2020, arXiv:2004.05150, section 3.1; BigBird: Zaheer et al. 2020, arXiv:2007.14062, the construction with global tokens inside
the text): a token sees its window and the first `globals` tokens of its document; those see, and are seen by, all of the document.

Tokens go in blocks as long as the window. A block of queries meets the blocks beside it, and the global keys of the one document that may have begun before them; a block of keys meets the
global queries of that document. So work and memory grow with T · (window + globals). `dense` is the slow twin.

Legend: B batch, T query length, S key length, C blocks, L tokens of a block, E keys one block meets, U globals, N query heads, K kv heads, G queries per kv head, H head dim.
"""
import jax
import jax.numpy as jnp

from llmjax.kernels.attention.mask import check, visible, whereabouts
from llmjax.kernels.recurrence import documents

NEVER = -1e30          # a score that is not seen: finite, so that no difference of two is NaN


def sees(query_positions, key_positions, query_segments, key_segments, *, causal: bool, window: int, globals: int) -> jax.Array:
    """-> bool [B, T, S]: `mask.visible` without a window, and near, or either of the two global (its position below `globals`)."""
    near = visible(query_positions, key_positions, causal=causal, window=window)
    either = (query_positions < globals)[:, :, None] | (key_positions < globals)[:, None, :]
    return visible(query_positions, key_positions, query_segments, key_segments, causal=causal, window=None) & (near | either)


def sparse(q, k, v, *, query_positions=None, key_positions=None, query_segments=None, key_segments=None, causal: bool, in_order: bool, window: int, globals: int,
           softcap: float | None, scale: float) -> jax.Array:
    """The sum of `dense`, same arguments; differentiable. q [B, T, N, H], k, v [B, S, K, H] -> [B, T, N, H] in `q.dtype`; a query that sees nothing gives zeros.

    in_order: queries and keys are the same tokens, those of a document next to each other but for padding. Otherwise the keys are a cache in which position p stands at p, and each
    query picks its window and the globals out of it. Raises ValueError for a cache without causal, and for wrong arguments (mask.check).
    """
    check_globals(globals, window)
    check(q, k, v, query_positions, key_positions, query_segments, key_segments, causal, in_order, window, softcap, None)
    if not in_order and not causal:
        raise ValueError("sparse attention over a cache is causal; a bidirectional model takes all its tokens at once")
    where = whereabouts(q, k, query_positions, key_positions, query_segments, key_segments)
    (B, T, N, H), K = q.shape, k.shape[2]
    q = q.reshape(B, T, K, N // K, H)
    cap = lambda s: s if softcap is None else softcap * jnp.tanh(s / softcap)

    def partial(q, k, v, see):
        """q [B, t, K, G, H], k, v [B, s, K, H], see [B, t, s] -> the largest score, the sum of exponentials, both [B, t, K, G], and of exponentials times values, [B, t, K, G, H]."""
        s = cap(jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * scale)
        s = jnp.where(see[:, None, None], s, NEVER)
        top = jax.lax.stop_gradient(s.max(-1, keepdims=True))
        p = jnp.where(see[:, None, None], jnp.exp(s - top), 0)
        return tuple(x.transpose(0, 3, 1, 2) for x in (top[..., 0], p.sum(-1))) + (jnp.einsum("bkgts,bskh->btkgh", p.astype(q.dtype), v, preferred_element_type=jnp.float32),)
    rule = dict(causal=causal, window=window, globals=globals)
    _, norm, out = _blocks(partial, q, k, v, where, rule) if in_order else _picked(partial, q, k, v, where, rule)
    return (out / jnp.where(norm > 0, norm, 1.0)[..., None]).reshape(B, T, N, v.shape[-1]).astype(q.dtype)


def _blocks(partial, q, k, v, where, rule):
    """Queries and keys in order: blocks in a loop whose backward pass makes each block's scores again."""
    (B, T), L, U = q.shape[:2], rule["window"], rule["globals"]
    positions, segments = where[0], where[2]
    positions = jnp.broadcast_to(positions, (B, T))
    segments = jnp.ones((B, T), jnp.int32) if segments is None else jnp.broadcast_to(segments, (B, T))
    numbers = documents(segments, jnp.zeros((B,), jnp.int32))[0]
    changed = jnp.diff(numbers, axis=1, prepend=0) > 0
    begins = jax.lax.cummax(jnp.where(changed, jnp.arange(T)[None], 0), axis=1)                          # where the document of each token begins
    count = -(-T // L)
    after = 0 if rule["causal"] else L
    fill = lambda x: jnp.pad(x, [(0, 0), (L, count * L - T + after), *((0, 0),) * (x.ndim - 2)])           # one block before, so that each has a left neighbour
    wide = [fill(x) for x in (k, v, positions, segments)]
    tokens = [fill(x) for x in (q, positions, segments)]
    rows = jnp.arange(B)[:, None]

    @jax.checkpoint
    def one(c):
        near = lambda x: jax.lax.dynamic_slice_in_dim(x, c * L, 2 * L + after, 1)
        own = lambda x: jax.lax.dynamic_slice_in_dim(x, (c + 1) * L, L, 1)
        first = (c - 1) * L                                                                               # the first key beside this block
        far = jnp.where(first > 0, jnp.take_along_axis(begins, jnp.full((B, 1), jnp.maximum(first, 0)), 1), T) + jnp.arange(U)[None]      # [B, U]
        met, far = far < first, jnp.minimum(far, T - 1)
        at = lambda x: x[rows, far]
        far_segments = jnp.where(met, at(segments), 0)
        keys = [jnp.concatenate([near(x), y], 1) for x, y in zip(wide, (at(k), at(v), at(positions), far_segments))]
        mine = [own(x) for x in tokens]
        local = partial(mine[0], keys[0], keys[1], sees(mine[1], keys[2], mine[2], keys[3], **rule))
        if rule["causal"]:                                                                                # a global query sees only what came before it, and that is global too
            return local, None
        see = sees(at(positions), own(wide[2]), far_segments, own(wide[3]), **rule) & (at(positions) < U)[..., None]
        return local, (partial(at(q), own(wide[0]), own(wide[1]), see), jnp.where(met, far, T))
    local, distant = jax.lax.map(one, jnp.arange(count))
    whole = [jnp.moveaxis(x, 0, 1).reshape(B, -1, *x.shape[3:])[:, :T] for x in local]
    return whole if distant is None else _merged(whole, *distant)


def _merged(whole, parts, far):
    """The sums over blocks beside a query and those over blocks far from it. whole: [B, T, …]; parts: [C, B, U, …] for the queries at `far` [C, B, U] (T: none)."""
    top, norm, out = whole
    far = jnp.moveaxis(far, 0, 1).reshape(out.shape[0], -1)                                               # [B, C U]
    parts = [jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]) for x in parts]
    rows = jnp.arange(out.shape[0])[:, None]
    highest = top.at[rows, far].max(parts[0], mode="drop")
    here, there = jnp.exp(top - highest), jnp.exp(parts[0] - highest.at[rows, far].get(mode="clip"))
    there = jnp.minimum(there, 1.0)                                                                       # those that go nowhere may not overflow
    return highest, (norm * here).at[rows, far].add(parts[1] * there, mode="drop"), (out * here[..., None]).at[rows, far].add(parts[2] * there[..., None], mode="drop")


def _picked(partial, q, k, v, where, rule):
    """Each query with the keys it may see, picked out of a cache of S slots in which position p stands at p."""
    (B, T), S, W, U = q.shape[:2], k.shape[1], rule["window"], rule["globals"]
    query_positions, key_positions, query_segments, key_segments = (None if x is None else jnp.broadcast_to(x, (B, x.shape[1])) for x in where)
    if query_segments is None:
        query_segments, key_segments = jnp.ones((B, T), jnp.int32), jnp.ones((B, S), jnp.int32)
    rows = jnp.arange(B)[:, None]

    def one(t):
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, t, 1, 1)
        newest = cut(query_positions)                                                                     # [B, 1]
        near = newest - jnp.arange(W)[None]
        early = jnp.broadcast_to(jnp.arange(U)[None], (B, U))
        slot = jnp.concatenate([near, early], 1)
        there = jnp.concatenate([near >= 0, early <= newest - W], 1) & (slot < S)
        slot = jnp.clip(slot, 0, S - 1)
        at = lambda x: x[rows, slot]
        see = sees(newest, at(key_positions), cut(query_segments), jnp.where(there, at(key_segments), 0), **rule)
        return partial(cut(q), at(k).astype(q.dtype), at(v).astype(q.dtype), see)
    return [jnp.moveaxis(x[:, :, 0], 0, 1) for x in jax.lax.map(one, jnp.arange(T))]


def dense(q, k, v, *, query_positions=None, key_positions=None, query_segments=None, key_segments=None, causal: bool, in_order: bool, window: int, globals: int,
          softcap: float | None, scale: float) -> jax.Array:
    """The slow twin: all scores [T, S] in float32. Arguments as `sparse`; the cache may be any."""
    check_globals(globals, window)
    check(q, k, v, query_positions, key_positions, query_segments, key_segments, causal, in_order, window, softcap, None)
    (B, T, N, H), K = q.shape, k.shape[2]
    grouped = q.reshape(B, T, K, N // K, H).astype(jnp.float32)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k.astype(jnp.float32), precision="highest") * scale
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    see = sees(*whereabouts(q, k, query_positions, key_positions, query_segments, key_segments), causal=causal, window=window, globals=globals)[:, None, None]
    probs = jax.nn.softmax(jnp.where(see, scores, NEVER), -1) * see
    return jnp.einsum("bkgts,bskh->btkgh", probs, v.astype(jnp.float32), precision="highest").reshape(B, T, N, v.shape[-1]).astype(q.dtype)


def check_globals(globals: int, window: int | None) -> None:
    """Raises ValueError where there is no window or no global token: then it is another attention."""
    if globals < 1 or window is None:
        raise ValueError(f"sparse attention: globals={globals}, window={window}; both must be at least 1 (without globals any windowed attention will do)")
