"""Layers' inputs kept in the host's memory: the same gradients, and they do go there."""
import dataclasses as dc

import jax
import jax.numpy as jnp
import pytest

from llmjax import models, settings
from llmjax.core import Compute


@pytest.mark.parametrize("arguments", ["size=tiny", "size=tiny,experts=4"])
def test_the_gradients_are_those_of_full_remat(arguments):
    config = settings.load(f"configs/quickstart.py:{arguments}", ["model.repeats=2"]).model
    tokens = jax.random.randint(jax.random.key(0), (2, 32), 0, config.vocab_size)
    params = models.init_params(models.Decoder(config), jax.random.key(1))

    def gradient(compute):
        model = models.Decoder(config, compute)
        loss = lambda params: jnp.square(model.apply({"params": params}, tokens)[0]).mean()
        kept = jax.tree.leaves(jax.make_jaxpr(lambda params: jax.tree.leaves(jax.vjp(loss, params)[1]))(params).out_avals)
        return jax.jit(jax.grad(loss))(params), sum(x.memory_space == jax.memory.Space.Host for x in kept)
    compute = Compute("float32", remat="full", unroll=False)
    (wanted, nothing), (found, offloaded) = gradient(compute), gradient(dc.replace(compute, remat="offload"))
    assert (nothing, offloaded) == (0, 1)                                   # the layers' inputs, stacked
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
        assert float(jnp.abs(a - b).max()) <= 1e-6 * float(jnp.abs(b).max())        # the same program but for where an array lies
