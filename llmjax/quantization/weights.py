"""Weight-only quantisation after training, one leaf at a time, by labels."""
from __future__ import annotations

from typing import Any

import jax

from llmjax.core import Label, is_leaf, quantize_int8
from llmjax.core.errors import ConfigError, nearest
from llmjax.core.tree import map_named

KINDS = ("int8",)


def quantize(labels: Any, params: Any, kind: str, *, donate: bool = False) -> Any:
    """The tree with every matrix as a leaf of `kind`; vectors, position tables and the weights of experts stay as they are.

    int8: symmetric, one scale per output channel (`core.Int8`); an embedding table has one per row, which is the output channel of a tied head. donate: the old weights are given up one
    by one, so that not both trees are held. labels: `models.labels(model)`. Raises ConfigError for another kind.
    """
    if kind not in KINDS:
        raise ConfigError(f"quantize={kind!r}: {', '.join(KINDS)}" + nearest(str(kind), KINDS))
    make = jax.jit(quantize_int8, static_argnums=1, donate_argnums=0 if donate else ())

    def one(_name: str, label: Label, w: Any) -> Any:
        dims = summed(label)
        return w if is_leaf(w) or dims is None else make(w, dims)
    return map_named(one, labels, params)


def summed(label: Label) -> tuple[int, ...] | None:
    """Over which dimensions of a weight its output channels' scales are taken; None: it stays as it is."""
    if not label.is_matrix or label.inputs == ("position",) or set(label.batch) - {"layer"}:
        return None
    return label.dims("outputs" if label.inputs == ("vocab",) else "inputs")
