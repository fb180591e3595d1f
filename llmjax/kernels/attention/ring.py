"""Attention over a row that lies on several devices: ring attention, with the causal work spread evenly, and the all-to-all form. Both run inside a `jax.shard_map` over `axis`.

`ring`     keys and values travel from neighbour to neighbour, every device adds what its queries see of them to an online softmax (Liu et al. 2023, arXiv:2310.01889).
           Causal rows lie in zigzag: cut into 2n chunks, device i holds chunks i and 2n − 1 − i, so that each step is the same work everywhere, two pairs of chunks
           that see each other whole (Llama 3, arXiv:2407.21783, section 3.3.2). The backward pass sends keys and values round again, their gradients with them.
`ulysses`  two exchanges turn a piece of the row with all heads into the whole row with a share of the heads and back (Jacobs et al. 2023, arXiv:2309.14509).

Legend: B batch, t tokens of a device, c = t / 2 tokens of a chunk, N query heads, K kv heads, G queries per kv head, H head dim; n devices along the axis.
"""
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llmjax.kernels.attention import long
from llmjax.kernels.attention.mask import Pattern, check, whereabouts
from llmjax.kernels.attention.scores import Sum

TILE = 512
KEPT = ("ring_out", "ring_lse")  # names of what the backward pass wants: a remat policy that saves them does not send the keys round a second time


