"""A few queries by our own machine code, against `reference` and against pages side by side (`dense`): masks, sinks, latents, parts, garbage in what nobody sees, other rows beside."""
import ctypes

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.core import native
from llmjax.core.native.team import BOARD
from llmjax.kernels.attention import Rule, few, fits, paged, reference
from llmjax.kernels.attention.few import MOST
from llmjax.kernels.attention.paged import dense

random = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.float32)


def slots(rows, queries, size):
    """Where keys and queries stand: a row that is half full, one of two documents, one whose first slots are padding, and a query that is padding."""
    keys = np.broadcast_to(np.arange(size), (rows, size))
    segments = np.ones((rows, size), np.int32)
    segments[0, size // 2:] = 0
    segments[1 % rows, : size // 3] = 2
    segments[2 % rows, :5] = 0
    asked = np.ones((rows, queries), np.int32)
    asked[-1, 0] = 0
    positions = np.broadcast_to(np.arange(size - queries, size), (rows, queries)) - np.arange(rows)[:, None]
    return {name: jnp.asarray(x, jnp.int32) for name, x in dict(query_positions=positions, key_positions=keys, query_segments=asked, key_segments=segments).items()}


@pytest.mark.parametrize("size", [0.3, 3.0])
@pytest.mark.parametrize("heads, kv_heads, dim, values", [(9, 3, 64, 64), (7, 1, 16, 48), (4, 4, 80, 16), (12, 2, 32, 144)])
def test_equals_reference(heads, kv_heads, dim, values, size):
    """Float32 sums in another order, exponentials to 2 units of the last place, and scores rounded to 6e-8 of themselves several times, which e^x carries into the weights (random
    ones stay five times below the product of norms). 700 slots are
    three parts, 45 and 700 no whole vectors."""
    for length, queries, more in ((45, 1, {}), (700, 3, dict(window=300)), (700, MOST, dict(sinks=normal(heads)))):
        q, k, v = normal(3, queries, heads, dim) * size, normal(3, length, kv_heads, dim) * size, normal(3, length, kv_heads, values)
        assert fits(q, k, v, width=None, softcap=None, slopes=None)
        settings = dict(causal=True, scale=dim ** -0.5) | dict(window=None) | more
        where = slots(3, queries, length)
        wanted = reference(q, k, v, **where, **settings, in_order=False, softcap=None)
        largest = float(jnp.linalg.norm(q, axis=-1).max() * jnp.linalg.norm(k, axis=-1).max()) * dim ** -0.5
        np.testing.assert_allclose(jax.jit(lambda *a, w=where, s=settings: few(*a, **w, **s))(q, k, v), wanted, rtol=0, atol=(1e-6 + 2e-8 * largest) * float(jnp.abs(v).max()))
        assert not wanted[-1, 0].any() or "sinks" in more


def test_sharp_and_flat_scores():
    """One key far above the others, far below zero, and all alike: e^x over its whole range."""
    q, v = jnp.ones((1, 1, 1, 16)), normal(1, 300, 1, 16)
    for k in (jnp.linspace(-200, 80, 300), jnp.zeros(300).at[7].set(30), jnp.linspace(-1e30, -1e29, 300)):
        k = jnp.broadcast_to(k[None, :, None, None], (1, 300, 1, 16))
        where = dict(query_positions=jnp.full((1, 1), 299))
        wanted = reference(q, k, v, **where, causal=True, in_order=False, window=None, softcap=None, scale=1 / 16)
        np.testing.assert_allclose(few(q, k, v, **where, causal=True, window=None, scale=1 / 16), wanted, rtol=0, atol=5e-6)


def pages(kind=jnp.float32, seed=0):
    """Rows with 300, 3 and 17 keys in pages of 5, those in no order; NaN beyond the newest key and in pages of nobody."""
    rng = np.random.default_rng(seed)
    k, v = (rng.normal(size=(200, 5, 2, 32)).astype(np.float32) for _ in range(2))
    table, counts, asks = rng.permutation(200)[:3 * 62].reshape(3, 62).astype(np.int32), np.array([300, 3, 17]), np.array([4, 3, 1])
    used = np.arange(4)[None] < asks[:, None]
    positions = np.where(used, (counts - asks)[:, None] + np.arange(4)[None], 0).astype(np.int32)
    for b, count in enumerate(counts):
        for p in range(count, 310):
            k[table[b, p // 5], p % 5] = v[table[b, p // 5], p % 5] = np.nan
        table[b, -(-count // 5):] = [-1, 10**6, 0][b]
    k, v = jnp.asarray(k, kind), jnp.asarray(v, kind)
    return jnp.asarray(rng.normal(size=(3, 4, 6, 32)), kind), k, v, jnp.asarray(table), jnp.asarray(positions), jnp.asarray(used)


RULES = {"plain": {}, "window, sinks": dict(rule=Rule(window=6), sinks=jnp.linspace(0.1, 0.9, 6)), "chunks": dict(rule=Rule(chunk=7)), "globals": dict(rule=Rule(window=4, globals=3))}


@pytest.mark.parametrize("kind", RULES)
def test_pages_are_the_twin(kind):
    given, more = pages(), dict(softcap=None, scale=0.3, **RULES[kind])
    wanted = dense(*given, **more)
    assert bool(jnp.isfinite(wanted).all()) and not wanted[1, 3:].any()
    np.testing.assert_allclose(jax.jit(lambda *a: paged(*a, **more))(*given), wanted, rtol=0, atol=3e-6)


def test_values_inside_keys_and_sixteen_bits():
    q, k, v, *where = pages()
    np.testing.assert_array_equal(paged(q, k, v, *where, softcap=None, scale=0.3, width=16), paged(q, k, k[..., :16], *where, softcap=None, scale=0.3))
    q, k, v, *where = pages(jnp.bfloat16)
    got, wide = paged(q, k, v, *where, softcap=None, scale=0.3), paged(*(x.astype(jnp.float32) for x in (q, k, v)), *where, softcap=None, scale=0.3)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, wide.astype(jnp.bfloat16))          # the same sums, rounded once


def test_a_row_depends_on_itself_alone():
    """Bit for bit: alone, beside rows of more parts, from pages or side by side, one query at a time or several."""
    q, k, v, table, positions, used = pages()
    settings = dict(softcap=None, scale=0.3)
    whole = paged(q, k, v, table, positions, used, **settings)
    for b in range(3):
        np.testing.assert_array_equal(paged(q[b:b + 1], k, v, table[b:b + 1], positions[b:b + 1], used[b:b + 1], **settings), whole[b:b + 1])
    np.testing.assert_array_equal(paged(q[:, 2:3], k, v, table, positions[:, 2:3], used[:, 2:3], **settings), whole[:, 2:3])
    beside = [x[table[0]].reshape(1, 310, 2, 32) for x in (k, v)]
    np.testing.assert_array_equal(few(q[:1], *beside, query_positions=positions[:1], causal=True, window=None, scale=0.3), whole[:1])


def test_a_poisoned_row_stays_alone():
    q, k, v, *where = pages()
    wanted = paged(q, k, v, *where, softcap=None, scale=0.3)
    got = paged(q.at[0, 1].set(jnp.nan), k, v, *where, softcap=None, scale=0.3)
    assert jnp.isnan(got[0, 1]).all()
    np.testing.assert_array_equal(got.at[0, 1].set(0), wanted.at[0, 1].set(0))
    poisoned = paged(q, k, v.at[where[0][0, 2], 1, 0, 5].set(jnp.inf), *where, softcap=None, scale=0.3)          # a value that row 0 sees
    assert jnp.isinf(poisoned[0, :, :3, 5]).all() and bool(jnp.isfinite(poisoned[1:]).all())


def test_mutations_are_caught():
    q, k, v, table, positions, used = pages()
    wanted = dense(q, k, v, table, positions, used, rule=Rule(window=6), softcap=None, scale=0.3)
    others = {"a longer window": paged(q, k, v, table, positions, used, rule=Rule(window=7), softcap=None, scale=0.3),
              "a page of somebody else": paged(q, k, v, table.at[0, 59].set(table[2, 0]), positions, used, rule=Rule(window=6), softcap=None, scale=0.3),
              "heads of another group": paged(q[:, :, ::-1], k, v, table, positions, used, rule=Rule(window=6), softcap=None, scale=0.3)[:, :, ::-1]}
    for name, other in others.items():
        assert float(jnp.abs(other - wanted).max()) > 1e-3, name


def test_what_it_does_not_do():
    q, k = normal(1, 1, 4, 32), normal(1, 20, 2, 32)
    how = dict(width=None, softcap=None, slopes=None)
    assert fits(q, k, k, **how)
    assert not any(fits(*a, **(how | more)) for a, more in (((q, k, k), dict(softcap=5.0)), ((q, k, k), dict(slopes=jnp.ones(4))), ((normal(1, 1, 4, 24), normal(1, 20, 2, 24), k), {}),
                                                           ((q, k, k.astype(jnp.bfloat16)), {}), ((normal(1, MOST + 1, 4, 32), k, k), {}), ((q, k, k), dict(width=20))))


def test_a_processor_with_fewer_registers():
    """It can be compiled for AVX2 and NEON's width too."""
    board = (ctypes.c_int64 * BOARD)()
    native.compiled("queries_bfloat16", 2, ctypes.addressof(board), "haswell")
