"""All kv heads as one against `reference` and `paged` with the heads apart."""
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.kernels.attention import blockwise, merged, paged, pays, reference
from llmjax.models.cache import Pool
from llmjax.models.paged import write

SETTINGS = dict(plain={}, window=dict(window=5), capped=dict(softcap=3.0), sinks=dict(sinks=True), slopes=dict(slopes=True))


def arrays(rows: int, queries: int, heads: int, kv_heads: int, keys: int = 19, dim: int = 6, values: int = 4):
    rng = np.random.default_rng(heads)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((rows, queries, heads, dim), (rows, keys, kv_heads, dim), (rows, keys, kv_heads, values))]


@pytest.mark.parametrize("knobs", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("queries, heads, kv_heads", [(1, 6, 3), (1, 4, 4), (3, 6, 2)])
def test_equals_reference(queries, heads, kv_heads, knobs):
    """1e-5: sums of another order, float32. Row 0 has room that is not taken, and one query that sees nothing."""
    q, k, v = arrays(2, queries, heads, kv_heads)
    rng = np.random.default_rng(1)
    where = dict(key_positions=jnp.broadcast_to(jnp.arange(19, dtype=jnp.int32), (2, 19)), key_segments=jnp.asarray(np.arange(19)[None] < np.array([[11], [19]]), jnp.int32),
                 query_positions=jnp.arange(10, 10 + queries, dtype=jnp.int32)[None].repeat(2, 0), query_segments=jnp.ones((2, queries), jnp.int32).at[0, 0].set(0))
    more = {name: jnp.asarray(rng.normal(size=heads), jnp.float32) if value is True else value for name, value in knobs.items()}
    settings = dict(causal=True, in_order=False, scale=0.4, **({"window": None, "softcap": None} | more))
    wanted = reference(q, k, v, **where, **settings)
    for attention in (blockwise, reference):
        np.testing.assert_allclose(merged(attention, q, k, v, **where, **settings), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("queries", [1, 3])
def test_pages_joined_equal_pages_apart(queries, monkeypatch):
    q, k, v = arrays(5, queries, 6, 3, keys=4)
    table = jnp.asarray([[1, 3, 0], [4, 2, 0]], jnp.int32)
    positions, used = jnp.asarray([[5, 6, 7], [2, 3, 4]], jnp.int32)[:, :queries], jnp.asarray([[True] * 3, [True, True, False]])[:, :queries]
    attention = functools.partial(paged, softcap=None, scale=0.4)
    joined = attention(q[:2], k, v, table, positions, used)
    monkeypatch.setattr(sys.modules[paged.__module__], "pays", lambda *_: False)
    apart = attention(q[:2], k, v, table, positions, used)
    assert np.any(joined != apart)              # another order of sums: both ways were taken
    np.testing.assert_allclose(joined, apart, rtol=1e-5, atol=1e-5)


def test_keys_are_read_as_they_lie():
    """One query's products take keys and values without turning them: no transposed copy of the cache in the program, which the heads apart have."""
    q, k, v = arrays(1, 1, 6, 3, keys=64, dim=16, values=16)
    settings = dict(causal=True, in_order=False, window=None, softcap=None, scale=0.4, key_positions=jnp.arange(64, dtype=jnp.int32)[None], query_positions=jnp.full((1, 1), 60, jnp.int32))

    def turned(attention):
        text = jax.jit(functools.partial(attention, **settings)).lower(q, k, v).compile().as_text()
        return any(f"f32[{shape}]" in text for shape in ("3,16,64", "3,64,16", "1,3,64,16", "1,3,16,64"))
    assert turned(blockwise) and not turned(functools.partial(merged, blockwise))


def test_pays_for_few_queries_of_several_heads():
    q, k, _ = arrays(1, 1, 6, 3)
    assert pays(q, k)
    assert not pays(q, k[:, :, :1]) and not pays(jnp.concatenate([q] * 11, 1), k) and not pays(q, {"q": k})


@pytest.mark.parametrize("rows", [1, 3])
def test_a_step_does_not_copy_its_pages(rows):
    """Nothing the size of the pool is made beside it, whatever joins the heads."""
    pool = Pool(jnp.zeros((512, 16, 3, 8)), jnp.zeros((512, 16, 3, 8)))
    at, table = jnp.arange(rows), jnp.zeros((rows, 4), jnp.int32)

    def step(pool, new, q, at, table):
        pool = write(pool, new, new, at[:, None])
        return pool, paged(q, pool.k, pool.v, table, at[:, None], at[:, None] >= 0, softcap=None, scale=0.4)
    q = jnp.zeros((rows, 1, 6, 8))
    program = jax.jit(step, donate_argnums=0).lower(pool, jnp.zeros((rows, 1, 3, 8)), q, at, table).compile()
    assert pays(q, pool.k)
    assert program.memory_analysis().temp_size_in_bytes < pool.k.nbytes / 2
