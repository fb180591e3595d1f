"""Cross entropy over a large vocabulary, in chunks of tokens: logits of one chunk at a time, never [B, T, V]; and the log-probabilities of given tokens in the same way.

The gradient is made in the forward pass, while a chunk's logits are at hand: three products with the head instead of four, nothing kept but dx and the gradients of the head's
weights, and the backward pass only scales them. Nothing of that is computed when nobody differentiates. The batch axis is never cut, so a sharded batch stays where it is.

Legend: B batch, T length, t length of a chunk, D embed, V vocab.
"""
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.lax import dynamic_slice_in_dim as cut

from llmjax.core.platform import platform

CHUNK = 512  # positions of every row a chunk; on a CPU tokens a chunk, whose logits then stay near its caches


def chunked_cross_entropy(unembed: Callable, head_params, features: jax.Array, targets: jax.Array, weights: jax.Array, *,
                          label_smoothing: float = 0.0, z_loss: float = 0.0, chunk: int | None = None) -> tuple[jax.Array, jax.Array]:
    """-> (total, z_total), float32 sums over the tokens of w · (cross entropy + z_loss · log²Z) and, for the metrics and without a gradient, of its second term alone.

    Cross entropy against (1 − label_smoothing) one-hot + label_smoothing / V (arXiv:1512.00567 section 7); Z is the softmax's denominator (z-loss: PaLM, arXiv:2204.02311
    section 5). chunk: positions of every row at a time; None: 512, on a CPU as many as make 512 tokens.
    `unembed(head_params, x [B, t, D]) -> logits [B, t, V]`; features [B, T, D], targets int [B, T], weights float [B, T] (a target outside 0 … V − 1 is no token: give it
    weight 0).
    `head_params` may be the whole tree of a model: leaves that `unembed` does not read, and those that nobody differentiates, cost nothing. Differentiable in head_params,
    features and weights, in reverse mode, once. Raises ValueError on shapes that disagree and on label_smoothing outside [0, 1).
    """
    chunk = _check(features, targets, chunk, weights)
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"cross entropy: label_smoothing={label_smoothing}; it must be at least 0 and below 1")
    leaves, head = _open(unembed, head_params, features, chunk)
    return _loss(head, (label_smoothing, z_loss, chunk), leaves, features, targets, weights)


def chunked_logprobs(unembed: Callable, head_params, features: jax.Array, targets: jax.Array, *, chunk: int | None = None) -> jax.Array:
    """-> float32 [B, T], the log-probability of each target. Arguments as in `chunked_cross_entropy`; differentiable (a chunk's logits are made again in the backward pass)."""
    chunk = _check(features, targets, chunk)

    @jax.checkpoint
    def one(head_params, x, t):
        logits = unembed(head_params, x).astype(jnp.float32)
        return _pick(logits, t) - jax.nn.logsumexp(logits, -1)
    parts = _over_chunks(lambda carry, x, t: (carry, one(head_params, x, t)), None, chunk, features, targets)[1]
    return _join(parts, features.shape[1])


