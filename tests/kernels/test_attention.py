"""Every implementation of attention beside the slow twin, in values and gradients, on every kind of mask.

Tolerances: float32 sums of at most a few hundred terms in another order differ by some 1e-6 of the greatest value; bf16 rounds probabilities and outputs once each (2^-8), and
gradients of them twice.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.kernels.attention import IMPLEMENTATIONS, blockwise, choose, cudnn, reference, sharded, splash

BASE = dict(B=2, T=48, S=48, N=4, K=4, H=16, Hv=16, causal=True, in_order=True, window=None, softcap=None, sinks=False, slopes=False, segments=None)
CASES = {
    "causal": {},
    "bidirectional": dict(causal=False),
    "gqa": dict(K=2),
    "mqa": dict(K=1),
    "window": dict(window=7),
    "window of one": dict(window=1),
    "window bidirectional": dict(window=7, causal=False),
    "softcap": dict(softcap=1.5),
    "sinks": dict(sinks=True, K=2),
    "slopes": dict(slopes=True, K=2),
    "slopes bidirectional packed window": dict(slopes=True, causal=False, segments="packed", window=9, sinks=True),
    "cache slopes": dict(T=5, S=40, in_order=False, segments="cache", slopes=True),
    "one query slopes": dict(T=1, S=40, in_order=False, segments="cache", slopes=True, K=2),
    "everything": dict(K=2, window=9, softcap=2.0, sinks=True, segments="packed"),
    "packed": dict(segments="packed"),
    "packed bidirectional": dict(segments="packed", causal=False),
    "left padding": dict(segments="left"),
    "right padding": dict(segments="right", K=2),
    "all padding": dict(segments="none", sinks=True),
    "odd length": dict(T=41, S=41, K=2),
    "odd length window": dict(T=37, S=37, window=5, segments="packed"),
    "value width": dict(Hv=24),
    "cache": dict(T=5, S=40, in_order=False, segments="cache", K=2),
    "cache window": dict(T=5, S=40, in_order=False, segments="cache", window=6),
    "cache sinks softcap": dict(T=7, S=43, in_order=False, segments="cache", sinks=True, softcap=2.0),
    "cross": dict(T=9, S=33, in_order=False, causal=False),
    "one query": dict(T=1, S=40, in_order=False, segments="cache", K=2, sinks=True, window=9),
    "one query softcap": dict(T=1, S=40, in_order=False, segments="cache", softcap=2.0),
}


def case(name, dtype=jnp.float32, strength=1.0, **more):
    """-> (q, k, v, sinks) and the keyword arguments of one case; `strength` multiplies the keys: at 4 the softmax is peaked."""
    c = BASE | CASES[name] | more
    keys = jax.random.split(jax.random.key(1), 4)
    q = jax.random.normal(keys[0], (c["B"], c["T"], c["N"], c["H"]))
    k = jax.random.normal(keys[1], (c["B"], c["S"], c["K"], c["H"])) * strength
    v = jax.random.normal(keys[2], (c["B"], c["S"], c["K"], c["Hv"]))
    sinks = jax.random.normal(keys[3], (c["N"],)) if c["sinks"] else None
    B, T, S = c["B"], c["T"], c["S"]
    rng = np.random.default_rng(0)
    where = {}
    if c["segments"] == "cache":  # a ring: slots in any order, some empty; queries continue the positions
        key_positions = np.stack([rng.permutation(S) for _ in range(B)])
        key_segments = (key_positions < S - 4).astype(int)
        key_segments[:, rng.integers(0, S, 3)] = 0
        query_positions = np.arange(S - 4 - T, S - 4)[None] + np.zeros((B, 1), int)
        where = dict(query_positions=query_positions, key_positions=key_positions, query_segments=np.ones((B, T), int), key_segments=key_segments)
    elif c["segments"] is not None:
        index = np.arange(T)[None]
        segments = dict(packed=np.sort(rng.integers(1, 4, (B, T)), -1), left=(index >= [[5], [0]]) + 0, right=(index < [[T - 6], [T]]) + 0,
                        none=np.array([[0] * T, [1] * T]))[c["segments"]][:B]
        first = np.array([[np.argmax(row == s) for s in row] for row in segments])
        positions = np.arange(T)[None] - first
        where = dict(query_positions=positions, key_positions=positions, query_segments=segments, key_segments=segments)
    where = {name: jnp.asarray(x, jnp.int32) for name, x in where.items()}
    settings = dict(causal=c["causal"], in_order=c["in_order"], window=c["window"], softcap=c["softcap"], scale=c["H"] ** -0.5, **where)
    if c["slopes"]:
        settings["slopes"] = 0.5 ** jnp.arange(1.0, c["N"] + 1)
    return (q.astype(dtype), k.astype(dtype), v.astype(dtype), sinks), settings


def runner(f, settings):
    """-> a jitted function of the arrays: out and the gradients for q, k, v and, where there are any, sinks."""
    def total(arrays):
        q, k, v, sinks = arrays
        out = f(q, k, v, sinks=sinks, **settings)
        assert out.dtype == q.dtype
        return (out.astype(jnp.float32) * np.random.default_rng(9).normal(size=out.shape).astype(np.float32)).sum(), out
    grad = jax.jit(jax.grad(total, has_aux=True))

    def answer(arrays):
        grads, out = grad(arrays)
        return [np.asarray(x, np.float64) for x in (out, *jax.tree.leaves(grads))]
    return answer


def run(f, arrays, settings):
    return runner(f, settings)(arrays)


def far(ours, theirs):
    """Greatest difference over outputs and gradients, each relative to its own greatest value (1 at least, the size of the inputs: a gradient may be zero but for rounding)."""
    assert len(ours) == len(theirs) and all(a.shape == b.shape for a, b in zip(ours, theirs))
    return max(np.abs(a - b).max() / max(np.abs(b).max(), 1.0) for a, b in zip(ours, theirs))


FORMS = {"short": blockwise, "tiles": functools.partial(blockwise, tile=16)}  # tile 16: these lengths go through the loops


@pytest.mark.parametrize("name", CASES)
def test_blockwise_equals_reference(name):
    settings = case(name)[1]
    exact, forms = runner(reference, settings), {form: runner(f, settings) for form, f in FORMS.items()}
    for strength in (1.0, 4.0):
        arrays = case(name, strength=strength)[0]
        theirs = exact(arrays)
        for form, f in forms.items():
            ours = f(arrays)
            assert all(np.isfinite(x).all() for x in ours), form
            assert far(ours, theirs) < 1e-5, (form, strength)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["causal", "everything", "packed", "cache", "one query"])
def test_blockwise_in_bfloat16(name, form):
    arrays, settings = case(name, jnp.bfloat16)
    exact = run(reference, jax.tree.map(lambda x: x.astype(jnp.float32), arrays), settings)
    assert far(run(FORMS[form], arrays, settings), exact) < 2e-2


@pytest.mark.parametrize("form", FORMS)
def test_block_edges_do_not_show(form):
    """Lengths around multiples of the blocks; 130 queries are three unrolled blocks of 64, 64 and 2."""
    for T, more in ((63, dict(window=40)), (65, dict(window=40, causal=False)), (64, dict()), (130, dict(window=70))):
        arrays, settings = case("gqa", T=T, S=T, B=1, **more)
        assert far(run(FORMS[form], arrays, settings), run(reference, arrays, settings)) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_see_nothing_are_zero(form):
    arrays, settings = case("left padding")
    out, dq, *_ = run(FORMS[form], arrays, settings)
    assert (out[0, :5] == 0).all() and (dq[0, :5] == 0).all() and (out[0, 5:] != 0).all()


@pytest.mark.parametrize("change", [dict(window=8), dict(window=6), dict(scale=0.5), dict(softcap=2.5), dict(causal=False)])
def test_a_wrong_setting_shows(change):
    """The comparison can tell a window off by one or a doubled scale from the right one."""
    arrays, settings = case("everything", window=7)
    assert far(run(blockwise, arrays, settings | change), run(reference, arrays, settings)) > 1e-2


def test_memory_grows_with_length_not_its_square():
    def temp(T):
        q = jax.ShapeDtypeStruct((1, T, 2, 32), jnp.float32)
        step = jax.grad(lambda q, k, v: blockwise(q, k, v, causal=True, in_order=True, window=None, softcap=None, scale=1.0).sum(), (0, 1, 2))
        return jax.jit(step).lower(q, q, q).compile().memory_analysis().temp_size_in_bytes
    short, long = temp(2048), temp(8192)
    assert long < 4.5 * short  # linear is 4, quadratic 16
    assert long < 8192 * 8192 * 4 / 4  # a quarter of one head's scores


def test_under_vmap_scan_and_remat():
    arrays, settings = case("gqa")
    f = lambda q: blockwise(q, *arrays[1:3], **settings)
    stacked = jnp.stack([arrays[0], arrays[0] * 2])
    for a, b in zip(jax.jit(jax.vmap(f))(stacked), stacked):
        assert np.allclose(a, f(b), atol=1e-5)
    loss = lambda q: jax.lax.scan(lambda q, _: (jax.checkpoint(f)(q), None), q, None, length=2)[0].sum()
    assert np.allclose(jax.jit(jax.grad(loss))(arrays[0]), jax.grad(lambda q: f(f(q)).sum())(arrays[0]), atol=1e-5)


@pytest.mark.parametrize("what, change", [
    ("multiple of K", lambda a, s: ((a[0][:, :, :3], *a[1:]), s)),
    ("disagree", lambda a, s: ((a[0], a[1][:, :5], *a[2:]), s)),
    ("window=0", lambda a, s: (a, s | dict(window=0))),
    ("softcap=0", lambda a, s: (a, s | dict(softcap=0.0))),
    ("in_order", lambda a, s: ((a[0][:, :5], *a[1:]), s)),
    ("query_positions", lambda a, s: (a, s | dict(query_positions=jnp.zeros((2, 5), jnp.int32)))),
    ("key_segments", lambda a, s: (a, s | dict(key_segments=jnp.zeros((2, 48))))),
    ("sinks", lambda a, s: ((*a[:3], jnp.zeros((3,))), s)),
])
def test_arguments_are_checked(what, change):
    arrays, settings = change(*case("gqa"))
    for f in IMPLEMENTATIONS.values():
        with pytest.raises(ValueError, match=what):
            f(*arrays[:3], sinks=arrays[3], **settings)


@pytest.mark.parametrize("name", ["gqa", "window", "everything", "left padding", "window bidirectional"])
def test_splash_equals_reference(name):
    """Interpret mode; the kernel's blocks are 128 wide, so one case is longer."""
    length = 256 if name == "window" else 128
    arrays, settings = case(name, T=length, S=length, B=2 if name == "left padding" else 1)
    assert far(run(splash, arrays, settings), run(reference, arrays, settings)) < 1e-5


