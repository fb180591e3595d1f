"""Schedules at their corners, decay by label, Muon's orthogonal updates, AdamW against torch."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmjax import train
from llmjax.core import Adafactor, AdamW, Compute, ConfigError, Constant, Linear, Lion, Muon, WarmupCosine, WarmupStableDecay
from llmjax.core.labels import parse
from llmjax.core.run_config import in_steps

LABELS = {"w": parse("embed -> heads head_dim"), "table": parse("vocab -> embed"), "scale": parse("norm")}


def params():
    key = jax.random.key(0)
    return {"w": jax.random.normal(key, (8, 2, 6)), "table": jax.random.normal(key, (12, 8)), "scale": jnp.ones(8)}


def test_schedules():
    s = train.make_schedule(WarmupCosine(10, 0.1), 1.0, 110)
    assert float(s(0)) == pytest.approx(0.1) and float(s(9)) == pytest.approx(1.0) and float(s(60)) == pytest.approx(0.55, abs=0.01) and float(s(110)) == pytest.approx(0.1)
    s = train.make_schedule(WarmupStableDecay("10%", "20%"), 2.0, 100)
    assert [round(float(s(i)), 3) for i in (0, 9, 50, 80, 90, 100)] == [0.2, 2.0, 2.0, 2.0, 1.0, 0.0]
    s = train.make_schedule(Linear(0, 0.5), 1.0, 10)
    assert float(s(0)) == 1.0 and float(s(5)) == pytest.approx(0.75) and float(s(10)) == pytest.approx(0.5)
    assert float(train.make_schedule(Constant(), 3.0, 10)(7)) == 3.0


def test_durations():
    assert in_steps("3%", 1000, None, "x") == 30 and in_steps("2ep", None, 50, "x") == 100 and in_steps(7, None, None, "x") == 7 and in_steps("0%", 10, None, "x") == 0
    with pytest.raises(ConfigError, match="epoch"):
        in_steps("2ep", 100, None, "x")


@pytest.mark.parametrize("config", [AdamW(1e-2), Adafactor(1e-2), Lion(1e-2), Muon(0.1, adam=AdamW(1e-2))], ids=lambda c: type(c).__name__)
def test_each_goes_downhill(config):
    optimizer = train.make_optimizer(config, config.learning_rate, LABELS)
    goal = jax.tree.map(lambda x: x + 0.5, params())
    loss = lambda p: sum(jnp.square(a - b).mean() for a, b in zip(jax.tree.leaves(p), jax.tree.leaves(goal)))
    p = params()
    state = optimizer.init(p)

    @jax.jit
    def step(p, state):
        updates, state = optimizer.update(jax.grad(loss)(p), state, p)
        return optax.apply_updates(p, updates), state
    before = float(loss(p))
    for _ in range(40):
        p, state = step(p, state)
    assert float(loss(p)) < 0.8 * before


@pytest.mark.parametrize("config", [AdamW(0.1, weight_decay=0.5), Lion(0.1, weight_decay=0.5), Muon(0.1, weight_decay=0.5, adam=AdamW(0.1, weight_decay=0.5))], ids=lambda c: type(c).__name__)
def test_vectors_do_not_decay(config):
    optimizer = train.make_optimizer(config, config.learning_rate, LABELS)
    p = params()
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, p), optimizer.init(p), p)
    assert float(jnp.abs(updates["scale"]).max()) == 0
    np.testing.assert_allclose(updates["table"], -0.1 * 0.5 * p["table"], rtol=1e-5)
    np.testing.assert_allclose(updates["w"], -0.1 * 0.5 * p["w"], rtol=1e-5)


def test_muon_takes_hidden_matrices_alone():
    """Newton-Schulz leaves singular values near 1 (0.68 to 1.13 by its coefficients); Adam's first update is the sign."""
    optimizer = train.make_optimizer(Muon(1.0, adam=AdamW(1.0, weight_decay=0.0), clip=None), 1.0, LABELS)
    p = params()
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(5), x.shape), p)
    updates, _ = optimizer.update(grads, optimizer.init(p), p)
    singular = np.linalg.svd(np.asarray(updates["w"]).reshape(8, 12), compute_uv=False)
    assert singular.max() / singular.min() < 2
    np.testing.assert_allclose(np.abs(updates["table"]), 1, rtol=1e-3)


def test_adamw_is_torchs():
    import torch
    p = params()
    optimizer = train.make_optimizer(AdamW(1e-2, weight_decay=0.0, clip=1.0), 1e-2, LABELS)
    state = optimizer.init(p)
    theirs = {k: torch.nn.Parameter(torch.tensor(np.asarray(v))) for k, v in p.items()}
    other = torch.optim.AdamW(theirs.values(), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for i in range(5):
        grads = {k: jax.random.normal(jax.random.key(i), v.shape) for k, v in p.items()}
        updates, state = optimizer.update(grads, state, p)
        p = optax.apply_updates(p, updates)
        for k, t in theirs.items():
            t.grad = torch.tensor(np.asarray(grads[k]))
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        other.step()
    for k, t in theirs.items():
        np.testing.assert_allclose(p[k], t.detach().numpy(), atol=2e-6)


def test_compute_refuses_what_it_does_not_know():
    with pytest.raises(ConfigError, match="dtype='float8'"):
        Compute(dtype="float8")      # type: ignore[arg-type]
