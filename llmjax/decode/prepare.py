"""Weights in the form decoding wants, made once: each layer's arrays apart, and on a CPU matrices as a matrix-vector product reads them fastest: [out, in]; in float32, where several
take the same input, side by side [in, outs], because XLA gives only large products more than one core, and a tied embedding [embed, vocab], as the head reads it; int8 weights
as rows [out, in], side by side too.

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

from llmjax.core import Adapters, Int8, Int8Rows, Joined, Label, Transposed, is_leaf, join, platform, unrolled
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


def joined(labels: dict, params: dict, kind: type) -> dict:
    """The tree with the weights of every JOINED group in a module side by side, where all of them are matrices of one kind (jax.Array or Int8Rows)."""
    new = {name: joined(labels[name], w, kind) if isinstance(w, dict) else w for name, w in params.items()}
    for names in JOINED:
        if all(isinstance(params.get(name), kind) and labels[name].is_matrix and not labels[name].batch and labels[name].inputs == labels[names[0]].inputs for name in names):
            new.update(zip(names, join([params[name] for name in names], len(labels[names[0]].inputs))))
    return new


def rows_of(tied: bool, _name: str, label: Label, w: Any) -> Any:
    """An Int8 matrix as Int8Rows, an embedding only where it is also the head; everything else as it is."""
    if not isinstance(w, Int8) or label.batch or (label.inputs == ("vocab",) and not tied):
        return w
    if label.inputs == ("vocab",):
        return Int8Rows(w.q, w.scale.reshape(-1), w.shape, 0)
    count = len(label.inputs)
    return Int8Rows(w.q.reshape(math.prod(w.shape[:count]), -1).T, w.scale.reshape(-1), w.shape, count)


def output_first(tied: bool, _name: str, label: Label, w: Any) -> Any:
    """A matrix as a Transposed leaf; everything else as it is, tables among it unless the embedding is also the head."""
    if is_leaf(w) or not label.is_matrix or label.batch or label.inputs == ("position",) or (label.inputs == ("vocab",) and not tied):
        return w
    count = len(label.inputs)
    size = math.prod(w.shape[:count])
    return Transposed(w.reshape(size, -1).T, w.shape, count)


def prepare(model: Decoder, params: Any) -> tuple[Decoder, Any]:
    """(model, params) -> the same model with each layer apart and weights as the platform contracts them fastest; logits stay equal. Costs one copy of the layers."""
    spread = any(len(x.sharding.device_set) > 1 for x in jax.tree.leaves(params) if isinstance(x, jax.Array))
    apart = dc.replace(model, config=unrolled(model.config), compute=dc.replace(model.compute, remat=None))

    def convert(params):
        loose, known = unstack(model.config, params), labels(apart)
        if platform() != "cpu" or spread:
            return loose
        full = jnp.dtype(model.compute.dtype).itemsize == 4          # products of 16-bit numbers are fastest with every matrix [out, in]
        loose = joined(known, map_named(functools.partial(rows_of, model.config.tied), known, loose), Int8Rows)
        turn = functools.partial(output_first, full and model.config.tied)
        return map_named(turn, known, joined(known, loose, jax.Array) if full else loose)
    if not model.config.cycle and any(isinstance(x, Int8Rows | Transposed | Joined | Adapters) for x in jax.tree.leaves(params, is_leaf=is_leaf)):
        return apart, params
    return apart, jax.jit(convert)(params)


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
