"""Attention over pages against its slow twin and against `reference` on the same keys side by side: masks, sinks, slopes, latents, garbage in what nobody may see."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.kernels.attention import Rule, paged, reference
from llmjax.kernels.attention.paged import dense

B, T, N, K, H, PAGE, W = 3, 5, 4, 2, 8, 4, 9


def made(seed=0):
    """Rows with 31, 3 and 17 keys, of which the last 5, 3 and 1 ask; pages in no order; what lies beyond the newest key, and pages of nobody, are NaN."""
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(B, T, N, H)).astype(np.float32)
    k, v = (rng.normal(size=(40, PAGE, K, H)).astype(np.float32) for _ in range(2))
    table = rng.permutation(40)[:B * W].reshape(B, W).astype(np.int32)
    counts, asks = np.array([31, 3, 17]), np.array([5, 3, 1])
    used = np.arange(T)[None] < asks[:, None]
    positions = np.where(used, (counts - asks)[:, None] + np.arange(T)[None], 0).astype(np.int32)
    whole = np.full((2, B, W * PAGE, K, H), np.nan, np.float32)
    for b, count in enumerate(counts):
        for p in range(W * PAGE):
            place = table[b, p // PAGE], p % PAGE
            if p < count:
                whole[:, b, p] = k[place], v[place]
            else:
                k[place] = v[place] = np.nan
        table[b, -(-count // PAGE):] = [-1, 99, 0][b]
    return [jnp.asarray(x) for x in (q, k, v, table, positions, used)], whole, counts


RULES = {"plain": {}, "window, cap, sinks": dict(rule=Rule(window=6), softcap=5.0, sinks=True), "chunks": dict(rule=Rule(chunk=7)), "slopes": dict(slopes=True),
         "globals": dict(rule=Rule(window=4, globals=3))}


@pytest.mark.parametrize("kind", RULES)
def test_pages_are_the_twin_whatever_the_block(kind):
    args, _, _ = made()
    more = {"softcap": None, "scale": 0.3, **RULES[kind]}
    more |= {name: jnp.linspace(0.1, 0.9, N) for name in ("sinks", "slopes") if more.get(name)}
    want = dense(*args, **more)
    assert bool(jnp.isfinite(want).all()) and float(jnp.abs(want[0]).min()) > 0 and not want[1, 3:].any()
    for block in (1, 8, 512):
        got = jax.jit(lambda *a, block=block: paged(*a, **more, block=block))(*args)
        np.testing.assert_allclose(got, want, atol=2e-6)                      # float32, sums of at most 31 terms in another order


def test_the_twin_is_the_reference():
    (q, k, v, table, positions, used), (keys, values), counts = made()
    where = jnp.broadcast_to(jnp.arange(W * PAGE, dtype=jnp.int32)[None], (B, W * PAGE))
    known = (where < jnp.asarray(counts)[:, None]).astype(jnp.int32)
    keys, values = (jnp.where(known[..., None, None] > 0, x, 0) for x in (keys, values))
    for window in (None, 6):
        want = reference(q, keys, values, query_positions=positions, key_positions=where, query_segments=used.astype(jnp.int32), key_segments=known, causal=True, in_order=False,
                         window=window, softcap=None, scale=0.3)
        np.testing.assert_allclose(dense(q, k, v, table, positions, used, rule=Rule(window), softcap=None, scale=0.3), want, atol=1e-6)


def test_values_inside_keys_and_sixteen_bits():
    args, _, _ = made(1)
    np.testing.assert_array_equal(paged(*args, softcap=None, scale=0.3, width=5), paged(args[0], args[1], args[1][..., :5], *args[3:], softcap=None, scale=0.3))
    half = [x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x for x in args]
    got = jax.jit(lambda *a: paged(*a, softcap=None, scale=0.3))(*half)
    assert got.dtype == jnp.bfloat16 and float(jnp.abs(got.astype(jnp.float32) - dense(*args, softcap=None, scale=0.3)).max()) < 0.05      # 8 bits of mantissa


def test_mutations_are_caught():
    args, _, _ = made()
    want = dense(*args, rule=Rule(window=6), softcap=None, scale=0.3)
    q, k, v, table, positions, used = args
    others = {"a longer window": dense(*args, rule=Rule(window=7), softcap=None, scale=0.3), "another scale": dense(*args, rule=Rule(window=6), softcap=None, scale=0.33),
              "a page of somebody else": dense(q, k, v, table.at[0, 6].set(table[2, 0]), positions, used, rule=Rule(window=6), softcap=None, scale=0.3),
              "a query one position early": dense(q, k, v, table, jnp.maximum(positions - 1, 0), used, rule=Rule(window=6), softcap=None, scale=0.3)}
    for name, other in others.items():
        assert float(jnp.abs(other - want).max()) > 1e-3, name                # five hundred times what the comparison above allows
