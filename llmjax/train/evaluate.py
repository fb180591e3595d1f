"""Loss of a model on held-out batches: nats per token, perplexity, bits per byte."""
from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.core import DataError, constrain
from llmjax.kernels import chunked_logprobs
from llmjax.train.state import mesh_of


@functools.partial(jax.jit, static_argnums=0)
def score(apply: Callable, params: Any, batch: dict[str, jax.Array], lengths: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """-> (nats [B], tokens [B], bytes [B]) float32 over what carries weight; lengths [V]: bytes per token."""
    features, _ = apply({"params": params}, batch["tokens"], batch.get("positions"), batch.get("segment_ids"), method="features")
    logprobs = chunked_logprobs(lambda p, x: apply({"params": p}, x, method="unembed"), params, features, batch["targets"])
    weights = batch["weights"]
    found = -(logprobs * weights).sum(-1), weights.sum(-1), (lengths[batch["targets"]] * (weights > 0)).sum(-1).astype(jnp.float32)
    return tuple(constrain(x, ".") for x in found)     # type: ignore[return-value]     # every process reads all rows


def evaluate(apply: Callable, params: Any, batches: Iterable[dict[str, np.ndarray]], token_lengths: np.ndarray | None, vocab_size: int, place: Callable = lambda b: b) -> dict[str, float]:
    """-> loss (nats per token), perplexity, tokens, and bits_per_byte where `token_lengths` (bytes per id) is given. `place` puts a batch on the devices. Raises DataError for nothing to score."""
    lengths = np.zeros(vocab_size, np.int32)
    if token_lengths is not None:
        lengths[:min(vocab_size, len(token_lengths))] = token_lengths[:vocab_size]
    mesh = mesh_of(params)
    sums = np.zeros(3, np.float64)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        for batch in batches:
            sums += [float(np.sum(np.asarray(x, np.float64))) for x in score(apply, params, place(batch), lengths)]
    nats, tokens, size = sums
    if not tokens:
        raise DataError("there is no token to score: the text is empty, or everything in it is masked")
    found = {"loss": nats / tokens, "perplexity": math.exp(min(nats / tokens, 700)), "tokens": tokens}
    return {**found, "bits_per_byte": nats / math.log(2) / size} if token_lengths is not None and size else found