@pytest.mark.parametrize("name", ["causal", "window", "gqa", "packed", "left padding", "window bidirectional", "cache"])
def test_cudnns_arguments_mean_the_same(name):
    """jax.nn's own XLA form stands in for cuDNN, which needs a GPU: what is tested is how masks, windows and empty rows are put to it."""
    arrays, settings = case(name)
    assert far(run(functools.partial(cudnn, implementation="xla"), arrays, settings), run(reference, arrays, settings)) < 1e-5


@pytest.mark.parametrize("f, what, change", [
    (cudnn, "soft-cap", dict(softcap=2.0)), (cudnn, "sinks", dict(sinks=True)), (cudnn, "equal head sizes", dict(Hv=24)), (cudnn, "multiple of 8", dict(H=12, Hv=12)),
    (cudnn, "float32", {}),
    (splash, "multiple of 128", {}), (splash, "in_order=True", dict(in_order=False)),
])
def test_what_a_kernel_cannot_do_is_said(f, what, change):
    arrays, settings = case("causal", jnp.bfloat16 if f is cudnn and change else jnp.float32, **change)
    with pytest.raises(ValueError, match=what):
        f(*arrays[:3], sinks=arrays[3], **settings)


def test_choose():
    q = jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16)
    base = dict(causal=True, in_order=True, window=None, softcap=None, sinks=None, segments=False)
    pick = lambda platform, name="auto", q=q, **change: choose(platform, name, q, q, **(base | change))[0]
    assert pick("cpu") == "blockwise" and pick("gpu") == "cudnn" and pick("tpu") == "splash"
    assert pick("gpu", softcap=30.0) == pick("gpu", segments=True) == pick("gpu", in_order=False) == pick("tpu", in_order=False) == "blockwise"
    assert pick("gpu", "cudnn", segments=True) == "cudnn" and pick("tpu", segments=True, softcap=30.0, window=9) == "splash"
    assert pick("tpu", q=jax.ShapeDtypeStruct((2, 1, 4, 64), jnp.bfloat16)) == "blockwise"
    for platform, name, what in (("cpu", "flash", "allowed are auto"), ("cpu", "cudnn", "runs on a GPU"), ("gpu", "splash", "runs on a TPU")):
        with pytest.raises(ValueError, match=what):
            pick(platform, name)
    with pytest.raises(ValueError, match="soft-cap"):
        pick("gpu", "cudnn", softcap=1.0)


