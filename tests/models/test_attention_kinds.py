"""Layers that lend keys and values, inputs of a layer's own, values with a norm, one projection for keys and values, global tokens: pieces = whole, packed = separate, padded = unpadded."""
import dataclasses as dc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pieces import B, T, V, close, make

from llmjax.core import Attention, Compute, Layer, LayerInputs, Mlp, ModelConfig, Norm, QKNorm, Rope
from llmjax.core.errors import ConfigError
from llmjax.core.positions import Proportional
from llmjax.decode import prepare
from llmjax.models import Decoder, init_cache, init_params

NEAR = Attention(4, 2, 8, Rope(), window=6, qk_norm=QKNorm(), v_norm=Norm(scale=False), scale=1.0)
FAR = Attention(4, 1, 12, Rope(1e5, scaling=Proportional(0.25)), qk_norm=QKNorm(), shared_kv=True, v_norm=Norm(scale=False), gate=True)


def layer(mixer, **more):
    return Layer(dc.replace(mixer, **more), Mlp(40), "sandwich", output_scale=True)


LENT = (layer(NEAR), layer(NEAR, lends="near"), layer(FAR, lends="far"), layer(NEAR, borrows="near"), layer(FAR, borrows="far"))
GLOBAL = Layer(Attention(4, 2, 8, Rope(), window=5, globals=3), Mlp(40))
CONFIGS = {
    "lending, own inputs": ModelConfig(V, 32, prefix=LENT, layer_inputs=LayerInputs(V, 8), context=64, tied=True),
    "global tokens": ModelConfig(V, 32, cycle=(GLOBAL,), repeats=2, context=64),
}


@pytest.fixture(scope="module", params=CONFIGS, ids=str)
def made(request):
    return make(CONFIGS[request.param])


def test_cached_pieces_are_the_whole(made):
    model, params, tokens, logits = made
    model, params = prepare(model, params)
    cache, out = init_cache(model.config, B, T + 1, jnp.float32), []
    for start, stop in [(0, 4), (4, 13), (13, 20), *((i, i + 1) for i in range(20, T))]:
        piece, cache = model.apply({"params": params}, tokens[:, start:stop], cache=cache)
        out.append(piece)
    close(jnp.concatenate(out, 1), logits)


def test_packed_is_separate_and_padding_is_nothing(made):
    model, params, tokens, logits = made
    cut, lead = 9, 3
    second = model.apply({"params": params}, tokens[:, cut:])[0]
    segments = np.asarray([0] * lead + [1] * cut + [0] + [2] * (T - cut) + [0])
    one, two = np.flatnonzero(segments == 1), np.flatnonzero(segments == 2)
    row, positions = np.full((B, len(segments)), 7, np.int32), np.zeros((B, len(segments)), np.int32)
    row[:, np.r_[one, two]], positions[:, one], positions[:, two] = tokens, np.arange(cut), np.arange(T - cut)
    got = model.apply({"params": params}, row, positions, jnp.broadcast_to(jnp.asarray(segments, jnp.int32), row.shape))[0]
    close(got[:, one], logits[:, :cut])
    close(got[:, two], second)


def test_gradients_reach_every_weight_and_a_lender_feels_its_borrowers(made):
    model, params, tokens, _ = made
    grads = jax.grad(lambda p: model.apply({"params": p}, tokens)[0].std())(params)
    assert all(bool(jnp.isfinite(g).all()) and float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))


def test_what_a_borrower_has():
    model = Decoder(CONFIGS["lending, own inputs"], Compute("float32"))
    params = init_params(model, jax.random.key(0))
    assert set(params["prefix_3"]["mixer"]) == {"q", "q_norm", "o"} and "v" not in params["prefix_2"]["mixer"] and "k" in params["prefix_2"]["mixer"]
    cache = init_cache(model.config, 1, 16, jnp.float32)
    assert cache.layers["prefix"][3] is None and set(cache.slots) == {6, 16}


@pytest.mark.parametrize(("layers", "more", "words"), [
    ((layer(NEAR, borrows="near"),), {}, "layer 0 borrows 'near', which no layer before it lends"),
    ((layer(NEAR, lends="near"), layer(NEAR, borrows="near", window=7)), {}, "its window=7 is not the lender's 6"),
    ((layer(NEAR, lends="near"), layer(NEAR, lends="near")), {}, "layer 1: 'near' is lent by an earlier layer already"),
    ((layer(NEAR, globals=0),), {}, "globals=0"), ((layer(FAR, globals=2),), {}, "globals=2 with window=None"),
])
def test_what_cannot_be_is_named(layers, more, words):
    with pytest.raises(ConfigError) as error:
        ModelConfig(V, 32, prefix=layers, **more)
    assert words in str(error.value)


def test_layers_that_know_of_each_other_are_not_scanned():
    with pytest.raises(ConfigError, match="stand apart, in prefix"):
        ModelConfig(V, 32, cycle=(layer(NEAR, lends="near"),), repeats=2)
    with pytest.raises(ConfigError, match="layer_inputs differ"):
        ModelConfig(V, 32, cycle=(layer(NEAR),), repeats=2, layer_inputs=LayerInputs(V, 8))
