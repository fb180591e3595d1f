"""Caches in 8 and 4 bits: pages, rings and slots give the same logits, near those of float keys; nothing but storage changes."""
import dataclasses as dc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pieces import V, close, make
from test_paged_cache import CONFIGS, LENGTH, PAGE, ROWS, D, calls, run, shuffled

from llmjax import decode
from llmjax.core import Attention, ConfigError, Layer, Mlp, ModelConfig

NEAR = {"int8": 0.02, "int4": 0.4}                                            # mean error over the spread of logits; random weights have no redundancy


@pytest.fixture(scope="module", params=["latent, chunks", "lending, globals"], ids=str)
def made(request):
    model, params, _, _ = make(CONFIGS[request.param])
    return model, params, np.random.default_rng(0).integers(1, V, (ROWS, LENGTH)).astype(np.int32)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_slots_rings_and_pages_agree(made, kind):
    model, params, tokens = made
    exact, _ = run(model, params, dc.replace(decode.init_cache(model, ROWS, LENGTH), empty=False), calls(tokens))
    want, cache = run(model, params, dc.replace(decode.init_cache(model, ROWS, LENGTH, kind), empty=False), calls(tokens))
    got, _ = run(model, params, shuffled(decode.init_paged(model, ROWS, 30, length=LENGTH, page=PAGE, dtype=kind)), calls(tokens))
    for a, b, c in zip(got, want, exact):
        close(a, b, 1e-3)                                                     # a number at the edge of two steps falls to either side where sums are in another order
        off = float(jnp.abs(a - c).mean() / c.std())
        assert 1e-5 < off < NEAR[kind], off
    assert {str(x.dtype) for x in jax.tree.leaves(cache.layers)} == {"int8": {"int8", "bfloat16"}, "int4": {"uint8", "bfloat16"}}[kind] | ({"bfloat16"} if model.config.cycle else set())


def test_what_a_cache_cannot_be_kept_in_is_named():
    model, _, _, _ = make(ModelConfig(V, D, prefix=(Layer(Attention(4, 2, 7, None), Mlp(8)),)))
    with pytest.raises(ConfigError, match="head of 7"):
        decode.init_cache(model, 1, 8, "int4")
    with pytest.raises(ConfigError, match="did you mean 'int8'"):
        decode.init_cache(model, 1, 8, "int9")
    assert decode.init_cache(model, 1, 8, jnp.bfloat16).layers["prefix"][0].k.dtype == jnp.bfloat16
