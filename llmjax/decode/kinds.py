"""Kinds of caches by name, as a command line says them; what a cache will take before it is made, and where it lies on a mesh."""
from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmjax.core.errors import ConfigError, nearest
from llmjax.core.mesh import RULES, Rules, mesh_axes
from llmjax.core.tree import nbytes, path_name
from llmjax.decode.steps import FLOATS, init_cache, init_evicting, init_paged
from llmjax.kernels.attention.stored import QUANTIZED
from llmjax.models import Cache, Decoder, HeavyHitters, Streaming

PAGE = 16
NAMES = {"contiguous": "contiguous", "paged": "paged", "streaming": "streaming", "sinks": "streaming", "heavy": "heavy", "h2o": "heavy"}
WANTED = {"contiguous": "it has no numbers", "paged": "one number is wanted, as paged=16", "streaming": "two numbers are wanted, as streaming=4+1020",
          "heavy": "two numbers are wanted, as heavy=512+512"}


@dc.dataclass(frozen=True)
class Contiguous:
    """A slot for every position of a row; a layer with a window has a ring."""


@dc.dataclass(frozen=True)
class Paged:
    """Pages of `page` positions in one pool."""
    page: int = PAGE

    def __post_init__(self) -> None:
        if not isinstance(self.page, int) or self.page < 1:
            raise ConfigError(f"a cache of kind paged={self.page}: a page has at least 1 position")


Layout = Contiguous | Paged | Streaming | HeavyHitters
MADE: dict[str, Callable[..., Layout]] = {"contiguous": Contiguous, "paged": Paged, "streaming": Streaming, "heavy": HeavyHitters}


@dc.dataclass(frozen=True)
class CacheKind:
    """layout: where keys and values stand. dtype: what they are kept in, as in init_cache (None: the computing dtype)."""
    layout: Layout = Contiguous()
    dtype: Any = None

    @property
    def evicts(self) -> bool:
        return isinstance(self.layout, Streaming | HeavyHitters)

    @property
    def name(self) -> str:
        """What cache_kind reads as this."""
        numbers = "+".join(str(x) for x in dc.astuple(self.layout))
        layout = next(name for name, made in MADE.items() if made is type(self.layout)) + (f"={numbers}" if numbers else "")
        kept = None if self.dtype is None else self.dtype if isinstance(self.dtype, str) else str(jnp.dtype(self.dtype))
        return ",".join(x for x in (None if layout == "contiguous" and kept else layout, kept) if x)


Kind = str | CacheKind | Layout | None


def cache_kind(kind: Kind) -> CacheKind:
    """A name (see make_cache), a layout or a kind -> CacheKind; None is the contiguous one. Raises ConfigError for a name that there is not."""
    if not isinstance(kind, str):
        found = kind if isinstance(kind, CacheKind) else CacheKind(Contiguous() if kind is None else kind)
        if not isinstance(found.layout, Layout):
            raise ConfigError(f"cache={kind!r}: a name as \"int8\" or \"paged=16\", a layout (Contiguous, Paged, Streaming, HeavyHitters) or a CacheKind is wanted")
        return found
    layouts, dtypes = [], []
    for word in kind.split(","):
        name, _, value = word.strip().replace(":", "=").partition("=")
        if name in NAMES:
            layouts.append((NAMES[name], value))
        elif name in (*FLOATS, *QUANTIZED) and not value:
            dtypes.append(name)
        else:
            raise ConfigError(f"a cache of kind {word!r}: there is none" + nearest(name, (*NAMES, *FLOATS, *QUANTIZED)))
    if len(layouts) > 1 or len(dtypes) > 1:
        raise ConfigError(f"a cache of kind {kind!r}: one layout and one dtype at most (keys and values apart: int8/int4)")
    layout, numbers = layouts[0] if layouts else ("contiguous", "")
    dtype = dtypes[0] if dtypes else None
    parts = numbers.split("+") if numbers else []
    if numbers and (len(parts) != {"contiguous": 0, "paged": 1}.get(layout, 2) or not all(x.isdecimal() for x in parts)):
        raise ConfigError(f"a cache of kind {layout}={numbers}: {WANTED[layout]}")
    return CacheKind(MADE[layout](*(int(x) for x in parts)), dtype)


def make_cache(model: Decoder, rows: int, length: int, kind: Kind = None) -> Cache:
    """An empty cache of `kind`, a CacheKind or its name: a layout and a dtype, either or both, joined by a comma: "int8", "int8/int4" (keys/values), "paged", "paged=32,int4" (positions in a
    page), "streaming=4+1020,float32" (or sinks:4+1020; sinks and window), "heavy=512+512" (or h2o:512+512; heavy hitters and recent tokens). A paged one has pages for `rows` full rows.
    Raises ConfigError for a kind that there is not."""
    found = cache_kind(kind)
    layout, dtype = found.layout, found.dtype
    if isinstance(layout, Paged):
        return init_paged(model, rows, rows * -(-length // layout.page), length=length, page=layout.page, dtype=dtype)
    return init_cache(model, rows, length, dtype) if isinstance(layout, Contiguous) else init_evicting(model, rows, layout, dtype)


def cache_bytes(make: Callable[..., Cache], *args: Any, **kwargs: Any) -> int:
    """The bytes of the cache that make(*args, **kwargs) allocates (`init_cache`, `init_paged`, `init_evicting`, `make_cache`), slots and tables included, without allocating it."""
    return nbytes(jax.eval_shape(lambda: make(*args, **kwargs)))


def cache_shardings(tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Where each array of a cache, or of a tree that holds one, lies on a mesh: heads of keys and values ([…, K, H], quantised ones too) over the axes of the rule for "kv_heads" where these
    divide them, as the weights that make them do; everything else on every device. -> the tree with a NamedSharding for each array."""
    axes = tuple(a for a in mesh_axes(dict(reversed(rules))["kv_heads"]) if mesh.shape[a] > 1)
    parts = math.prod(mesh.shape[a] for a in axes)

    def one(path: Any, x: Any) -> NamedSharding:
        heads = parts > 1 and {"k", "v"} & set(path_name(path).split("/")) and x.ndim > 2 and x.shape[-2] % parts == 0
        return NamedSharding(mesh, PartitionSpec(*(None,) * (x.ndim - 2), axes) if heads else PartitionSpec())
    return jax.tree_util.tree_map_with_path(one, tree)
