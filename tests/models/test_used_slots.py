"""On a CPU a few queries look at no more than a part of a contiguous cache that is mostly unused: the same logits, and what lies beyond is not even read."""
import dataclasses as dc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pieces import V, make

from llmjax import decode
from llmjax.core import Attention, Layer, Mlp, ModelConfig, Rope
from llmjax.core.model_config import LatentAttention
from llmjax.models import attention

SIZE, USED = 64, 16
FULL, RING, LATENT = Attention(4, 2, 8, Rope()), Attention(4, 2, 8, Rope(), window=6), LatentAttention(4, 12, 6, 8, 10)
CASES = {"float32": ((FULL, RING), "float32"), "int8": ((FULL, RING), "int8"), "latent": ((LATENT,), "float32")}


def spoiled(cache):
    """The cache with NaN in every float beyond the slots in use."""
    def one(path, x):
        axis = int(path[0].key == "cycle") + 1
        unused = jnp.arange(x.shape[axis]).reshape(-1, *(1,) * (x.ndim - axis - 1)) >= USED
        return jnp.where(unused, jnp.nan, x).astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return dc.replace(cache, layers=jax.tree_util.tree_map_with_path(one, cache.layers))


@pytest.mark.parametrize("case", CASES)
def test_only_used_slots_are_read(case, monkeypatch):
    mixers, kind = CASES[case]
    model, params, _, _ = make(ModelConfig(V, 32, cycle=tuple(Layer(m, Mlp(8)) for m in mixers), repeats=2, context=64))
    tokens = np.random.default_rng(0).integers(1, V, (2, 12)).astype(np.int32)
    lengths, at = np.asarray([3, 9]), np.arange(9)[None]
    _, cache = decode.prefill(model, params, tokens[:, :9], np.broadcast_to(at, (2, 9)), (at < lengths[:, None]).astype(np.int32), decode.init_cache(model, 2, SIZE, kind))

    def answer(slots, cache, count):
        monkeypatch.setattr(attention, "SLOTS", slots)          # a fresh program each time: nothing else tells jax that it is another
        step = jax.jit(lambda cache: model.apply({"params": params}, tokens[:, 9:9 + count], lengths[:, None] + np.arange(count)[None], np.ones((2, count), np.int32), cache))
        return np.asarray(step(cache)[0])
    for count in (1, 3):
        want, got = answer(10**6, cache, count), answer(4, spoiled(cache), count)
        np.testing.assert_allclose(got, want, atol=1e-5 * want.std())                   # the same numbers but for the order of sums
    assert np.isnan(answer(10**6, spoiled(cache), 1)).any()                             # a masked value is still multiplied: had it been read, this would show
