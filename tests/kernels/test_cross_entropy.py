"""The chunked loss beside log_softmax over everything: values, gradients, chunk sizes that do not divide, what it must not compute or hold."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llmjax.core import make_mesh
from llmjax.core.contract import contract
from llmjax.kernels import chunked_cross_entropy, chunked_logprobs

B, T, D, V = 3, 10, 16, 40


def unembed(params, x):
    return 3.0 * jnp.tanh(contract("btd,dv->btv", x * params["norm"].astype(x.dtype)[None, None], params["head"], out_dtype=jnp.float32) / 3.0)


def inputs(dtype=jnp.float32, scale=1.0, length=T):
    keys = jax.random.split(jax.random.key(0), 5)
    params = dict(head=scale * jax.random.normal(keys[0], (D, V)) / 4, norm=1 + 0.1 * jax.random.normal(keys[1], (D,)), layers=jnp.ones((7, D, D)), table=jnp.ones((V, D)))
    x = jax.random.normal(keys[2], (B, length, D)).astype(dtype)
    targets = jax.random.randint(keys[3], (B, length), 0, V)
    weights = jax.random.uniform(keys[4], (B, length)) * (targets % 4 > 0)
    return params, x, targets, weights


def slow(params, x, targets, weights, label_smoothing=0.0, z_loss=0.0):
    logits = unembed(params, x).astype(jnp.float32)
    goal = (1 - label_smoothing) * jax.nn.one_hot(targets, V) + label_smoothing / V
    z = z_loss * jax.nn.logsumexp(logits, -1) ** 2
    return (weights * (z - (goal * jax.nn.log_softmax(logits)).sum(-1))).sum(), (weights * z).sum()


def far(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
    return max(float(np.abs(np.float64(a) - np.float64(b)).max() / max(np.abs(np.float64(b)).max(), 1e-3)) for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)))


@pytest.mark.parametrize("chunk", [3, 5, 512])
@pytest.mark.parametrize("settings", [{}, dict(label_smoothing=0.1, z_loss=1e-2)])
def test_equals_log_softmax(settings, chunk):
    ours = lambda *a: chunked_cross_entropy(unembed, *a, chunk=chunk, **settings)
    theirs = lambda *a: slow(*a, **settings)
    pull = lambda f: jax.jit(jax.value_and_grad(lambda *a: tuple(2.5 * total for total in f(*a)), (0, 1, 3), has_aux=True))
    pull_ours, pull_theirs = pull(ours), pull(theirs)
    for scale in (1.0, 20.0):
        arrays = inputs(scale=scale)
        assert far(pull_ours(*arrays), pull_theirs(*arrays)) < 2e-6  # float32 sums in another order
        assert far(jax.jit(ours)(*arrays), theirs(*arrays)) < 2e-6


def test_a_wrong_setting_shows():
    arrays = inputs()
    value = lambda **s: float(chunked_cross_entropy(unembed, *arrays, **s)[0])
    base = value(label_smoothing=0.1, z_loss=1e-2)
    assert abs(value(label_smoothing=0.11, z_loss=1e-2) / base - 1) > 1e-5 and abs(value(label_smoothing=0.1, z_loss=1.1e-2) / base - 1) > 1e-4


def test_bfloat16_features_keep_float32_weight_gradients():
    params, x, targets, weights = inputs(jnp.bfloat16)
    ours = jax.grad(lambda p, x: chunked_cross_entropy(unembed, p, x, targets, weights, chunk=4)[0], (0, 1))(params, x)
    theirs = jax.grad(lambda p, x: slow(p, x, targets, weights)[0], (0, 1))(params, x.astype(jnp.float32))
    assert ours[0]["head"].dtype == jnp.float32 and ours[1].dtype == jnp.bfloat16
    assert max(far(ours[0]["head"], theirs[0]["head"]), far(ours[1].astype(jnp.float32), theirs[1])) < 2e-2  # dlogits and products rounded to 2^-8


def test_logprobs():
    params, x, targets, weights = inputs()
    slowly = lambda p, x: jnp.take_along_axis(jax.nn.log_softmax(unembed(p, x)), targets[..., None], -1)[..., 0]
    pull = lambda f: jax.grad(lambda p, x: (weights * jnp.exp(f(p, x))).sum(), (0, 1))(params, x)
    for chunk in (4, 512):
        quickly = functools.partial(lambda chunk, p, x: chunked_logprobs(unembed, p, x, targets, chunk=chunk), chunk)
        assert far(quickly(params, x), slowly(params, x)) < 2e-6
        assert far(pull(quickly), pull(slowly)) < 5e-6


def test_targets_outside_the_vocabulary_need_weight_zero():
    params, x, targets, weights = inputs()
    masked = jnp.where(weights > 0, targets, -100)
    assert far(chunked_cross_entropy(unembed, params, x, masked, weights), chunked_cross_entropy(unembed, params, x, targets, weights)) == 0


def shapes_in(jaxpr):
    """Every result shape in a jaxpr and the jaxprs inside it."""
    for equation in jaxpr.eqns:
        for var in equation.outvars:
            yield equation.primitive.name, getattr(var.aval, "shape", None)
        for value in equation.params.values():
            for inner in jax.tree.leaves(value, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from shapes_in(inner)


def test_evaluation_makes_no_gradient_and_nobody_holds_all_logits():
    params, x, targets, weights = inputs(length=12)
    forward = list(shapes_in(jax.make_jaxpr(lambda p, x: chunked_cross_entropy(unembed, p, x, targets, weights, chunk=4))(params, x).jaxpr))
    text = jax.jit(lambda p, x: chunked_cross_entropy(unembed, p, x, targets, weights, chunk=4)).lower(params, x).as_text()
    assert text.count("stablehlo.dot_general") == 1  # the logits; a gradient would be three
    backward = list(shapes_in(jax.make_jaxpr(jax.grad(lambda p, x: chunked_cross_entropy(unembed, p, x, targets, weights, chunk=4)[0], (0, 1)))(params, x).jaxpr))
    for shapes in (forward, backward):
        assert not [s for _, s in shapes if s in ((B, 12, V), (B * 12, V))]


def test_only_what_is_read_and_learned_gets_a_gradient():
    params, x, targets, weights = inputs(length=12)
    loss = lambda p, x: chunked_cross_entropy(unembed, p, x, targets, weights, chunk=4)[0]
    whole = jax.jit(jax.grad(loss))
    assert "7x16x16" not in "".join(line for line in whole.lower(params, x).as_text().splitlines() if "while" in line or "add" in line)  # the layers take no part in the loop
    assert (whole(params, x)["layers"] == 0).all()
    frozen = jax.jit(lambda norm, x: jax.grad(lambda norm: loss(dict(params, norm=norm), x))(norm))
    assert frozen.lower(params["norm"], x).as_text().count("stablehlo.dot_general") == 2  # logits and dx: no product for the head, which nobody differentiates


def test_a_closed_over_head_learns_too():
    params, x, targets, weights = inputs()
    through = jax.jit(jax.grad(lambda head: chunked_cross_entropy(lambda p, x: unembed(dict(p, head=head), x), dict(norm=params["norm"]), x, targets, weights, chunk=4)[0]))
    assert far(through(params["head"]), jax.grad(lambda head: slow(dict(params, head=head), x, targets, weights)[0])(params["head"])) < 2e-6


def test_memory_is_a_chunks():
    x = jax.ShapeDtypeStruct((2, 1024, 32), jnp.float32)
    head = jax.ShapeDtypeStruct((32, 4096), jnp.float32)
    ints, floats = jax.ShapeDtypeStruct((2, 1024), jnp.int32), jax.ShapeDtypeStruct((2, 1024), jnp.float32)
    f = jax.grad(lambda h, x, t, w: chunked_cross_entropy(lambda h, x: x @ h, h, x, t, w, chunk=64)[0], (0, 1))
    assert jax.jit(f).lower(head, x, ints, floats).compile().memory_analysis().temp_size_in_bytes < 2 * 1024 * 4096 * 4 / 4


def test_under_scan_and_vmap():
    params, x, targets, weights = inputs()
    loss = lambda p, x, t, w: chunked_cross_entropy(unembed, p, x, t, w, chunk=4)[0]
    add = lambda p, carry, row: (jax.tree.map(jnp.add, carry, jax.grad(loss)(p, *(a[None] for a in row))), None)
    micro = jax.jit(lambda p: jax.lax.scan(functools.partial(add, p), jax.tree.map(jnp.zeros_like, p), (x, targets, weights))[0])
    assert far(micro(params), jax.grad(loss)(params, x, targets, weights)) < 2e-6
    each = jax.jit(jax.vmap(lambda x, t, w: jax.grad(loss, 1)(params, x[None], t[None], w[None])[0]))(x, targets, weights)
    assert far(each, jax.grad(loss, 1)(params, x, targets, weights)) < 2e-6


@pytest.mark.parametrize("what, change", [("label_smoothing=1.0", dict(label_smoothing=1.0)), ("chunk=0", dict(chunk=0))])
def test_settings_are_checked(what, change):
    with pytest.raises(ValueError, match=what):
        chunked_cross_entropy(unembed, *inputs(), **change)


def test_shapes_are_checked():
    params, x, targets, weights = inputs()
    with pytest.raises(ValueError, match="targets"):
        chunked_cross_entropy(unembed, params, x, targets[:, :5], weights)
    with pytest.raises(ValueError, match="weights"):
        chunked_cross_entropy(unembed, params, x, targets, weights[:, :5])


LAYOUTS = [dict(fsdp=8), dict(data=2, fsdp=4), dict(fsdp=2, tensor=4), dict(data=2, sequence=2, fsdp=2), dict(fsdp=2, sequence=2, tensor=2)]


def on_mesh(axes, params, x, targets, weights):
    """The mesh, and the arrays as a run lays them."""
    mesh = make_mesh(**({"data": 1} | axes))
    put = lambda array, *spec: jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
    rows = ("data", "fsdp")
    return mesh, params | dict(head=put(params["head"], "fsdp", "tensor")), put(x, rows, "sequence"), put(targets, rows, "sequence"), put(weights, rows, "sequence")


def wide(dtype=jnp.float32):
    params, *_ = inputs()
    keys = jax.random.split(jax.random.key(3), 3)
    x, targets = jax.random.normal(keys[0], (8, 12, D)).astype(dtype), jax.random.randint(keys[1], (8, 12), 0, V)
    return params, x, targets, jax.random.uniform(keys[2], (8, 12)) * (targets % 4 > 0)


@pytest.mark.parametrize("chunk", [4, 5])
@pytest.mark.parametrize("axes", LAYOUTS, ids=lambda a: "x".join(a))
def test_a_mesh_changes_nothing(axes, chunk):
    arrays = wide()
    both = jax.value_and_grad(lambda params, x, t, w: chunked_cross_entropy(unembed, params, x, t, w, chunk=chunk, z_loss=1e-2)[0], (0, 1, 3))
    evaluate = lambda *a: chunked_cross_entropy(unembed, *a, chunk=chunk)[0]
    logprobs = lambda params, x, t, _: chunked_logprobs(unembed, params, x, t, chunk=chunk)
    alone = [f(*arrays) for f in (both, evaluate, logprobs)]
    mesh, *placed = on_mesh(axes, *arrays)
    with jax.set_mesh(mesh):
        for f, wanted in zip((both, evaluate, logprobs), alone):
            assert far(jax.jit(f)(*placed), wanted) < 1e-6                       # float32 sums in another order


def test_rows_that_do_not_divide_stay_together():
    arrays = inputs()                  # three rows of ten tokens
    both = jax.value_and_grad(lambda params, x, t, w: chunked_cross_entropy(unembed, params, x, t, w, chunk=4)[0], (0, 1))
    alone = both(*arrays)
    with jax.set_mesh(make_mesh(fsdp=8, data=1)):
        assert far(jax.jit(both)(*arrays), alone) < 1e-6


def test_the_head_crosses_the_wires_once():
    """Whatever the number of chunks: one gather of the head, in the dtype it is multiplied in, and one reduction of its gradient, both outside the loop."""
    mesh, *arrays = on_mesh(dict(fsdp=8), *wide(jnp.bfloat16))
    both = jax.grad(lambda params, x, t, w: chunked_cross_entropy(lambda p, x: contract("btd,dv->btv", x, p["head"], out_dtype=jnp.float32), params, x, t, w, chunk=3)[0], (0, 1))
    with jax.set_mesh(mesh):
        text = jax.jit(both).lower(*arrays).compile().as_text()
    gathers = [line for line in text.splitlines() if " all-gather(" in line and f"{D},{V}]" in line]
    reductions = [line for line in text.splitlines() if (" all-reduce(" in line or " reduce-scatter(" in line) and f"{D},{V}]" in line]
    assert len(gathers) == 1 and len(reductions) == 1 and not any("while" in line.split("op_name")[-1] for line in gathers + reductions)