def _check(features, targets, chunk, *weights):
    for name, array in (("targets", targets), *zip(("weights",), weights)):
        if features.ndim != 3 or array.shape != features.shape[:2]:
            raise ValueError(f"cross entropy: features {list(features.shape)} and {name} {list(array.shape)}; they must be [B, T, D] and [B, T]")
    if chunk is None:
        return CHUNK if platform() != "cpu" else max(1, CHUNK // features.shape[0])
    if chunk < 1:
        raise ValueError(f"cross entropy: chunk={chunk}; it must be at least 1")
    return chunk


def _open(unembed, head_params, features, chunk):
    """-> (the arrays that unembed reads, a hashable `head(arrays, x) -> logits`). Arrays it closes over are among them, so that a gradient reaches them too."""
    leaves, tree = jax.tree.flatten(head_params)
    x = jax.ShapeDtypeStruct((features.shape[0], _lengths(features.shape[1], chunk)[1], features.shape[2]), features.dtype)
    closed = jax.make_jaxpr(lambda leaves, x: unembed(jax.tree.unflatten(tree, leaves), x))(leaves, x)
    read = {id(var) for equation in closed.jaxpr.eqns for var in equation.invars} | {id(var) for var in closed.jaxpr.outvars}
    used = [id(var) in read for var in closed.jaxpr.invars[:-1]]
    return (list(closed.consts), [leaf for leaf, keep in zip(leaves, used) if keep]), _Head(closed.jaxpr, tuple(used), tuple((leaf.shape, leaf.dtype) for leaf in leaves))


class _Head:
    """The traced unembed, as a function of the arrays it reads."""

    def __init__(self, jaxpr, used, shapes):
        self.jaxpr, self.used, self.shapes = jaxpr, used, shapes

    def __call__(self, arrays, x):
        consts, leaves = arrays
        leaves = iter(leaves)
        filled = [next(leaves) if keep else jnp.zeros(*shape) for keep, shape in zip(self.used, self.shapes)]  # zeros that no equation reads
        return jax.core.eval_jaxpr(self.jaxpr, consts, *filled, x)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss(head, settings, leaves, features, targets, weights):
    smoothing, z_loss, chunk = settings

    def one(sums, x, t, w):
        _, ce, z = _terms(head(leaves, x).astype(jnp.float32), t, smoothing, z_loss)
        return (sums[0] + (w * (ce + z)).sum(), sums[1] + (w * z).sum()), None
    return _over_chunks(one, (jnp.float32(0), jnp.float32(0)), chunk, features, targets, weights.astype(jnp.float32))[0]


def _forward(head, settings, leaves, features, targets, weights):
    smoothing, z_loss, chunk = settings
    learn = jax.tree.map(lambda p: p.perturbed and jnp.issubdtype(p.value.dtype, jnp.floating), leaves, is_leaf=_primal)
    leaves = jax.tree.map(lambda p: p.value, leaves, is_leaf=_primal)
    values, tree = jax.tree.flatten(leaves)
    flags = jax.tree.leaves(learn)
    wanted = [v for v, f in zip(values, flags) if f]
    features, targets, weights = features.value, targets.value, weights.value

    def merged(wanted):
        some = iter(wanted)
        return jax.tree.unflatten(tree, [next(some) if f else v for v, f in zip(values, flags)])

    def one(carry, x, t, w):
        total, z_total, grads = carry
        logits, pull = jax.vjp(lambda wanted, x: head(merged(wanted), x), wanted, x)
        log_z, ce, z = _terms(logits.astype(jnp.float32), t, smoothing, z_loss)
        probs = jnp.exp(logits.astype(jnp.float32) - log_z[..., None])
        hot = jax.lax.broadcasted_iota(t.dtype, logits.shape, 2) == t[..., None]
        slope = probs * (1.0 + 2.0 * z_loss * log_z[..., None]) - (1.0 - smoothing) * hot - smoothing / logits.shape[-1]
        more, dx = pull((slope * w[..., None]).astype(logits.dtype))
        grads = [a + b.astype(jnp.float32) for a, b in zip(grads, more)]
        return (total + (w * (ce + z)).sum(), z_total + (w * z).sum(), grads), (dx, ce + z)
    start = (jnp.float32(0), jnp.float32(0), [jnp.zeros(v.shape, jnp.float32) for v in wanted])
    (total, z_total, grads), (dx, each) = _over_chunks(one, start, chunk, features, targets, weights.astype(jnp.float32))
    grads = iter(g.astype(v.dtype) for g, v in zip(grads, wanted))
    grads = jax.tree.unflatten(tree, [next(grads) if f else None for f in flags])
    T = features.shape[1]
    return (total, z_total), (grads, _join(dx, T), _join(each, T).astype(weights.dtype))


def _backward(head, settings, kept, g):
    g = g[0]  # z_total is for the metrics
    if isinstance(g, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None
    grads, dx, dw = jax.tree.map(lambda a: (a * g).astype(a.dtype), kept)
    return grads, dx, None, dw


_loss.defvjp(_forward, _backward, symbolic_zeros=True)


def _primal(x):
    return isinstance(x, jax.custom_derivatives.CustomVJPPrimal)


def _terms(logits, targets, smoothing, z_loss):
    """float32 logits [B, t, V] -> log Z, cross entropy, z-loss, each [B, t]."""
    log_z = jax.nn.logsumexp(logits, -1)
    ce = log_z - (1.0 - smoothing) * _pick(logits, targets)
    if smoothing:
        ce = ce - smoothing * logits.mean(-1)
    return log_z, ce, z_loss * jnp.square(log_z)


def _pick(logits, targets):
    """logits[..., target], by comparison: a gather would need the whole vocabulary on one device. 0 for a target outside the vocabulary."""
    hot = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 2) == targets[..., None]
    return jnp.where(hot, logits, 0.0).sum(-1)


def _lengths(length, chunk):
    """-> (chunks, positions in each): as equal as can be, each at most `chunk`."""
    count = max(1, -(-length // chunk))
    return count, -(-length // count)


def _over_chunks(one, carry, chunk, *arrays):
    """Folds `one(carry, *parts) -> (carry, out)` over chunks of the second axis; -> carry, outs stacked on a leading axis. Rows filled in at the end are zeros (weight 0)."""
    length = arrays[0].shape[1]
    count, size = _lengths(length, chunk)
    if count * size > length:
        arrays = [jnp.pad(a, [(0, count * size - length if axis == 1 else 0) for axis in range(a.ndim)]) for a in arrays]
    if count == 1:
        carry, out = one(carry, *arrays)
        return carry, jax.tree.map(lambda a: a[None], out)
    return jax.lax.scan(lambda carry, i: one(carry, *(cut(a, i * size, size, 1) for a in arrays)), carry, jnp.arange(count))


def _join(parts, length):
    """[chunks, B, t, …] -> [B, T, …]."""
    joined = jnp.moveaxis(parts, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :length]
