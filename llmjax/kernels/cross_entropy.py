"""Cross entropy over a large vocabulary, in chunks of tokens: logits of one chunk at a time, never [B, T, V]; and the log-probabilities of given tokens in the same way.

The gradient is made in the forward pass, while a chunk's logits are at hand: three products with the head instead of four, nothing kept but dx and the gradients of the head's
weights, and the backward pass only scales them. Nothing of that is computed when nobody differentiates.

On a mesh every part of the batch and of the length (`Share`) goes through its own chunks: the head's weights are gathered once, before the chunks, in the dtype they are multiplied in,
and their gradients added up between devices once, after them.

Legend: B batch, T length, t length of a chunk, D embed, V vocab, r rows of the mesh (parts of the batch), c its columns (parts of the length).
"""
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.lax import dynamic_slice_in_dim as cut
from jax.sharding import PartitionSpec

from llmjax.core.mesh import RULES, mesh_axes
from llmjax.core.platform import platform

CHUNK = 1024  # tokens a chunk on each device: enough to be worth reading the head for, while their logits are small beside it
CHUNK_CPU = 512  # their logits stay near the caches


def chunked_cross_entropy(unembed: Callable, head_params, features: jax.Array, targets: jax.Array, weights: jax.Array, *,
                          label_smoothing: float = 0.0, z_loss: float = 0.0, chunk: int | None = None) -> tuple[jax.Array, jax.Array]:
    """-> (total, z_total), float32 sums over the tokens of w · (cross entropy + z_loss · log²Z) and, for the metrics and without a gradient, of its second term alone.

    Cross entropy against (1 − label_smoothing) one-hot + label_smoothing / V (arXiv:1512.00567 section 7); Z is the softmax's denominator (z-loss: PaLM, arXiv:2204.02311
    section 5). chunk: positions of every row at a time; None: as many as make 1,024 tokens on each device, on a CPU 512.
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
    share = _Share(features)
    return share.join(share.fold(lambda carry, x, t: (carry, one(head_params, x, t)), (), chunk, features, targets)[1])


def _check(features, targets, chunk, *weights):
    for name, array in (("targets", targets), *zip(("weights",), weights)):
        if features.ndim != 3 or array.shape != features.shape[:2]:
            raise ValueError(f"cross entropy: features {list(features.shape)} and {name} {list(array.shape)}; they must be [B, T, D] and [B, T]")
    if chunk is None:
        return max(1, (CHUNK_CPU if platform() == "cpu" else CHUNK) * _Share(features).rows // features.shape[0])
    if chunk < 1:
        raise ValueError(f"cross entropy: chunk={chunk}; it must be at least 1")
    return chunk


def _open(unembed, head_params, features, chunk):
    """-> (the arrays that unembed reads, a hashable `head(arrays, x) -> logits`). Arrays it closes over are among them, so that a gradient reaches them too."""
    leaves, tree = jax.tree.flatten(head_params)
    share = _Share(features)
    x = jax.ShapeDtypeStruct((features.shape[0] // share.rows, _lengths(features.shape[1] // share.columns, chunk)[1], features.shape[2]), features.dtype)
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

    def dtypes(self):
        """For each array it reads, the dtype it is cast to before anything else is done with it, or None."""
        def one(var):
            uses = [e for e in self.jaxpr.eqns if any(v is var for v in e.invars)]
            cast = {e.params["new_dtype"] if e.primitive.name == "convert_element_type" else None for e in uses}
            return cast.pop() if len(cast) == 1 and not any(v is var for v in self.jaxpr.outvars) else None
        return [one(var) for var in (*self.jaxpr.constvars, *(v for v, keep in zip(self.jaxpr.invars, self.used) if keep))]

    def gathered(self, values, vocab):
        """The arrays it reads, whole on every device but for the vocabulary's axis, in the dtype it casts them to."""
        def one(x, dtype):
            spec = PartitionSpec(*(PartitionSpec.UNCONSTRAINED if size == vocab else None for size in x.shape))
            return jax.lax.with_sharding_constraint(x if dtype is None else x.astype(dtype), spec)
        return [one(x, dtype) for x, dtype in zip(values, self.dtypes(), strict=True)]


