"""Keys and values in 8 and 4 bits against NumPy twins, their error bounds, turning, odd sizes."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.kernels.attention import stored
from llmjax.kernels.attention.stored import Int4, Int8

RNG = np.random.default_rng(0)


def bf16(x):
    return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)


def twin(x, bits, group):
    """What a token's numbers come back as, one group at a time."""
    out = np.empty_like(x)
    for at in np.ndindex(*x.shape[:-1]):
        for start in range(0, x.shape[-1], group):
            part = x[at][start:start + group]
            if bits == 8:
                scale = bf16(np.abs(part).max() / np.float32(127))
                out[at][start:start + group] = np.clip(np.round(part / scale), -127, 127) * scale if scale else 0
            else:
                low = bf16(part.min())
                scale = bf16((part.max() - low) / np.float32(15))
                out[at][start:start + group] = np.clip(np.round((part - low) / (scale or 1)), 0, 15) * scale + low
    return out


@pytest.mark.parametrize(("kind", "bits", "size", "group"), [("int8", 8, 24, 24), ("int4", 4, 64, 32), ("int4", 4, 40, 8), ("int4", 4, 6, 2)])
def test_numbers_come_back_as_the_twin_says(kind, bits, size, group):
    x = RNG.normal(size=(2, 3, 2, size)).astype(np.float32) * np.array([1e-3, 1.0, 50.0], np.float32)[None, :, None, None] + 0.5
    x[0, 0, 0] = 0
    like = stored.empty(x.shape, kind)
    assert like.shape == x.shape and not np.asarray(stored.decode(like, jnp.float32)).any()
    kept = stored.encode(like, jnp.asarray(x))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), kept) == jax.tree.map(lambda a: (a.shape, a.dtype), like) and all(a.shape[:3] == (2, 3, 2) for a in jax.tree.leaves(kept))
    got = np.asarray(stored.decode(kept, jnp.float32))
    np.testing.assert_allclose(got, twin(x, bits, group), rtol=1e-6, atol=1e-7)
    groups, step = x.reshape(*x.shape[:3], -1, group), 254 if bits == 8 else 30          # half a step, and what 8 bits of a scale's mantissa lose at the far end
    widest = 2 * np.abs(groups).max(-1) if bits == 8 else np.ptp(groups, -1)
    assert (np.abs(got - x).reshape(groups.shape).max(-1) <= widest * (1 / (2 * step) + 2 ** -8) * 2 + np.abs(groups).max(-1) * 2 ** -8).all()


def test_turning_changes_no_product_and_spreads_outliers():
    q, k = (jnp.asarray(RNG.normal(size=(5, 48)).astype(np.float32)) for _ in range(2))
    k = k.at[:, 7].mul(40.0)                                                  # an outlier channel, as keys have them
    np.testing.assert_allclose(stored.turn(q) @ stored.turn(k).T, q @ k.T, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(stored.turn(stored.turn(k)), k, rtol=1e-5, atol=1e-4)
    error = lambda x, back: float(jnp.abs(back(stored.decode(stored.encode(stored.empty(x.shape, "int4"), x), jnp.float32)) - k).mean())
    assert error(stored.turn(k), stored.turn) < 0.7 * error(k, lambda x: x)
    assert stored.turn(q[:, :7]) is not None and (stored.turn(q[:, :7]) == q[:, :7]).all()


def test_kinds_and_sizes():
    assert isinstance(stored.empty((2, 8), "int8"), Int8) and isinstance(stored.empty((2, 8), "int4"), Int4)
    assert stored.empty((2, 0), "int4").shape == (2, 0) and stored.empty((2, 8), jnp.float32).dtype == jnp.float32
    with pytest.raises(ValueError, match="head of 7"):
        stored.empty((2, 7), "int4")
