"""Attention over rows that lie on several devices, against `reference` on one: values and gradients, packed and padded."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.kernels.attention import blockwise, exchange, reference, ring, sharded, ulysses

T, N, K, H = 64, 4, 2, 8
PLAIN = dict(causal=True, in_order=True, window=None, softcap=None, scale=0.3, sinks=None, slopes=None)
CASES = {"causal": {}, "soft cap": dict(softcap=5.0), "short window": dict(window=10), "long window": dict(window=30), "sinks": dict(sinks=jnp.arange(4.0)),
         "slopes": dict(slopes=jnp.asarray([0.5, 0.25, 0.1, 0.05])), "two-sided": dict(causal=False), "two-sided window": dict(causal=False, window=9)}


def mesh():
    return jax.make_mesh((2, 4), ("data", "sequence"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def case(name):
    """-> q, k, v and a cotangent, settings, positions and segments of rows with three and two documents and padding."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(2, T, n, H)), jnp.float32) for n in (N, K, K, N)]
    segments, positions = np.ones((2, T), np.int32), np.zeros((2, T), np.int32)
    for row, starts in enumerate(((20, 45), (7,))):
        segments[row] = 1 + np.searchsorted(starts, np.arange(T), side="right")
        positions[row] = np.arange(T) - np.array([0, *starts])[segments[row] - 1]
    segments[1, -5:] = 0
    where = {f"{side}_{what}": jnp.asarray(x) for side in ("query", "key") for what, x in (("positions", positions), ("segments", segments))}
    return arrays, {**PLAIN, **CASES[name]}, where


def run(implementation, arrays, settings, where):
    q, k, v, g = arrays
    sinks = settings.pop("sinks")
    learn = (q, k, v) if sinks is None else (q, k, v, sinks)

    def total(*learn):
        y = implementation(*learn[:3], **where, **settings, sinks=learn[3] if len(learn) > 3 else None)
        return (y * g).sum(), y
    return jax.jit(jax.grad(total, argnums=tuple(range(len(learn))), has_aux=True))(*learn)


def far(a, b):
    return max(float(jnp.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


MORE = ("causal", "soft cap", "long window", "slopes", "two-sided")          # each with what another case has, less or alone


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in MORE)) for name in CASES])
def test_a_divided_row_is_a_whole_one(name):
    """float32, sums in another order, numbers up to some ten: 3e-5."""
    arrays, settings, where = case(name)
    want = run(reference, arrays, dict(settings), where)
    over = dict(batch=("data",), length=("sequence",))
    with jax.set_mesh(mesh()):
        for form in (functools.partial(ring, axis="sequence", zigzag=False), functools.partial(ulysses, blockwise, axis="sequence")):
            if name != "slopes" or form.func is ring:            # `reference` has a gradient for slopes, the forms need none
                assert far(run(sharded(form, **over), arrays, dict(settings), where), want) < 3e-5
        if settings["causal"]:
            wrong = run(sharded(functools.partial(ring, axis="sequence", zigzag=True), **over), arrays, dict(settings), where)
            assert far(wrong, want) > 1e-2, "an order that does not matter tests nothing"


def test_zigzag_there_and_back():
    """Four devices, eight chunks: device i holds chunks i and 7 - i."""
    x = jnp.arange(2 * 16).reshape(2, 16)
    turn = lambda back: jax.shard_map(lambda y: exchange(y, "sequence", back), in_specs=jax.P("data", "sequence"), out_specs=jax.P("data", "sequence"), check_vma=False)
    with jax.set_mesh(mesh()):
        there = jax.jit(turn(False))(x)
        assert there[0].tolist() == [0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9]
        assert (jax.jit(turn(True))(there) == x).all()


def test_what_cannot_be_divided_says_so():
    arrays, settings, where = case("causal")
    with jax.set_mesh(mesh()):
        odd = [x[:, :60] for x in arrays]
        with pytest.raises(ValueError, match="each device's 15 tokens into two equal chunks; make the context a multiple of 8"):
            run(sharded(functools.partial(ring, axis="sequence", zigzag=False), batch=("data",), length=("sequence",)), odd, settings | dict(), {k: x[:, :60] for k, x in where.items()})
        with pytest.raises(ValueError, match="3 query heads and 1 kv heads of a device do not divide over 4 devices"):
            few = [arrays[0][:, :, :3], *(x[:, :, :1] for x in arrays[1:3]), arrays[3][:, :, :3]]
            run(sharded(functools.partial(ulysses, blockwise, axis="sequence"), batch=("data",), length=("sequence",)), few, {**PLAIN}, where)
