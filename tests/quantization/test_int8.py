"""Int8 weights: what is quantised, the integer product against the dense one within its own rounding, whole models, and the form a CPU decodes with."""
import dataclasses as dc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax import decode, models
from llmjax.core import Compute, ConfigError, Int8, Joined, Rows, dense, dot, dots, is_leaf, join, quantize_int8, take
from llmjax.core.kept import int8_rows
from llmjax.core.model_config import Attention, Layer, MixtureOfExperts, Mlp, ModelConfig
from llmjax.core.tree import flatten
from llmjax.quantization import quantize

random = np.random.default_rng(0)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("scale", [0.02, 20.0])
def test_the_product_is_the_dense_one_to_fifteen_bits(rows, scale):
    x, w = random.standard_normal((rows, 64)).astype(np.float32) * scale, quantize_int8(jnp.asarray(random.standard_normal((48, 64)), jnp.float32), (1,))
    exact = x.astype(np.float64) @ (np.asarray(w.q, np.float64) * np.asarray(w.scale, np.float64)).T
    got = jax.jit(int8_rows)(x, w.q, w.scale[:, 0])
    step = np.abs(x).max(-1, keepdims=True) / 127
    room = step / 254 * 0.51 * np.abs(np.asarray(dense(w))).sum(1)            # half a fine step of every number; an error in the coarse part alone would be 254 times that
    assert (np.abs(got - exact) <= room).all() and np.abs(got - exact).max() > 0
    assert not np.asarray(int8_rows(np.zeros((1, 64), np.float32), w.q, w.scale[:, 0])).any()


def test_side_by_side():
    one, two = (quantize_int8(jnp.asarray(random.standard_normal(shape), jnp.float32), (0,)) for shape in ((12, 3, 4), (12, 2, 4)))
    rows = [Rows(w.q.reshape(12, -1).T, w.scale.reshape(-1), w.shape, 1, jnp.float32) for w in (one, two)]
    x = jnp.asarray(random.standard_normal((2, 5, 12)), jnp.float32)
    for made, apart in zip(dots("btd,dnh->btnh", x, join(rows)), (dot("btd,dnh->btnh", x, w) for w in rows)):
        np.testing.assert_array_equal(made, apart)
    np.testing.assert_array_equal(dense(rows[0]), dense(one))
    table = quantize_int8(jnp.asarray(random.standard_normal((10, 12)), jnp.float32), (1,))
    tied = Rows(table.q, table.scale[:, 0], table.shape, 0, jnp.float32)
    np.testing.assert_array_equal(dense(tied), dense(table))
    np.testing.assert_array_equal(take(tied, jnp.asarray([[3, 1]]), jnp.float32), dense(table)[jnp.asarray([[3, 1]])])
    np.testing.assert_allclose(dot("btd,vd->btv", x, tied), x @ dense(table).T, atol=2e-3)                 # fifteen bits of numbers up to 3


def small(tied, ffn=None):
    layer = Layer(Attention(4, 2, 8), ffn or Mlp(48))
    return ModelConfig(family="llama", vocab_size=64, dim=32, context=64, cycle=(layer,), repeats=2, tied=tied)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_decodes_with_integers(tied):
    model = models.Decoder(small(tied), Compute(dtype="float32", param_dtype="float32"))
    params = jax.tree.map(lambda w: w * 2, models.init_params(model, jax.random.key(0)))
    quantised = quantize(models.labels(model), params, "int8")
    apart, ready = decode.prepare(model, quantised)
    leaves = flatten(ready)
    assert isinstance(leaves["prefix_1/mixer/q"], Joined) and isinstance(leaves["prefix_1/mixer/q"].w, Rows) and isinstance(leaves["prefix_0/ffn/down"], Rows)
    assert isinstance(leaves["embed/table"], Rows if tied else Int8) and not any(isinstance(w, jax.Array) and w.ndim > 1 for w in leaves.values())
    tokens = jnp.asarray(random.integers(0, 64, (2, 20)))
    exact = model.apply({"params": jax.tree.map(dense, quantised, is_leaf=is_leaf)}, tokens)[0]
    got, plain = apart.apply({"params": ready}, tokens)[0], model.apply({"params": quantised}, tokens)[0]
    spread = float(exact.std())
    assert float(jnp.abs(plain - exact).max()) / spread < 5e-5                # the same weights, scaled after the sum instead of before it (float32)
    assert 0 < float(jnp.abs(got - exact).max()) / spread < 5e-3              # activations in fifteen bits, through two layers
    assert float(jnp.abs(exact - model.apply({"params": params}, tokens)[0]).max()) / spread > 5e-3, "eight bits are seen"
    for ids in decode.generate(model, quantised, None, [[1, 2, 3], [4]], max_new_tokens=6, stop=[]):
        assert len(ids) == 6


def test_what_is_quantised():
    model = models.Decoder(small(True, MixtureOfExperts(experts=4, top_k=2, hidden=16)), Compute(param_dtype="float32"))
    kinds = {name: type(w) for name, w in flatten(quantize(models.labels(model), models.init_params(model, jax.random.key(0)), "int8")).items()}
    assert kinds["cycle/0/mixer/q"] is kinds["embed/table"] is Int8 and all(issubclass(k, jax.Array) for name, k in kinds.items() if "norm" in name or "/ffn/gate" in name)
    with pytest.raises(ConfigError, match="quantize='int3': int8"):
        quantize(models.labels(model), {}, "int3")
    assert dc.fields(Int8)[0].name == "q"