def ring(q, k, v, *, axis: str | tuple[str, ...], zigzag: bool, query_positions=None, key_positions=None, query_segments=None, key_segments=None,
         causal: bool, in_order: bool, window: int | None, softcap: float | None, scale: float, sinks=None, slopes=None) -> jax.Array:
    """The sum of `reference` over the whole row, for this device's queries: q [B, t, N, H], k [B, t, K, H], v [B, t, K, Hv] -> [B, t, N, Hv] in `q.dtype`.

    The arguments are this device's pieces. zigzag: they lie in zigzag order; otherwise they are neighbouring pieces of the row, which a causal call brings into zigzag and back.
    in_order: the row is in order (document by document, positions counting up). Gradients for q, k, v and sinks in reverse mode. Raises ValueError (mask.check; an odd t).
    """
    n, t = jax.lax.axis_size(axis), q.shape[1]
    check(q, k, v, query_positions, key_positions, query_segments, key_segments, causal, in_order, window, softcap, sinks, slopes)
    if not in_order:
        raise ValueError("ring attention wants queries and keys that are the same tokens, in order; use blockwise with a cache")
    if causal and t % 2:
        raise ValueError(f"ring attention cuts each device's {t} tokens into two equal chunks; make the context a multiple of {2 * n}")
    if query_positions is None:
        query_positions = key_positions = (jax.lax.axis_index(axis) * t + jnp.arange(t, dtype=jnp.int32))[None]
    where = whereabouts(q, k, query_positions, key_positions, query_segments, key_segments)
    turn = causal and not zigzag
    if turn:
        q, k, v, *where = (None if x is None else exchange(x, axis) for x in (q, k, v, *where))
    B, _, N, H = q.shape
    K = k.shape[2]
    q = q.reshape(B, t, K, N // K, H).transpose(0, 2, 3, 1, 4)
    sinks, slopes = (None if x is None else x.astype(jnp.float32).reshape(K, N // K) for x in (sinks, slopes))
    total = Sum(Pattern(causal, window, False), softcap, scale)
    out = _ring((total, axis, n), q, k.astype(q.dtype).swapaxes(1, 2), v.astype(q.dtype).swapaxes(1, 2), sinks, slopes, tuple(where))
    out = out.transpose(0, 3, 1, 2, 4).reshape(B, t, N, v.shape[-1])
    return exchange(out, axis, back=True) if turn else out


def ulysses(implementation, q, k, v, *, axis: str | tuple[str, ...], query_positions=None, key_positions=None, query_segments=None, key_segments=None, sinks=None,
            slopes=None, **settings) -> jax.Array:
    """`implementation` over whole rows with a share of the heads: arguments and result as `ring`'s, in neighbouring pieces. N must be a multiple of n and K of n, or n of K (each
    kv head is then repeated to fill its devices). Raises ValueError where they are not."""
    n, K = jax.lax.axis_size(axis), k.shape[2]
    if q.shape[2] % n or (K % n and n % K):
        raise ValueError(f"ulysses attention: {q.shape[2]} query heads and {K} kv heads of a device do not divide over {n} devices; use compute.sequence='ring'")
    if K % n:
        k, v = (jnp.repeat(x, n // K, axis=2) for x in (k, v))
    q, k, v = (jax.lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True) for x in (q, k, v))
    whole = lambda x: None if x is None else jax.lax.all_gather(x, axis, axis=1, tiled=True)
    mine = lambda x: None if x is None else jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis) * (x.shape[0] // n), x.shape[0] // n)
    y = implementation(q, k, v, query_positions=whole(query_positions), key_positions=whole(key_positions), query_segments=whole(query_segments), key_segments=whole(key_segments),
                       sinks=mine(sinks), slopes=mine(slopes), **settings)
    return jax.lax.all_to_all(y, axis, split_axis=1, concat_axis=2, tiled=True)


def exchange(x: jax.Array, axis: str | tuple[str, ...], back: bool = False) -> jax.Array:
    """x [B, t, …], a device's piece of a row: from neighbouring pieces to zigzag, or `back`. Each device sends both of its chunks once."""
    n = jax.lax.axis_size(axis)
    home = lambda chunk: min(chunk, 2 * n - 1 - chunk)
    even, odd = ([(i, home(2 * i + which)) for i in range(n)] for which in (0, 1))
    first, second = jnp.split(x, 2, axis=1)
    straight = jax.lax.axis_index(axis) % 2 == 0                                  # device j's early chunk, j, is an even one
    if back:
        first, second = jnp.where(straight, first, second), jnp.where(straight, second, first)
        first, second = (jax.lax.ppermute(y, axis, [(to, source) for source, to in way]) for y, way in ((first, even), (second, odd)))
    else:
        first, second = (jax.lax.ppermute(y, axis, way) for y, way in ((first, even), (second, odd)))
        first, second = jnp.where(straight, first, second), jnp.where(straight, second, first)
    return jnp.concatenate([first, second], 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(how, q, k, v, sinks, slopes, where):
    return _forward(how, q, k, v, sinks, slopes, where)[0]


def _journeys(how, length) -> list[tuple[int, int]]:
    """-> (direction, steps): how far keys have to travel. A window looks back over a few chunks, which lie on devices near by on both sides of the zigzag."""
    total, _, n = how
    window, chunk = total.pattern.window, length // 2
    if total.pattern.causal and window is not None and (near := -(-(window - 1) // chunk)) * 2 < n - 1:
        return [(1, near), (-1, near)] if near else []
    return [(1, n - 1)] if n > 1 else []


def _halves(how, mine: int, step: Any, direction: int):
    """-> the pairs (static pattern, query chunk, key chunk) of one step; chunks are 0, 1 or a traced choice. `step` 0: this device's own keys."""
    total, _, n = how
    causal, window = total.pattern.causal, total.pattern.window
    if not causal:
        return [(total.pattern, None, None)]
    order = Pattern(True, window, True)
    whole = Pattern(False, None, False) if window is None else Pattern(True, window, False)
    if isinstance(step, int) and step == 0:
        return [(order, 0, 0), (order, 1, 1), (whole, 1, 0)]
    later = jnp.where((mine - direction * step) % n < mine, 0, 1)                  # the keys' early chunk lies before ours, or their late one before our late one
    return [(whole, 1, 0), (whole, later, later)]


def _cut(x, which, axis):
    """One of the two halves along an axis, or all of it."""
    if x is None or which is None:
        return x
    half = x.shape[axis] // 2
    return jax.lax.dynamic_slice_in_dim(x, which * half, half, axis)


def _add(x, y, which, axis):
    """x with y added to one of its halves."""
    if which is None:
        return x + y
    half = x.shape[axis] // 2
    return jax.lax.dynamic_update_slice_in_dim(x, jax.lax.dynamic_slice_in_dim(x, which * half, half, axis) + y, which * half, axis)


def _pair(total, pattern, queries, keys, which):
    """The arguments of a block product for one pair: (total, sides, q, k, v, slopes, where)."""
    (q, query_positions, query_segments), (k, v, key_positions, key_segments) = queries, keys
    i, j = which
    q, k, v = _cut(q, i, 3), _cut(k, j, 2), _cut(v, j, 2)
    where = _cut(query_positions, i, 1), _cut(key_positions, j, 1), _cut(query_segments, i, 1), _cut(key_segments, j, 1)
    side = lambda length: next(s for s in range(min(TILE, length), 0, -1) if length % s == 0)
    return Sum(pattern, total.softcap, total.scale), (side(q.shape[3]), side(k.shape[2])), q, k, v, where


def _shift(x, axis, n, by):
    return jax.tree.map(lambda y: jax.lax.ppermute(y, axis, [(i, (i + by) % n) for i in range(n)]), x)


def _forward(how, q, k, v, sinks, slopes, where):
    """-> out [B, K, G, t, Hv] in q's dtype, log-sum-exp float32 [B, K, G, t, 1] (+inf where nothing is seen)."""
    total, axis, n = how
    query_positions, key_positions, query_segments, key_segments = where
    mine, queries, home = jax.lax.axis_index(axis), (q, query_positions, query_segments), (k, v, key_positions, key_segments)

    def add(sums, keys, step, direction):
        out, lse = sums
        for pattern, i, j in _halves(how, mine, step, direction):
            part, sides, *arrays, where = _pair(total, pattern, queries, keys, (i, j))
            more, log = long.forward(part, sides, *arrays, None, slopes, where, dtype=jnp.float32)
            out, lse = _joined(out, lse, more, jnp.where(jnp.isposinf(log), -jnp.inf, log), i)
        return out, lse

    sums = jnp.zeros((*q.shape[:4], v.shape[-1]), jnp.float32), jnp.full((*q.shape[:4], 1), -jnp.inf, jnp.float32)
    sums = add(sums, home, 0, 1)
    for direction, steps in _journeys(how, q.shape[3]):
        def travel(carry, step, direction=direction):
            keys, sums = carry
            following = _shift(keys, axis, n, direction)                            # on its way while this step is computed
            return (following, add(sums, keys, step, direction)), None
        keys = _shift(home, axis, n, direction)
        (keys, sums), _ = jax.lax.scan(travel, (keys, sums), jnp.arange(1, steps)) if steps > 1 else ((keys, sums), None)
        sums = add(sums, keys, jnp.int32(steps), direction)
    out, lse = sums
    if sinks is not None:
        sink = jnp.broadcast_to(sinks[None, :, :, None, None], lse.shape)
        whole = jnp.logaddexp(lse, sink)
        out, lse = out * jnp.exp(lse - whole), whole
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse)
    return checkpoint_name(out.astype(q.dtype), KEPT[0]), checkpoint_name(lse, KEPT[1])


def _joined(out, lse, more, log, which):
    """Two parts of a softmax's sum as one; the second covers all queries or one half of them. -inf: nothing seen."""
    a, b = _cut(lse, which, 3), log
    both = jnp.logaddexp(a, b)
    safe = jnp.where(jnp.isneginf(both), 0.0, both)
    new = _cut(out, which, 3) * jnp.exp(a - safe) + more * jnp.exp(b - safe)
    if which is None:
        return new, both
    put = lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, which * (x.shape[3] // 2), 3)
    return put(out, new), put(lse, both)


def _keep(how, q, k, v, sinks, slopes, where):
    out, lse = _forward(how, q, k, v, sinks, slopes, where)
    return out, (q, k, v, sinks, slopes, where, out, lse)


def _backward(how, kept, g):
    total, axis, n = how
    q, k, v, sinks, slopes, where, out, lse = kept
    query_positions, key_positions, query_segments, key_segments = where
    mine, queries, home = jax.lax.axis_index(axis), (q, query_positions, query_segments), (k, v, key_positions, key_segments)

    def add(dq, dk, dv, keys, step, direction):
        for pattern, i, j in _halves(how, mine, step, direction):
            part, sides, *arrays, where = _pair(total, pattern, queries, keys, (i, j))
            found = long.backward(part, sides, (*arrays, None, slopes, where, _cut(out, i, 3), _cut(lse, i, 3)), _cut(g, i, 3), dtype=jnp.float32)
            dq, dk, dv = _add(dq, found[0], i, 3), _add(dk, found[1], j, 2), _add(dv, found[2], j, 2)
        return dq, dk, dv

    zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
    dq, dk, dv = add(zeros(q), zeros(k), zeros(v), home, 0, 1)
    for direction, steps in _journeys(how, q.shape[3]):
        def travel(carry, step, direction=direction):
            keys, grads, dq = carry
            following = _shift(keys, axis, n, direction)
            dq, *grads = add(dq, *grads, keys, step, direction)
            return (following, _shift(grads, axis, n, direction), dq), None
        keys, grads = _shift(home, axis, n, direction), [zeros(k), zeros(v)]
        (keys, grads, dq), _ = jax.lax.scan(travel, (keys, grads, dq), jnp.arange(1, steps)) if steps > 1 else ((keys, grads, dq), None)
        dq, *grads = add(dq, *grads, keys, jnp.int32(steps), direction)
        more = _shift(grads, axis, n, -steps * direction)
        dk, dv = dk + more[0], dv + more[1]
    delta = (g.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
    dsinks = None if sinks is None else -(jnp.exp(sinks[None, :, :, None, None] - lse) * delta).sum((0, 3, 4))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dsinks, None, None


_ring.defvjp(_keep, _backward)
