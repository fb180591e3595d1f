"""Kinds of caches by name, as a command line says them, and what a cache will take before it is made."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from llmjax.core.errors import ConfigError, nearest
from llmjax.core.tree import nbytes
from llmjax.decode.steps import FLOATS, init_cache, init_evicting, init_paged
from llmjax.kernels.attention.stored import QUANTIZED
from llmjax.models import Cache, Decoder, HeavyHitters, Streaming

LAYOUTS = ("contiguous", "paged", "streaming", "heavy")
PAGE = 16


def make_cache(model: Decoder, rows: int, length: int, kind: str = "contiguous") -> Cache:
    """An empty cache of `kind`: a layout and a dtype, either or both, joined by a comma: "int8", "int8/int4" (keys/values), "paged", "paged=32,int4" (positions in a page),
    "streaming=4+1020,float32" (sinks and window), "heavy=512+512" (heavy hitters and recent tokens). A paged one has pages for `rows` full rows. Raises ConfigError for a kind that there
    is not."""
    layout, numbers, dtype = "contiguous", "", None
    for word in kind.split(","):
        name, _, value = word.strip().partition("=")
        if name in LAYOUTS:
            layout, numbers = name, value
        elif name in (*FLOATS, *QUANTIZED) and not value:
            dtype = name
        else:
            raise ConfigError(f"a cache of kind {word!r}: there is none" + nearest(name, (*LAYOUTS, *FLOATS, *QUANTIZED)))
    parts = numbers.split("+") if numbers else []
    wanted = {"contiguous": 0, "paged": 1, "streaming": 2, "heavy": 2}[layout]
    if numbers and (len(parts) != wanted or not all(x.isdecimal() for x in parts)):
        raise ConfigError(f"a cache of kind {layout}={numbers}: " + {0: "it has no numbers", 1: "one number is wanted, as paged=16", 2: "two numbers are wanted, as streaming=4+1020"}[wanted])
    sizes = [int(x) for x in parts]
    if layout == "paged":
        page = sizes[0] if sizes else PAGE
        if page < 1:
            raise ConfigError(f"a cache of kind {layout}={numbers}: a page has at least 1 position")
        return init_paged(model, rows, rows * -(-length // page), length=length, page=page, dtype=dtype)
    if layout == "contiguous":
        return init_cache(model, rows, length, dtype)
    return init_evicting(model, rows, (Streaming if layout == "streaming" else HeavyHitters)(*sizes), dtype)


def cache_bytes(make: Callable[..., Cache], *args: Any, **kwargs: Any) -> int:
    """The bytes of the cache that make(*args, **kwargs) allocates (`init_cache`, `init_paged`, `init_evicting`, `make_cache`), slots and tables included, without allocating it."""
    return nbytes(jax.eval_shape(lambda: make(*args, **kwargs)))
