"""Which platform a program is being traced for. Asked at trace time by whatever has more than one form: the contraction, the attention kernels, the grouped products."""
import math
from typing import Any, Literal

import jax
from jax.extend.core import jaxprs_in_params

Platform = Literal["cpu", "gpu", "tpu"]


def platform() -> Platform:
    """-> "cpu", "gpu" or "tpu": the devices of the ambient mesh (`jax.set_mesh`), or jax's default backend where there is none.

    The mesh comes first because a program may be compiled for devices this machine does not have (a TPU topology lowered on a CPU host). Works inside jit, vmap, scan, shard_map.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name in ("cuda", "rocm", "gpu") else "tpu" if name == "tpu" else "cpu"


def partitioned() -> bool:
    """-> True where the compiler will partition this program: the ambient mesh has several devices along axes that no `shard_map` around has made manual."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and math.prod(size for name, size in mesh.shape.items() if name not in mesh.manual_axes) > 1


BLOCK = 24 * 2**20  # bytes: below the 32 MiB up to which glibc's malloc keeps freed memory for the next call


def compiler_options(traced: Any) -> dict[str, Any] | None:
    """Options for compiling a `jax.jit(f).trace(…)` that runs again and again, or None for none.

    On a CPU: XLA's one block of scratch memory, hundreds of megabytes that every call takes from the system page by page and gives back, is cut into pieces that malloc
    keeps (a train step of a 17 M model: 128,000 page faults before, 4,000 to 40,000 after, a sixth less CPU time). No piece is smaller than the program's largest array.
    """
    return {"xla_multiheap_size_constraint_per_heap": max(BLOCK, largest(traced.jaxpr.jaxpr))} if platform() == "cpu" else None


def largest(jaxpr: Any) -> int:
    """Bytes of the largest array that a jaxpr makes, those inside its loops and calls included."""
    sizes = [math.prod(v.aval.shape) * v.aval.dtype.itemsize for e in jaxpr.eqns for v in e.outvars if isinstance(v.aval, jax.core.ShapedArray)]
    return max(sizes + [largest(inner) for e in jaxpr.eqns for inner in jaxprs_in_params(e.params)], default=0)
