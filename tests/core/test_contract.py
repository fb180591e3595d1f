"""`contract` beside float32 einsum: every form of equation, both directions, all transformations; and that it is plain off the CPU."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from llmjax.core.contract import accumulate, contract
from llmjax.core.platform import partitioned, platform

SIZES = dict(b=2, t=12, d=16, n=4, h=8, f=24, v=10, e=3, r=5)
EQUATIONS = ["btd,df->btf", "btd,dnh->btnh", "btd,ndh->btnh", "btd,dnh->bnth", "btnh,nhd->btd", "bnth,nhd->btd", "btd,vd->btv", "btd,dv->vbt", "etd,edf->etf", "ted,edf->tef",
             "btd,edf->btef", "td,df->tf", "btef,efd->bted", "bd,df->bf"]


def operands(equation, dtype, sizes=SIZES, scale=1.0):
    terms, y = equation.split("->")
    shapes = [[sizes[c] for c in term] for term in (*terms.split(","), y)]
    keys = jax.random.split(jax.random.key(0), 3)
    x, w, g = (scale * jax.random.normal(key, shape) for key, shape in zip(keys, shapes))
    return x.astype(dtype), w, g


def far(a, b):
    """Greatest difference, relative to the greatest value."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return np.abs(a - b).max() / np.abs(b).max()


def pull(f, x, w, g):
    y, back = jax.vjp(f, x, w)
    return y, *back(g.astype(y.dtype))


@pytest.mark.parametrize("length", [12, 13])  # 13 is prime: the padded split
@pytest.mark.parametrize("equation", EQUATIONS)
def test_equals_float32_einsum(equation, length):
    x, w, g = operands(equation, jnp.bfloat16, dict(SIZES, t=length, b=1 if length == 13 else 2))
    g = g.astype(jnp.bfloat16)
    exact = pull(lambda x, w: jnp.einsum(equation, x, w), x.astype(jnp.float32), w.astype(jnp.bfloat16).astype(jnp.float32), g.astype(jnp.float32))
    ours = jax.jit(lambda x, w, g: pull(lambda x, w: contract(equation, x, w), x, w, g))(x, w, g)
    assert [a.dtype for a in ours] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    assert far(ours[0], exact[0]) < 2 ** -8 and far(ours[1], exact[1]) < 2 ** -8  # one rounding to 8 bits of mantissa
    assert far(ours[2], exact[2]) < 1e-6  # products of bf16 are exact in float32; only the order of the sum differs: no rounding to bf16 on the way


@pytest.mark.parametrize("equation", EQUATIONS)
def test_float32_activations_are_the_plain_einsum(equation):
    x, w, g = operands(equation, jnp.float32)
    for a, b in zip(pull(lambda x, w: contract(equation, x, w), x, w, g), pull(lambda x, w: jnp.einsum(equation, x, w), x, w, g)):
        assert a.dtype == jnp.float32 and far(a, b) < 1e-6


@pytest.mark.parametrize("equation", ["etd,edf->etf", "btd,df->btf", "btd,vd->btv"])
def test_a_transpose_may_follow(equation):
    """XLA's CPU backend folds a transpose into a 16-bit product and then cannot run it; `contract` keeps them apart, in values and in gradients."""
    x, w, _ = operands(equation, jnp.bfloat16)

    def turned(x, w):
        y = contract(equation, x, w, out_dtype=jnp.float32)
        return (y.swapaxes(0, 1) * y.swapaxes(0, 1)).sum() + (y.swapaxes(-1, -2) ** 2).sum()
    dx, dw = jax.jit(lambda x, w: tuple(a.swapaxes(-1, -2) * 2 for a in jax.grad(turned, (0, 1))(x, w)))(x, w)
    want = jax.grad(lambda w: 2 * (jnp.einsum(equation, x.astype(jnp.float32), w) ** 2).sum())(w)
    assert far(dw.swapaxes(-1, -2) / 2, want) < 2e-2 and jnp.isfinite(dx).all()
    a = jax.jit(lambda x, w: accumulate("etd,edf->etf", x, w).swapaxes(1, 2))(*(jnp.ones((3, 4, n), jnp.bfloat16) for n in (4, 6)))
    assert (a == 4).all()


def test_under_vmap_scan_remat():
    x, w, _ = operands("btd,df->btf", jnp.bfloat16, dict(SIZES, f=16))
    stack = jnp.stack([w, 2 * w])

    def body(x, w):
        return contract("btd,df->btf", x, w), None
    scanned = lambda stack, x: jax.lax.scan(jax.checkpoint(body), x, stack)[0].astype(jnp.float32).sum()
    looped = lambda stack, x: contract("btd,df->btf", contract("btd,df->btf", x, stack[0]), stack[1]).astype(jnp.float32).sum()
    for a, b in zip(jax.jit(jax.grad(scanned, (0, 1)))(stack, x), jax.jit(jax.grad(looped, (0, 1)))(stack, x)):
        assert far(a, b) < 2 ** -7
    each = lambda x, w: contract("td,df->tf", x, w).astype(jnp.float32).sum()
    grads = jax.jit(jax.vmap(jax.grad(each, (0, 1))))(x, stack)
    for i in range(2):
        for a, b in zip(grads, jax.grad(each, (0, 1))(x[i], stack[i])):
            assert far(a[i], b) < 2 ** -8


