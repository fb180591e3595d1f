"""The one step: it learns, it accumulates exactly, it shards exactly, it leaves what is frozen, it skips what is broken."""
import dataclasses as dc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmjax import train
from llmjax.core import Attention, Compute, ConfigError, DataError, Layer, MixtureOfExperts, Mlp, ModelConfig, make_mesh, shardings
from llmjax.core.leaves import Lora, add_lora, quantize_int8
from llmjax.core.tree import map_named, split
from llmjax.models import Decoder, abstract_params, init_params, labels
from llmjax.objectives import Mean, NextToken

V = 64
DENSE = ModelConfig(V, 32, cycle=(Layer(Attention(4, 4, 8), Mlp(64)),), repeats=2, tied=True, context=32)
EXPERTS = dc.replace(DENSE, cycle=(Layer(Attention(4, 4, 8), MixtureOfExperts(4, 2, 16)),))


def setting(config=DENSE):
    model = Decoder(config, Compute("float32", unroll=False))
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, V, (8, 17)).astype(np.int32)
    weights = np.ones((8, 16), np.float32)
    weights[0, 5:] = 0
    return model, init_params(model, jax.random.key(0)), dict(tokens=tokens[:, :-1], targets=tokens[:, 1:], weights=weights)


def far(a, b):
    return max(float(jnp.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def run(model, params, batch, steps=3, optimizer=None, mesh=None, **options):
    optimizer = optimizer or optax.adam(1e-2)
    if mesh is not None:
        params = jax.tree.map(jax.device_put, params, shardings(labels(model), abstract_params(model), mesh))
    state = train.init(jax.tree.map(jnp.copy, params), optimizer, jax.random.key(1))
    step = train.make_step(model.apply, NextToken(), optimizer, **options)
    losses = []
    for _ in range(steps):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return state, losses, metrics


def test_learns_and_reports():
    model, params, batch = setting()
    state, losses, metrics = run(model, params, batch, 30)
    assert losses[0] == pytest.approx(np.log(V), abs=0.3) and losses[-1] < losses[0] - 1
    assert int(state.step) == 30 and float(metrics["tokens"]) == batch["weights"].sum() and float(metrics["grad_norm"]) > 0


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_is_one_batch(parts):
    """Uneven weights: means of means would differ. Order of float32 sums alone is left: 1e-6."""
    model, params, batch = setting()
    whole = run(model, params, batch, 1, optax.sgd(0.5))
    pieces = run(model, params, batch, 1, optax.sgd(0.5), accumulate=parts)
    assert far(whole[0].params, pieces[0].params) < 1e-6 and whole[1][0] == pytest.approx(pieces[1][0], rel=1e-6)


def test_only_what_learns_is_in_the_state():
    """LoRA on int8: the state holds the two factors, the base comes beside it and is the same object after."""
    model, params, batch = setting()
    names = labels(model)
    base = map_named(lambda name, w, label: add_lora(jax.random.key(3), quantize_int8(w, label.dims("inputs")), label.dims("inputs"), label.dims("outputs"), 4)
                     if "mixer" in name and label.is_matrix else w, params, names)
    learn, frozen = split(base, lambda name: name.endswith(("/a", "/b")))
    count = len(jax.tree.leaves(learn))
    optimizer = optax.adam(1e-2)
    state = train.init(jax.tree.map(jnp.copy, learn), optimizer, jax.random.key(1))
    step = train.make_step(model.apply, NextToken(), optimizer)
    losses = []
    for _ in range(10):
        state, metrics = step(state, batch, {"base": frozen})
        losses.append(float(metrics["loss"]))
    assert count == 8 and len(jax.tree.leaves(state.params)) == count and losses[-1] < losses[0] - 0.05
    q = frozen["cycle"]["0"]["mixer"]["q"]
    assert isinstance(q, Lora) and q.w.q.dtype == jnp.int8 and not q.w.q.is_deleted()


def test_broken_steps_are_skipped():
    model, params, batch = setting()
    bad = {**batch, "weights": batch["weights"] * np.float32("nan")}
    optimizer = optax.adam(1e-2)
    step = train.make_step(model.apply, NextToken(), optimizer, skip=True)
    state, _ = step(train.init(jax.tree.map(jnp.copy, params), optimizer, jax.random.key(1)), batch)
    kept = jax.device_get(state.params)
    state, metrics = step(state, bad)
    assert float(metrics["skipped"]) == 1 and int(state.step) == 2 and far(state.params, kept) == 0
    state, metrics = step(state, batch, None, np.float32(0.1))
    assert float(metrics["skipped"]) == 1 and far(state.params, kept) == 0
    state, metrics = step(state, batch, None, np.float32(100))
    assert float(metrics["skipped"]) == 0 and far(state.params, kept) > 0


def test_the_batch_is_checked():
    model, params, batch = setting()
    step = train.make_step(model.apply, NextToken(), optax.sgd(0.1), accumulate=3)
    state = train.init(params, optax.sgd(0.1), jax.random.key(0))
    with pytest.raises(DataError, match="accumulate=3"):
        step(state, batch)
    with pytest.raises(DataError, match=r"batch\['targets'\]"):
        train.make_step(model.apply, NextToken(), optax.sgd(0.1))(state, {"tokens": batch["tokens"], "target": batch["targets"], "weights": batch["weights"]})

    class Needy(NextToken):
        needs = ("reference",)
    with pytest.raises(ConfigError, match="reference"):
        train.make_step(model.apply, Needy(), optax.sgd(0.1))(state, batch)


def test_means_add_up():
    a, b = Mean(jnp.float32(6), jnp.float32(2)), Mean(jnp.float32(1), jnp.float32(8))
    assert float((a + b).value()) == pytest.approx(0.7)


@pytest.mark.parametrize("axes", [None, dict(fsdp=4, tensor=2)], ids=["one device", "fsdp4 tensor2"])
def test_moments_that_wait_in_the_hosts_memory_change_nothing(axes):
    """Bit for bit, and after each step they are there again; a step that is skipped too."""
    model, params, batch = setting()
    mesh, optimizer = (None if axes is None else make_mesh(**axes)), optax.adam(1e-2)
    if mesh is not None:
        params = jax.tree.map(jax.device_put, params, shardings(labels(model), abstract_params(model), mesh))
    states = []
    for offload in (False, True):
        state = train.init(jax.tree.map(jnp.copy, params), optimizer, jax.random.key(1), offload=offload)
        step = train.make_step(model.apply, NextToken(), optimizer, skip=True)
        for limit in (100.0, 100.0, 0.1):
            state, metrics = step(state, batch, None, np.float32(limit))
        assert float(metrics["skipped"]) == 1
        kinds = {x.sharding.memory_kind for x in jax.tree.leaves(state.opt_state) if x.ndim}
        assert kinds == {"pinned_host" if offload else "device"}
        states.append(jax.device_get(state.params))
    assert far(*states) == 0
