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
        for name in ("expert_imbalance", "dropped"):
            if name in aux:
                metrics[name] = Mean(aux[name] * count, count)
        return Mean(total, count), metrics


def router_statistics(said: dict) -> dict[str, jax.Array]:
    """Means over all mixture-of-experts layers, out of the sums they put into `aux` (models/mixture_of_experts.py): balance_loss, the load balance of Switch Transformers (Fedus et al.
    2021, eq. 4 to 6; with k choices a token a uniform router gives k), router_z_loss, that of ST-MoE (Zoph et al. 2022, eq. 5), and expert_imbalance, the busiest expert's share
    times the number of experts (1 is even), and with a capacity the share of choices that were dropped. Empty for a model without experts."""
    layers: dict[tuple, dict[str, jax.Array]] = {}
    for path, x in jax.tree_util.tree_flatten_with_path(said)[0]:
        *lead, name = [k.key for k in path if hasattr(k, "key")]
        layers.setdefault(tuple(lead), {})[name] = x
    found: dict[str, list[jax.Array]] = {}
    for sums in layers.values():
        experts = sums["choices"].shape[-1]
        choices, probabilities = (sums[name].reshape(-1, experts) for name in ("choices", "probabilities"))       # a stack of layers has a leading axis
        tokens = jnp.maximum(sums["tokens"].reshape(-1), 1.0)
        found.setdefault("balance_loss", []).append(experts * (choices * probabilities).sum(-1) / tokens ** 2)
        found.setdefault("router_z_loss", []).append(sums["squared_z"].reshape(-1) / tokens)
        found.setdefault("expert_imbalance", []).append(experts * choices.max(-1) / jnp.maximum(choices.sum(-1), 1.0))
        if "dropped" in sums:
            found.setdefault("dropped", []).append(sums["dropped"].reshape(-1) / jnp.maximum(choices.sum(-1), 1.0))
    return {name: jnp.concatenate(each).mean() for name, each in found.items()}
