"""A row over several devices (the mesh axis of the rule for `length`): which form of attention serves a model, and the zigzag order its rows are kept in between embedding and last norm.

Everything but attention works token by token, or is left to the compiler; see kernels/attention/ring.py.
"""
from __future__ import annotations

from typing import Any

import jax
from jax.sharding import PartitionSpec

from llmjax.core import Compute, ConfigError, Layout, free_axes
from llmjax.core.model_config import Attention, LatentAttention, ModelConfig
from llmjax.kernels.attention import exchange


def form(config: ModelConfig, compute: Compute, layout: Layout, shape: tuple[int, ...]) -> str | None:
    """"ring" or "ulysses", how attention goes over divided rows [B, T] of this model on the ambient mesh, or None where rows are whole, or stay so because B or T does not divide.

    `auto` is ulysses where the kv heads of a device divide over the axis (each sends queries, keys, values and answers once), else ring. Raises ConfigError for ulysses where some
    layer's heads do not divide.
    """
    _, _, parts = free_axes("length", layout.rules)
    _, _, rows = free_axes("batch", layout.rules)
    if parts == 1 or shape[0] % rows or shape[1] % (2 * parts):
        return None
    _, _, columns = free_axes("heads", layout.rules)
    mixers = [layer.mixer for layer in config.layers if isinstance(layer.mixer, Attention | LatentAttention)]

    def heads(mixer):
        return (mixer.heads, mixer.heads) if isinstance(mixer, LatentAttention) else (mixer.heads, mixer.kv_heads)
    if compute.sequence == "ulysses":
        for mixer in mixers:
            N, K = (max(1, n // columns) for n in heads(mixer))
            if N % parts or (K % parts and parts % K):
                raise ConfigError(f"compute.sequence='ulysses': {N} query heads and {K} kv heads of a device do not divide over layout.sequence={parts}; use 'ring', or another layout")
        return "ulysses"
    if compute.sequence == "ring":
        return "ring"
    return "ulysses" if all(max(1, n // columns) % parts == 0 for mixer in mixers for n in heads(mixer)) else "ring"


def balanced(config: ModelConfig) -> bool:
    """Whether every layer may see its tokens in another order than the row's, with their positions: recurrences may not, nor what counts tokens instead of asking for positions."""
    return all(isinstance(m, Attention | LatentAttention) and m.causal and m.globals is None and not (isinstance(m, Attention) and m.relative)
               for m in (layer.mixer for layer in config.layers))


def reorder(x: Any, layout: Layout, back: bool = False) -> Any:
    """Arrays [B, T, …] (None stays None), divided over the axis of `length`: into zigzag order, or `back`. A row of 1 stands for all rows."""
    mesh, axes, _ = free_axes("length", layout.rules)
    _, rows, _ = free_axes("batch", layout.rules)
    specs = jax.tree.map(lambda y: PartitionSpec(rows or None if y.shape[0] > 1 else None, axes), x)
    free = {a for a in mesh.axis_names if a not in mesh.manual_axes}
    move = jax.shard_map(lambda x: jax.tree.map(lambda y: exchange(y, axes, back), x), in_specs=(specs,), out_specs=specs, axis_names=free, check_vma=False)
    return move(x)
