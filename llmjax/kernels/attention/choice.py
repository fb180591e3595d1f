"""Which implementation `auto` means, and how one that the compiler cannot partition runs on a mesh."""
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llmjax.kernels.attention import cudnn as _cudnn
from llmjax.kernels.attention import splash as _splash
from llmjax.kernels.attention.blockwise import blockwise
from llmjax.kernels.attention.mask import Pattern
from llmjax.kernels.attention.reference import reference

IMPLEMENTATIONS: dict[str, Callable] = dict(reference=reference, blockwise=blockwise, cudnn=_cudnn.cudnn, splash=_splash.splash)


def choose(platform: str, name: str, q, v, *, causal: bool, in_order: bool, window: int | None, softcap: float | None, sinks, slopes=None, segments: bool, bias: bool = False) -> tuple[str, str]:
    """-> (implementation, reason) for `name`, "auto" or one of IMPLEMENTATIONS, from shapes and settings alone; never one whose memory grows with T S, unless it was asked for
    by name.

    A call with a `bias` on its scores is the one exception: the bias is as large as the scores, and only `reference` takes it.
    `q` [B, T, N, H] and `v` need only shapes and dtypes; `segments` says whether segment ids will be given. Raises ValueError for an unknown name, an implementation of
    another platform and for a call that the named one cannot do, with the reason.
    """
    if bias:
        if name not in ("auto", "reference"):
            raise ValueError(f"attention={name!r} takes no relative positions; use auto or reference")
        return "reference", "relative positions are a bias on every score, which no other implementation takes"
    wants = dict(cudnn="gpu", splash="tpu")
    refusals = dict(cudnn=_cudnn.refusal(q, v, softcap, sinks, slopes), splash=_splash.refusal(q, in_order, slopes))
    if name != "auto":
        if name not in IMPLEMENTATIONS:
            raise ValueError(f"attention={name!r}; allowed are auto, {', '.join(IMPLEMENTATIONS)}")
        if wants.get(name, platform) != platform:
            raise ValueError(f"attention={name!r} runs on a {wants[name].upper()}, this program is for a {platform.upper()}; use auto or blockwise")
        if refusals.get(name):
            raise ValueError(refusals[name])
        return name, "asked for"
    if q.shape[1] == 1 or platform == "cpu":
        return "blockwise", "one query" if q.shape[1] == 1 else "the CPU's"
    best = "splash" if platform == "tpu" else "cudnn"
    if refusals[best]:
        return "blockwise", str(refusals[best])
    if best == "cudnn" and not _cudnn.native(Pattern(causal, window, in_order), segments):
        return "blockwise", "cuDNN would need a mask of T x S bytes for segments, given positions or a two-sided window; ask for attention='cudnn' if that fits"
    return best, f"the {platform.upper()}'s own"


def sharded(implementation: Callable, *, batch: Sequence[str] = (), heads: Sequence[str] = (), length: Sequence[str] = ()) -> Callable:
    """-> a function of the same signature that runs `implementation` on each device's own rows and heads (`jax.shard_map` over all automatic axes of the ambient mesh).

    `batch` and `heads` name the mesh axes over which the batch and the heads are split, `length` those over which queries and keys are, for an implementation that knows of it;
    axes that the mesh lacks or that are manual already are left out. Where there are fewer kv heads than head shards, each is repeated to fill them. No mesh, or one device:
    `implementation` itself. Raises ValueError where batch, N, K or the length does not divide.
    """
    def call(q, k, v, *, query_positions=None, key_positions=None, query_segments=None, key_segments=None, sinks=None, slopes=None, **settings):
        mesh = jax.sharding.get_abstract_mesh()
        free = [] if mesh.empty else [axis for axis in mesh.axis_names if axis not in mesh.manual_axes]
        where = dict(query_positions=query_positions, key_positions=key_positions, query_segments=query_segments, key_segments=key_segments)
        if not free or mesh.size == 1:             # an automatic axis of one device counts: a TPU's kernel beside it is refused
            return implementation(q, k, v, **where, sinks=sinks, slopes=slopes, **settings)
        rows, cols, cuts = (tuple(axis for axis in axes if axis in free) for axes in (batch, heads, length))
        parts = math.prod(mesh.shape[axis] for axis in cols)
        K = k.shape[2]
        if K % parts and parts % K == 0:
            k, v = (jnp.repeat(x, parts // K, axis=2) for x in (k, v))
        for what, size, axes in (("batch", q.shape[0], rows), ("query heads", q.shape[2], cols), ("kv heads", k.shape[2], cols), ("tokens", q.shape[1], cuts)):
            if size % math.prod(mesh.shape[axis] for axis in axes):
                raise ValueError(f"attention: {size} {what} do not divide over mesh axes {dict((axis, mesh.shape[axis]) for axis in axes)}; change the mesh or the number")
        spread = lambda *axes: PartitionSpec(*(axis or None for axis in axes))
        part = {name: x for name, x in where.items() if x is not None}
        specs = {name: spread(rows if x.shape[0] > 1 else None, cuts) for name, x in part.items()}
        four = spread(rows, cuts, cols, None)

        def local(q, k, v, sinks, slopes, part):
            return implementation(q, k, v, sinks=sinks, slopes=slopes, **part, **settings)
        run = jax.shard_map(local, in_specs=(four, four, four, spread(cols), spread(cols), specs), out_specs=four, axis_names=set(free), check_vma=False)
        return run(q, k, v, sinks, slopes, part)
    return call