def test_out_dtype():
    x, w, _ = operands("btd,vd->btv", jnp.bfloat16)
    assert contract("btd,vd->btv", x, w, out_dtype=jnp.float32).dtype == jnp.float32
    assert contract("btd,vd->btv", x, w).dtype == jnp.bfloat16
    assert far(contract("btd,vd->btv", x, w, out_dtype=jnp.float32), jnp.einsum("btd,vd->btv", x.astype(jnp.float32), w.astype(jnp.bfloat16).astype(jnp.float32))) < 1e-6


@pytest.mark.parametrize("equation", ["btd,df", "b...d,df->b...f", "btd,df->btq", "btx,df->btf", "bbd,df->bf", "btd->bt"])
def test_refuses_other_equations(equation):
    with pytest.raises(ValueError, match="equation"):
        contract(equation, jnp.ones((2, 3, 4)), jnp.ones((4, 5)))


def test_refuses_integer_weights():
    with pytest.raises(ValueError, match="int8"):
        contract("td,df->tf", jnp.ones((3, 4)), jnp.ones((4, 5), jnp.int8))


def mesh(size):
    return jax.make_mesh((size,), ("data",), devices=jax.devices()[:size], axis_types=(jax.sharding.AxisType.Auto,))


def test_platform_is_the_ambient_meshs():
    assert platform() == jax.default_backend() and not partitioned()
    with jax.set_mesh(mesh(1)):
        seen = []
        jax.jit(lambda x: (seen.append((platform(), partitioned())), x)[1])(1.0)
        assert seen == [("cpu", False)]
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((4,), ("data",), (jax.sharding.AxisType.Auto,), abstract_device=device)):
        assert platform() == "tpu" and partitioned()
        jaxpr = jax.make_jaxpr(lambda x, w: contract("btd,df->btf", x, w))(jnp.ones((2, 3, 4), jnp.bfloat16), jnp.ones((4, 5)))
        assert "custom_vjp" not in str(jaxpr) and "barrier" not in str(jaxpr)


def test_sharded_equals_single():
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 devices (XLA_FLAGS=--xla_force_host_platform_device_count=8)")
    x, w, g = operands("btd,df->btf", jnp.bfloat16, dict(SIZES, b=4))
    f = lambda x, w, g: pull(lambda x, w: contract("btd,df->btf", x, w), x, w, g)
    single = jax.jit(f)(x, w, g)
    with jax.set_mesh(mesh(4)):
        assert partitioned()
        local = []
        jax.jit(jax.shard_map(lambda x: (local.append(partitioned()), x)[1], in_specs=jax.P("data"), out_specs=jax.P("data")))(x)
        assert local == [False]
        sharded = jax.jit(f)(jax.device_put(x, jax.P("data")), jax.device_put(w, jax.P(None, "data")), jax.device_put(g, jax.P("data")))
    for a, b in zip(sharded, single):
        assert far(a, b) < 2 ** -7


@pytest.mark.parametrize("out_dtype", [None, jnp.float32])
@pytest.mark.parametrize("equation", ["btd,dnh->btnh", "btd,vd->btv", "etd,edf->etf"])
def test_on_a_tpu_everything_leaves_in_the_dtype_asked_for(equation, out_dtype):
    """The form traced for a TPU, run here: the float32 sums rounded once; and in its gradient no product answers in float32, so nothing is added up between devices in it."""
    x, w, g = operands(equation, jnp.bfloat16)
    tpu = jax.sharding.AbstractMesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=jax.sharding.AbstractDevice("TPU v5e", 1, "tpu"))
    ours = functools.partial(contract, equation, out_dtype=out_dtype)
    with jax.sharding.use_abstract_mesh(tpu):
        closed = jax.make_jaxpr(lambda x, w, g: pull(ours, x, w, g))(x, w, g)
    y, dx, dw = jax.core.eval_jaxpr(closed.jaxpr, closed.consts, x, w, g)
    exact = pull(lambda x, w: jnp.einsum(equation, x, w), x.astype(jnp.float32), w.astype(jnp.bfloat16).astype(jnp.float32), g.astype(jnp.bfloat16).astype(jnp.float32))
    assert y.dtype == (out_dtype or jnp.bfloat16) and dx.dtype == jnp.bfloat16 and dw.dtype == jnp.float32
    assert far(y, exact[0]) < (1e-6 if out_dtype else 2 ** -8) and far(dx, exact[1]) < 2 ** -7 and far(dw, exact[2]) < 2 ** -7       # one rounding to 8 bits, and CPU products of 16 bits' own
    results = [v.aval.dtype for e in products(closed.jaxpr) for v in e.outvars]
    assert results[0] == (out_dtype or jnp.bfloat16) and all(dtype == jnp.bfloat16 for dtype in results[1:])


def products(jaxpr):
    """The dot_generals of a program, in order."""
    for e in jaxpr.eqns:
        if e.primitive.name == "dot_general":
            yield e
        for inner in jaxprs_in_params(e.params):
            yield from products(inner)
