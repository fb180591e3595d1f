"""Next-token prediction: pretraining, and supervised fine-tuning where the data sets `weights` to 0 on what is not to be learnt."""
from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from llmjax.kernels import chunked_cross_entropy
from llmjax.objectives.base import Mean


@dc.dataclass(frozen=True)
class NextToken:
    """Cross-entropy of `targets` [B, T] under the model, averaged by `weights`; float32 logits exist for one chunk of tokens at a time.

    label_smoothing: share of the target spread evenly over the vocabulary (Szegedy et al. 2016). z_loss: factor on the squared log-partition (PaLM, section 5).
    balance_loss, router_z_loss: factors on what mixture-of-experts layers report (means over layers); models without experts report nothing.
    chunk: positions of every row at a time; None: as many as make 1,024 tokens on each device, on a CPU 512.
    """
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    balance_loss: float = 0.01
    router_z_loss: float = 0.001
    chunk: int | None = None
    reads: ClassVar[tuple[str, ...]] = ("tokens", "targets", "weights")
    needs: ClassVar[tuple[str, ...]] = ()

    def __call__(self, apply: Callable, params: Any, batch: dict[str, jax.Array], frozen: Any = None, key: jax.Array | None = None) -> tuple[Mean, dict[str, Mean]]:
        (features, _), said = apply({"params": params}, batch["tokens"], batch.get("positions"), batch.get("segment_ids"), method="features", mutable=["aux"])
        weights = batch["weights"].astype(jnp.float32)
        total, z_total = chunked_cross_entropy(lambda p, x: apply({"params": p}, x, method="unembed"), params, features, batch["targets"], weights,
                                               label_smoothing=self.label_smoothing, z_loss=self.z_loss, chunk=self.chunk)
        count = weights.sum()
        metrics = {"loss": Mean(total - z_total, count)}
        if self.z_loss:
            metrics["z_loss"] = Mean(z_total, count)
        aux = router_statistics(said)
        for name, factor in (("balance_loss", self.balance_loss), ("router_z_loss", self.router_z_loss)):
            if name in aux:
                metrics[name] = Mean(aux[name] * count, count)
                total = total + factor * aux[name] * count
        if "expert_share" in aux:
            metrics["expert_imbalance"] = Mean(aux["expert_share"] * count, count)
        return Mean(total, count), metrics


def router_statistics(said: dict) -> dict[str, jax.Array]:
    """Means over all mixture-of-experts layers of what they put into `aux`; expert_share becomes the busiest expert's share times the number of experts (1 is even)."""
    found: dict[str, list[jax.Array]] = {}
    for path, x in jax.tree_util.tree_flatten_with_path(said)[0]:
        name = next(k.key for k in reversed(path) if hasattr(k, "key"))
        layers = (x.max(-1) * x.shape[-1] if name == "expert_share" else x).reshape(-1)
        found.setdefault(name, []).append(layers)
    return {name: jnp.concatenate(layers).mean() for name, layers in found.items()}
