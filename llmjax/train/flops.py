"""How much arithmetic a training token costs, and how much this machine could do: model FLOPs utilisation.

Convention (PaLM, appendix B, with attention counted as it is seen): 6 FLOPs per weight a token passes in a matrix product (2 forward, 4 backward; embedding lookups are no product, of the
experts only the chosen ones count) plus 12 · heads · head_dim · (mean number of visible keys) per attention layer (`mixing` says what other mixers count). Recomputed activations do not count.
"""
from __future__ import annotations

import math
import time

import jax
import jax.numpy as jnp

from llmjax.core import Attention, GatedDelta, LinearAttention, MixtureOfExperts, ModelConfig, contract
from llmjax.core.model_config import Mixer
from llmjax.core.tree import flatten
from llmjax.models import Decoder, abstract_params, labels

# Dense bfloat16 FLOP/s per device as published by the makers (a chip of TPU7x is two devices); the key is part of jax's device_kind.
PEAKS = {
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5p": 459e12, "TPU v5": 459e12, "TPU v6 lite": 918e12, "TPU v6e": 918e12, "TPU7x": 1153.5e12,
    "A100": 312e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L4": 121e12, "T4": 65e12, "V100": 125e12,
}


def visible_keys(context: int, window: int | None, causal: bool) -> float:
    """Mean number of keys a query of a full row sees."""
    if not causal:
        return context if window is None else min(context, 2 * window - 1)
    if window is None or window >= context:
        return (context + 1) / 2
    return (window * (window + 1) / 2 + (context - window) * window) / context


def matmul_weights(model: Decoder) -> float:
    """Weights a token passes in matrix products."""
    config, known = model.config, flatten(labels(model))
    total = 0.0
    for name, x in flatten(abstract_params(model)).items():
        label = known[name]
        if not label.is_matrix or name.startswith(("embed/", "positions/")):
            continue
        share = 1.0
        if "expert" in label.batch:
            moe = next(layer.ffn for layer in config.layers if isinstance(layer.ffn, MixtureOfExperts))
            share = moe.top_k / moe.experts
        total += share * math.prod(x.shape)
    return total + (config.vocab_size * config.dim if config.tied else 0)


def flops_per_token(model: Decoder, context: int) -> float:
    """Forward and backward, by the convention above, of a row of `context` tokens."""
    config: ModelConfig = model.config
    return 6 * matmul_weights(model) + sum(mixing(layer.mixer, context) for layer in config.layers)


def mixing(mixer: Mixer, context: int) -> float:
    """What a token costs beside the weights, forward and backward. Of a recurrence, counted as it is written, whatever the chunks cost: products of a vector with a state, 6 · its size each
    (what the key predicts, what is written, what the query reads; linear attention predicts nothing)."""
    if isinstance(mixer, GatedDelta):
        return 18 * mixer.heads * mixer.key_dim * mixer.value_dim
    if isinstance(mixer, LinearAttention):
        return 6 * (mixer.heads + mixer.kv_heads) * mixer.head_dim ** 2
    keys = visible_keys(context, mixer.window, mixer.causal)
    count = mixer.globals if isinstance(mixer, Attention) else None
    far = 0.0 if count is None else max(0.0, visible_keys(context, None, mixer.causal) - keys)          # of them a token sees the globals, and a global token all
    return 12 * mixer.heads * mixer.head_dim * (keys + min(far, (1 if mixer.causal else 2) * (count or 0)))


def peak_flops(dtype: str) -> tuple[float, str]:
    """-> (FLOP/s of all devices together, where the figure comes from). On a CPU it is measured: the best of a few products of 1,024 × 1,024 matrices."""
    device = jax.devices()[0]
    for kind, peak in PEAKS.items():
        if kind.lower() in device.device_kind.lower():
            return peak * jax.device_count() * (0.5 if dtype == "float32" else 1.0), f"{device.device_kind}, published"
    return measured_peak(dtype), f"{device.device_kind}, measured product"


def measured_peak(dtype: str, size: int = 1024, tries: int = 5) -> float:
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a, b: contract("mk,kn->mn", a, b, out_dtype=jnp.float32))
    jax.block_until_ready(product(a, a))
    best = math.inf
    for _ in range(tries):
        start = time.perf_counter()
        jax.block_until_ready(product(a, a))
        best = min(best, time.perf_counter() - start)
    return 2 * size ** 3 / best
