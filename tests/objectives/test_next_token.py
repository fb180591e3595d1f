"""The next-token loss against torch's cross_entropy, its parts, and its sums."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.core import Attention, Compute, Layer, MixtureOfExperts, Mlp, ModelConfig
from llmjax.models import Decoder, init_params
from llmjax.objectives import NextToken

V = 53


@pytest.fixture(scope="module")
def dense():
    model = Decoder(ModelConfig(V, 16, cycle=(Layer(Attention(2, 2, 8), Mlp(24)),), repeats=2, context=32), Compute("float32"))
    params = jax.tree.map(lambda x: 3 * x, init_params(model, jax.random.key(0)))
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, V, (3, 20)).astype(np.int32)
    weights = (rng.random((3, 19)) > 0.3).astype(np.float32)
    return model, params, dict(tokens=tokens[:, :-1], targets=tokens[:, 1:], weights=weights)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_torch_cross_entropy(dense, smoothing):
    import torch
    model, params, batch = dense
    logits = torch.tensor(np.asarray(model.apply({"params": params}, batch["tokens"])[0]))
    each = torch.nn.functional.cross_entropy(logits.reshape(-1, V), torch.tensor(batch["targets"]).long().reshape(-1), label_smoothing=smoothing, reduction="none").numpy()
    loss, metrics = NextToken(label_smoothing=smoothing, chunk=7)(model.apply, params, batch)
    want = (each * batch["weights"].reshape(-1)).sum() / batch["weights"].sum()
    assert float(loss.value()) == pytest.approx(float(want), rel=1e-5)
    assert float(metrics["loss"].value()) == pytest.approx(float(want), rel=1e-5)


def test_z_loss_is_the_squared_log_partition(dense):
    model, params, batch = dense
    z = np.square(np.asarray(jax.nn.logsumexp(model.apply({"params": params}, batch["tokens"])[0], -1)))
    loss, metrics = NextToken(z_loss=0.01)(model.apply, params, batch)
    want = 0.01 * (z * batch["weights"]).sum() / batch["weights"].sum()
    assert float(metrics["z_loss"].value()) == pytest.approx(float(want), rel=1e-5)
    assert float(loss.value() - metrics["loss"].value()) == pytest.approx(float(want), rel=1e-4)


def test_experts_add_their_losses():
    model = Decoder(ModelConfig(V, 16, cycle=(Layer(Attention(2, 2, 8), MixtureOfExperts(4, 2, 8)),), repeats=2, context=32), Compute("float32"))
    params = init_params(model, jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(1).integers(1, V, (2, 12)), jnp.int32)
    batch = dict(tokens=tokens[:, :-1], targets=tokens[:, 1:], weights=jnp.ones((2, 11)))
    loss, metrics = NextToken(balance_loss=0.5, router_z_loss=0.25)(model.apply, params, batch)
    values = {k: float(v.value()) for k, v in metrics.items()}
    assert float(loss.value()) == pytest.approx(values["loss"] + 0.5 * values["balance_loss"] + 0.25 * values["router_z_loss"], rel=1e-5)
    assert values["balance_loss"] >= 2.0 - 0.5 and 1.0 <= values["expert_imbalance"] <= 4.0        # a uniform router with two choices a token gives 2