class _Share:
    """What the ambient mesh makes of [B, T, …]: r parts of B and c of T. Where there is more than one, arrays become [r, c, B / r, T / c, …] and are worked on part by part."""

    def __init__(self, features):
        mesh, rules = jax.sharding.get_abstract_mesh(), dict(reversed(RULES))
        free = {} if mesh.empty else {axis: size for axis, size in mesh.shape.items() if size > 1 and axis not in mesh.manual_axes}
        found = [tuple(a for a in mesh_axes(rules[name]) if a in free) for name in ("batch", "length")]
        parts = [math.prod(free[a] for a in axes) for axes in found]
        whole = [size % count == 0 for size, count in zip(features.shape, parts)]
        self.axes = [axes if fits else () for axes, fits in zip(found, whole)]
        self.rows, self.columns = (count if fits else 1 for count, fits in zip(parts, whole))
        self.lead = 2 if self.rows * self.columns > 1 else 0
        self.length = features.shape[1]

    def pin(self, x):
        """An array of parts [r, c, …] with every part where its tokens are."""
        spec = [axes or None for axes in self.axes] + [PartitionSpec.UNCONSTRAINED] * (x.ndim - 2)
        return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec)) if self.lead else x

    def spread(self, x):
        if not self.lead:
            return x
        B, T = x.shape[:2]          # whole on every device of a part: where tensor parallelism divides a part's length further, each chunk would gather all of it
        x = x.reshape(self.rows, B // self.rows, self.columns, T // self.columns, *x.shape[2:]).swapaxes(1, 2)
        return jax.lax.with_sharding_constraint(x, PartitionSpec(*(axes or None for axes in self.axes)))

    def start(self, shape, dtype=jnp.float32):
        """Zeros to add a part's own sums to."""
        return self.pin(jnp.zeros((self.rows, self.columns, *shape), dtype)) if self.lead else jnp.zeros(shape, dtype)

    def total(self, x, dtype=jnp.float32):
        """The parts' sums added up, between devices in `dtype`."""
        return jax.lax.reduce(x.astype(dtype), jnp.zeros((), dtype), jax.lax.add, (0, 1)) if self.lead else x

    def each(self, one):
        return jax.vmap(jax.vmap(one)) if self.lead else one

    def fold(self, one, carry, chunk, *arrays):
        """`_over_chunks` of every part."""
        return _over_chunks(self.each(one), carry, chunk, *map(self.spread, arrays), axis=self.lead + 1)

    def join(self, parts):
        """[chunks, B, t, …], or [chunks, r, c, B / r, t, …] -> [B, T, …]."""
        joined = jnp.moveaxis(parts, 0, self.lead + 1)
        joined = joined.reshape(*joined.shape[: self.lead + 1], -1, *joined.shape[self.lead + 3 :])
        joined = cut(joined, 0, self.length // self.columns, self.lead + 1)
        return joined.swapaxes(1, 2).reshape(-1, self.length, *joined.shape[4:]) if self.lead else joined


def _in_parts(head, leaves, features):
    """-> (_Share, the arrays of `leaves` as the chunks want them, what gives `head` them back in their own dtypes)."""
    share, (values, tree) = _Share(features), jax.tree.flatten(leaves)
    held = head.gathered(values, head.jaxpr.outvars[0].aval.shape[-1]) if share.lead else values
    dtypes = [v.dtype for v in values]
    return share, held, lambda held: jax.tree.unflatten(tree, [x.astype(dtype) for x, dtype in zip(held, dtypes)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss(head, settings, leaves, features, targets, weights):
    smoothing, z_loss, chunk = settings
    share, held, own = _in_parts(head, leaves, features)

    def one(sums, x, t, w):
        _, ce, z = _terms(head(own(held), x).astype(jnp.float32), t, smoothing, z_loss)
        return (sums[0] + (w * (ce + z)).sum(), sums[1] + (w * z).sum()), None
    sums, _ = share.fold(one, (share.start(()), share.start(())), chunk, features, targets, weights.astype(jnp.float32))
    return share.total(sums[0]), share.total(sums[1])


def _forward(head, settings, leaves, features, targets, weights):
    smoothing, z_loss, chunk = settings
    learn = jax.tree.map(lambda p: p.perturbed and jnp.issubdtype(p.value.dtype, jnp.floating), leaves, is_leaf=_primal)
    leaves = jax.tree.map(lambda p: p.value, leaves, is_leaf=_primal)
    values, tree = jax.tree.flatten(leaves)
    flags = jax.tree.leaves(learn)
    features, targets, weights = features.value, targets.value, weights.value
    share, held, own = _in_parts(head, leaves, features)

    def merged(wanted):
        some = iter(wanted)
        return own([next(some) if f else v for v, f in zip(held, flags)])

    def one(carry, x, t, w):
        total, z_total, grads = carry
        wanted = [h.astype(v.dtype) for h, v, f in zip(held, values, flags) if f]
        logits, pull = jax.vjp(lambda wanted, x: head(merged(wanted), x), wanted, x)
        log_z, ce, z = _terms(logits.astype(jnp.float32), t, smoothing, z_loss)
        probs = jnp.exp(logits.astype(jnp.float32) - log_z[..., None])
        hot = jax.lax.broadcasted_iota(t.dtype, logits.shape, 2) == t[..., None]
        slope = probs * (1.0 + 2.0 * z_loss * log_z[..., None]) - (1.0 - smoothing) * hot - smoothing / logits.shape[-1]
        more, dx = pull((slope * w[..., None]).astype(logits.dtype))
        grads = [a + b.astype(a.dtype) for a, b in zip(grads, more)]
        return (total + (w * (ce + z)).sum(), z_total + (w * z).sum(), grads), (dx, ce + z)
    between = features.dtype if platform() == "tpu" and share.lead else jnp.float32          # what the other gradients cross the wires in, where they do
    start = (share.start(()), share.start(()), [share.start(v.shape, between) for v, f in zip(values, flags) if f])
    (total, z_total, grads), (dx, each) = share.fold(one, start, chunk, features, targets, weights.astype(jnp.float32))
    done = iter(share.total(g, between).astype(v.dtype) for g, v in zip(grads, [v for v, f in zip(values, flags) if f]))
    grads = jax.tree.unflatten(tree, [next(done) if f else None for f in flags])
    return (share.total(total), share.total(z_total)), (grads, share.join(dx), share.join(each).astype(weights.dtype))


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


def _over_chunks(one, carry, chunk, *arrays, axis):
    """Folds `one(carry, *parts) -> (carry, out)` over chunks of an axis; -> carry, outs stacked on a leading axis. Rows filled in at the end are zeros (weight 0)."""
    length = arrays[0].shape[axis]
    count, size = _lengths(length, chunk)
    if count * size > length:
        arrays = [jnp.pad(a, [(0, count * size - length if dim == axis else 0) for dim in range(a.ndim)]) for a in arrays]
    if count == 1:
        carry, out = one(carry, *arrays)
        return carry, jax.tree.map(lambda a: a[None], out)
    return jax.lax.scan(lambda carry, i: one(carry, *(cut(a, i * size, size, axis) for a in arrays)), carry, jnp.arange(count))
