"""8-bit Adam against bitsandbytes (its codes), optax (its steps) and itself (saved, sharded)."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from train.test_step import far, run, setting

from llmjax import train
from llmjax.core import AdamW, make_mesh
from llmjax.models import labels
from llmjax.train.eight_bit import codebook, dequantize, quantize, scale_by_adam


def test_codes_are_bitsandbytes():
    """The 256 numbers; of 4 × 4,096 numbers the codes are its or, as its own search stops early, nearer ones beside them."""
    functional = pytest.importorskip("bitsandbytes.functional")
    torch = pytest.importorskip("torch")
    for signed in (True, False):
        np.testing.assert_allclose(codebook(signed), functional.create_dynamic_map(signed=signed).numpy(), rtol=1e-6)
        x = np.random.default_rng(0).normal(size=(4, 4096)).astype(np.float32) ** (1 if signed else 2)
        codes, scale = quantize(jnp.asarray(x), signed)
        theirs, state = functional.quantize_blockwise(torch.tensor(x), code=torch.tensor(codebook(signed)), blocksize=256)
        np.testing.assert_allclose(np.ravel(scale), state.absmax.numpy(), rtol=1e-6)
        back, other = dequantize(codes, scale, signed), functional.dequantize_blockwise(theirs, state).numpy()
        farther = np.abs(np.asarray(back) - x) - np.abs(other - x)
        assert farther.max() < 1e-6 * np.abs(x).max() and (np.asarray(codes) == theirs.numpy()).mean() > 0.95


def test_steps_are_near_optax():
    """30 steps on a model: the loss within 1 % of float32 Adam's, and its moments take a quarter of the bytes (a byte and 1/64 of a scale each)."""
    model, params, batch = setting()
    config = AdamW(1e-2, moments="int8", weight_decay=0.0)
    exact = run(model, params, batch, 30, train.make_optimizer(AdamW(1e-2, weight_decay=0.0), 1e-2, labels(model)))
    coarse = run(model, params, batch, 30, train.make_optimizer(config, 1e-2, labels(model)))
    assert coarse[1][-1] == pytest.approx(exact[1][-1], rel=1e-2) and coarse[1] != exact[1]
    wide = {"w": jnp.ones((64, 1024))}
    kept = sum(x.nbytes for x in jax.tree.leaves(scale_by_adam(0.9, 0.95, 1e-8).init(wide)))
    assert kept / sum(x.nbytes for x in jax.tree.leaves(optax.scale_by_adam().init(wide))) < 0.26


def test_divided_moments_are_whole_ones():
    """The codes lie as their weights do; float32 sums in another order may turn a code by one: 1e-3 of the losses."""
    model, params, batch = setting()
    optimizer = train.make_optimizer(AdamW(1e-2, moments="int8"), 1e-2, labels(model))
    many = run(model, params, batch, 3, optimizer, mesh=make_mesh(fsdp=4, tensor=2))
    np.testing.assert_allclose(many[1], run(model, params, batch, 3, optimizer)[1], rtol=1e-3)
    codes = [x for x in jax.tree.leaves(many[0].opt_state) if x.dtype == jnp.uint8]
    assert codes and all(x.sharding.shard_shape(x.shape) != x.shape for x in codes)
    assert far(many[0].params, many[0].params) == 0