def test_sharded():
    """Each device its own rows and heads; MQA's one kv head is repeated over the head shards; splash, which refuses a partitioned program, runs inside it."""
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 devices (XLA_FLAGS=--xla_force_host_platform_device_count=8)")
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,) * 2)
    wrap = functools.partial(sharded, batch=("data", "fsdp"), heads=("tensor",))
    for f, name, length in ((blockwise, "everything", 48), (blockwise, "mqa", 48), (splash, "causal", 128)):
        arrays, settings = case(name, T=length, S=length)
        single = run(blockwise, arrays, settings)
        assert far(run(wrap(f), arrays, settings), single) < 1e-5  # no mesh: itself
        with jax.set_mesh(mesh):
            assert far(run(wrap(f), arrays, settings), single) < 1e-5
            assert far(run(blockwise, arrays, settings), single) < 1e-5  # left to the compiler
    with jax.set_mesh(mesh):
        with pytest.raises(ValueError, match="wrap it"):
            run(splash, *case("causal", T=128, S=128))
        with pytest.raises(ValueError, match="3 batch do not divide"):
            run(wrap(blockwise), *case("causal", B=3))


def test_no_axis_is_left_automatic_around_a_kernel():
    """Within a stage's own shard_map the other axes may all be of one device: the compiler refuses a TPU kernel beside them all the same."""
    mesh, seen = jax.make_mesh((2, 1), ("stage", "tensor"), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,) * 2), []

    def kernel(q, k, v, **_):
        seen.append(set(jax.sharding.get_abstract_mesh().manual_axes))
        return q
    x = jnp.zeros((2, 4, 2, 8))
    with jax.set_mesh(mesh):
        inner = lambda x: sharded(kernel, batch=("data",), heads=("tensor",))(x, x, x)
        jax.eval_shape(jax.shard_map(inner, in_specs=jax.sharding.PartitionSpec("stage"), out_specs=jax.sharding.PartitionSpec("stage"), axis_names={"stage"}, check_vma=False), x)
    assert seen == [{"stage", "tensor"}]
