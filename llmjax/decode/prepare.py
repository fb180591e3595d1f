"""Weights in the form decoding wants, made once: each layer's arrays apart, and on a CPU matrices as rows [out, in], side by side where several take the same input, in the fewest bytes
that hold them exactly.

Training keeps layers stacked for `nn.scan`; slicing a stack inside the token loop would copy every weight every token.
"""
from __future__ import annotations

import dataclasses as dc
import functools
import math
import operator
import weakref
from typing import Any

import jax
import jax.numpy as jnp

from llmjax.core import Adapters, Int8, Joined, Label, Rows, is_leaf, join, platform, unrolled
from llmjax.core.kept import narrowest
from llmjax.core.model_config import ModelConfig
from llmjax.core.tree import map_named
from llmjax.models import Decoder, labels


def unstack(config: ModelConfig, params: dict) -> dict:
    """A tree with a scanned cycle as the tree of `unrolled(config)`: "prefix_0", "prefix_1", … in the model's order."""
    if config.encoder:
        params = {**params, "encoder": unstack(config.encoder, params["encoder"])}
    if not config.cycle:
        return params
    n, (before, repeats) = len(config.cycle), (len(config.prefix), config.repeats)
    new = {k: v for k, v in params.items() if k != "cycle" and not k.startswith("suffix_")}
    for i in range(repeats):
        for j in range(n):
            new[f"prefix_{before + i * n + j}"] = jax.tree.map(operator.itemgetter(i), params["cycle"][str(j)])
    for i in range(len(config.suffix)):
        new[f"prefix_{before + repeats * n + i}"] = params[f"suffix_{i}"]
    return new


def stack(config: ModelConfig, params: dict) -> dict:
    """The inverse of `unstack` for the scanned `config`."""
    if config.encoder:
        params = {**params, "encoder": stack(config.encoder, params["encoder"])}
    if not config.cycle:
        return params
    n, (before, repeats) = len(config.cycle), (len(config.prefix), config.repeats)
    names = {f"prefix_{i}" for i in range(before, len(config.layers))}
    new = {k: v for k, v in params.items() if k not in names}
    new["cycle"] = {str(j): jax.tree.map(lambda *xs: jnp.stack(xs), *[params[f"prefix_{before + i * n + j}"] for i in range(repeats)]) for j in range(n)}
    for i in range(len(config.suffix)):
        new[f"suffix_{i}"] = params[f"prefix_{before + repeats * n + i}"]
    return new


JOINED = (("q", "k", "v"), ("gate", "up"))


def joined(labels: dict, params: dict) -> dict:
    """The tree with the weights of every JOINED group in a module side by side, where all of them are Rows of the same inputs in the same form."""
    new = {name: joined(labels[name], w) if isinstance(w, dict) else w for name, w in params.items()}
    for names in JOINED:
        group = {name: w for name in names if isinstance(w := params.get(name), Rows)}
        if len(group) == len(names) and len({(labels[name].inputs, w.w.dtype, w.scale is None) for name, w in group.items()}) == 1:
            new.update(zip(names, join(list(group.values()))))
    return new


def rows(tied: bool, dtype: Any, _name: str, label: Label, w: Any) -> Any:
    """A matrix as Rows, a table only where the embedding is also the head; everything else as it is. Arrays wider than the computing `dtype` are rounded to it, as every product would."""
    if not (isinstance(w, Int8) or not is_leaf(w)) or not label.is_matrix or label.batch or label.inputs == ("position",) or (label.inputs == ("vocab",) and not tied):
        return w
    count = 0 if label.inputs == ("vocab",) else len(label.inputs)
    lie = (lambda w: w.reshape(math.prod(w.shape[:count]), -1).T) if count else lambda w: w
    if isinstance(w, Int8):
        return Rows(lie(w.q), w.scale.reshape(-1), w.shape, count, w.dtype)
    kept = w.astype(dtype) if jnp.dtype(dtype).itemsize < w.dtype.itemsize else w
    return Rows(lie(kept), None, w.shape, count, kept.dtype)


def narrow(w: Any) -> Any:
    """Rows in the fewest bytes that hold them exactly; anything else as it is."""
    if isinstance(w, Joined) and w.w is not None:
        return dc.replace(w, w=narrow(w.w))
    if not isinstance(w, Rows) or w.scale is not None:
        return w
    kept, scale = narrowest(w.w)
    return dc.replace(w, w=kept, scale=scale)


def prepare(model: Decoder, params: Any) -> tuple[Decoder, Any]:
    """(model, params) -> the same model with each layer apart and weights as the platform contracts them fastest; logits stay equal. Costs one copy of the layers."""
    spread = any(len(x.sharding.device_set) > 1 for x in jax.tree.leaves(params) if isinstance(x, jax.Array))
    apart = dc.replace(model, config=unrolled(model.config), compute=dc.replace(model.compute, remat=None))
    if not model.config.cycle and any(isinstance(x, Rows | Joined | Adapters) for x in jax.tree.leaves(params, is_leaf=is_leaf)):
        return apart, params

    def convert(params):
        loose, known = unstack(model.config, params), labels(apart)
        if platform() != "cpu" or spread:
            return loose
        return joined(known, map_named(functools.partial(rows, model.config.tied, model.compute.dtype), known, loose))
    return apart, jax.tree.map(narrow, jax.jit(convert)(params), is_leaf=is_leaf)


class Memo:
    """The last thing `prepare` made, kept while the weights it was made from live, so that calling `generate` in a loop converts once."""

    def __init__(self):
        self.sources: list[weakref.ref] = []
        self.model: Decoder | None = None
        self.result: tuple[Decoder, Any] | None = None

    def __call__(self, model: Decoder, params: Any) -> tuple[Decoder, Any]:
        leaves = jax.tree.leaves(params)
        same = self.result is not None and self.model == model and len(leaves) == len(self.sources) and all(r() is x for r, x in zip(self.sources, leaves))
        if not same:
            self.result = None
            self.result = prepare(model, params)
            self.model, self.sources = model, [weakref.ref(x, self.forget) for x in leaves]
        return self.result                # type: ignore[return-value]

    def forget(self, _ref: Any) -> None:
        self.result, self.sources = None, []


prepared = Memo()
