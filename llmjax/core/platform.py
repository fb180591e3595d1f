"""Which platform a program is being traced for. Asked at trace time by whatever has more than one form: the contraction, the attention kernels, the grouped products."""
import math
from typing import Literal

import jax

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
