"""Every form of the grouped product beside the slow twin; and that the CPU's form costs what its rows cost, not what its experts would."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.kernels import grouped_matmul
from llmjax.kernels.grouped_matmul import _plan as plan

SIZES = {"even": [16, 16, 16, 16], "uneven": [3, 40, 0, 21], "empty ends": [0, 0, 64, 0], "one row": [1, 62, 1, 0], "rows left over": [5, 20, 0, 7], "nothing": [0, 0, 0, 0]}


def inputs(dtype=jnp.float32, rows=64, groups=4, width=24, out=32):
    keys = jax.random.split(jax.random.key(0), 3)
    return jax.random.normal(keys[0], (rows, width)).astype(dtype), jax.random.normal(keys[1], (groups, width, out)), jax.random.normal(keys[2], (rows, out))


def answer(x, w, g, sizes, implementation):
    f = lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation)
    y, pull = jax.vjp(f, x, w)
    return y, *pull(g.astype(y.dtype))


def far(ours, theirs):
    return max(float(np.abs(np.float64(a) - np.float64(b)).max() / max(np.abs(np.float64(b)).max(), 1e-3)) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("implementation", ["blocks", "ragged"])
def test_equals_the_loop(implementation):
    x, w, g = inputs()
    ours, theirs = (jax.jit(lambda x, w, g, s, name=name: answer(x, w, g, s, name)) for name in (implementation, "loop"))
    for name, sizes in SIZES.items():
        sizes = jnp.array(sizes)
        assert far(ours(x, w, g, sizes), theirs(x, w, g, sizes)) < 2e-6, name  # float32 sums in another order


def test_bfloat16_keeps_float32_weight_gradients():
    x, w, g = inputs(jnp.bfloat16)
    sizes = jnp.array(SIZES["uneven"])
    ours = jax.jit(lambda *a: answer(*a, "blocks"))(x, w, g, sizes)
    assert [a.dtype for a in ours] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    rounded = lambda a: a.astype(jnp.bfloat16).astype(jnp.float32)
    theirs = answer(rounded(x), rounded(w), rounded(g), sizes, "loop")
    assert far(ours[:2], theirs[:2]) < 2 ** -8 and far(ours[2:], theirs[2:]) < 2e-6  # one rounding; products of bf16 are exact in float32


@pytest.mark.parametrize("rows, groups", [(5, 8), (1, 3), (300, 2), (700, 5)])
def test_other_sizes(rows, groups):
    x, w, g = inputs(rows=rows, groups=groups)
    sizes = jnp.array(np.random.default_rng(0).multinomial(rows, np.ones(groups) / groups))
    assert far(jax.jit(lambda *a: answer(*a, "blocks"))(x, w, g, sizes), answer(x, w, g, sizes, "loop")) < 2e-6


def test_a_row_in_the_wrong_group_shows():
    x, w, g = inputs()
    assert far(answer(x, w, g, jnp.array([16, 16, 16, 16]), "blocks"), answer(x, w, g, jnp.array([15, 17, 16, 16]), "loop")) > 0.1


@pytest.mark.parametrize("groups", [4, 64])
@pytest.mark.parametrize("uneven", [False, True])
def test_work_does_not_scale_with_experts(groups, uneven):
    """Rows that go through a product, padding included: at most twice those there are, however many experts and however they share them."""
    share = np.ones(groups) / groups if not uneven else 0.5 ** np.arange(1, groups + 1) / (1 - 0.5 ** groups)
    sizes = jnp.array(np.random.default_rng(0).multinomial(1024, share))
    size, count, *_ = plan(1024, sizes)
    assert 1024 <= size * int(count) <= 2 * 1024


def test_memory_does_not_scale_with_experts():
    """No [M, E, F] and no [E, M, D] anywhere: what is held besides the matrices is of the order of the rows."""
    def temp(groups):
        x, w, _ = inputs(rows=512, groups=groups)
        f = lambda x, w, s: grouped_matmul(x, w, s, implementation="blocks")
        return jax.jit(f).lower(x, w, jnp.zeros((groups,), jnp.int32)).compile().memory_analysis().temp_size_in_bytes
    assert temp(32) < 1.5 * temp(4) + 65536


def test_auto_is_blocks_on_a_cpu():
    x, w, _ = inputs()
    sizes = jnp.array(SIZES["uneven"])
    assert str(jax.make_jaxpr(lambda x: grouped_matmul(x, w, sizes))(x)) == str(jax.make_jaxpr(lambda x: grouped_matmul(x, w, sizes, implementation="blocks"))(x))


def test_arguments_are_checked():
    x, w, _ = inputs()
    with pytest.raises(ValueError, match="allowed are auto, blocks, ragged, loop"):
        grouped_matmul(x, w, jnp.array(SIZES["even"]), implementation="fast")
    for bad in ((x[:, :5], w, jnp.array(SIZES["even"])), (x, w, jnp.ones((4,))), (x, w, jnp.ones((3,), int))):
        with pytest.raises(ValueError, match="must be"):
            grouped_matmul(*bad)
