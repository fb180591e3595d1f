"""Every mesh axis, alone and mixed: one step on many devices is the step on one. Rows are packed (two documents) and padded."""
import dataclasses as dc
import functools

import jax
import numpy as np
import optax
import pytest
from train.test_step import DENSE, EXPERTS, far, run, setting

from llmjax.core import Attention, Compute, ConfigError, GatedDelta, Layer, Layout, Mlp, ModelConfig, ShardingError, make_mesh, shardings
from llmjax.core.mesh import bubble
from llmjax.core.positions import RelativeBuckets
from llmjax.models import Decoder, abstract_params, build, init_params, labels
from llmjax.models.pipeline import deal

KINDS = {"dense": dc.replace(DENSE, repeats=4), "experts": dc.replace(EXPERTS, repeats=4),
         "window": dc.replace(DENSE, cycle=(Layer(Attention(4, 2, 8, window=6, sinks=True), Mlp(64)),), repeats=4),
         "hybrid": dc.replace(DENSE, cycle=(Layer(GatedDelta(4, 2, 8, 8), Mlp(64)), Layer(Attention(4, 2, 8), Mlp(64))), repeats=2)}
LAYOUTS = [
    ("dense", dict(fsdp=8)), ("dense", dict(sequence=8)), ("dense", dict(stage=4, data=2)), ("dense", dict(stage=2, fsdp=2, tensor=2)), ("window", dict(sequence=2, tensor=2, fsdp=2)),
    ("window", dict(stage=2, sequence=2, fsdp=2)), ("experts", dict(data=2, sequence=2, expert=2)), ("experts", dict(stage=2, expert=2, data=2)),
    ("dense", dict(stage=2, data=4, interleave=2)), ("dense", dict(stage=2, tensor=2, data=2, microbatches=4)), ("hybrid", dict(sequence=2, tensor=2, fsdp=2)),
]
MORE = [                               # axes that the first list mixes, alone or in other pairs
    ("dense", dict(data=8)), ("dense", dict(tensor=4, data=2)), ("experts", dict(expert=4, data=2)), ("window", dict(sequence=4, data=2)), ("experts", dict(sequence=4, data=2)),
    ("window", dict(stage=2, fsdp=4)), ("dense", dict(fsdp=4, tensor=2)), ("experts", dict(expert=4, tensor=2)), ("experts", dict(fsdp=2, expert=2, tensor=2)),
    ("hybrid", dict(stage=2, fsdp=4)),
]


# its queries and keys are of length 0.03 before they are brought to length 1: eight parts of the batch alone, no axis but data, move gradients by 7e-5 and their norm by 2e-5
ROOM = {"hybrid": dict(room=3e-4, norm=1e-4)}


@functools.cache
def case(kind):
    """-> model, parameters, batch, and what one device makes of it."""
    model, params, batch = setting(KINDS[kind])
    segments, positions = np.ones((8, 16), np.int32), np.tile(np.arange(16, dtype=np.int32), (8, 1))
    segments[::2, 7:], positions[::2, 7:] = 2, np.arange(9)
    segments[1, 12:] = batch["weights"][1, 12:] = 0
    batch = {**batch, "segment_ids": segments, "positions": positions}
    return model, params, batch, run(model, params, batch, 1, optax.sgd(1.0))


def on(kind, sizes, **compute):
    model, params, batch, _ = case(kind)
    axes = {k: v for k, v in sizes.items() if k not in ("microbatches", "interleave", "ticks")}
    model = dc.replace(model, layout=Layout(**{"data": 1, **sizes}), compute=dc.replace(model.compute, **compute))
    return run(model, params, batch, 1, optax.sgd(1.0), mesh=make_mesh(**{"data": 1, **axes}))


def same(many, one, room=2e-6, norm=1e-5):
    """float32: sums over devices come in another order. Gradients, by plain descent with rate 1, of size 1e-3 to 1."""
    np.testing.assert_allclose(many[1], one[1], rtol=1e-6)
    for name in ("balance_loss", "router_z_loss", "expert_imbalance", "grad_norm", "tokens"):
        if name in one[2]:
            assert float(many[2][name]) == pytest.approx(float(one[2][name]), rel=norm), name
    assert far(jax.device_get(many[0].params), jax.device_get(one[0].params)) < room


def named(layouts, *marks):
    return [pytest.param(kind, sizes, id=f"{kind} {' '.join(f'{k}{v}' for k, v in sizes.items())}", marks=marks) for kind, sizes in layouts]


@pytest.mark.parametrize("kind, sizes", named(LAYOUTS) + named(MORE, pytest.mark.slow))
def test_many_devices_are_one(kind, sizes):
    many = on(kind, sizes)
    same(many, case(kind)[3], **ROOM.get(kind, {}))
    divided = {x.sharding.shard_shape(x.shape) != x.shape for x in jax.tree.leaves(many[0].params) if x.ndim > 1}
    assert not set(sizes) - {"data", "sequence"} or True in divided, "nothing is divided"


def test_an_encoder_decoder_over_stages_and_rows():
    """Both of its stacks in pipelines, relative positions and cross-attention on divided rows: its gradient is one device's."""
    near = RelativeBuckets(8, 20)
    stack = ModelConfig(64, 32, cycle=(Layer(Attention(4, 4, 8, rope=None, causal=False, relative=near), Mlp(48)),), repeats=4, context=64)
    config = dc.replace(stack, cycle=(Layer(Attention(4, 4, 8, rope=None, relative=near), Mlp(48), cross=Attention(4, 4, 8, rope=None, causal=False)),), encoder=stack)
    model, sizes = build(config, Compute("float32", "float32")), dict(data=1, stage=2, sequence=2, tensor=2)
    params = init_params(model, jax.random.key(0))
    source, tokens = np.random.default_rng(0).integers(1, 64, (2, 8, 16))
    gradient = lambda model: jax.grad(lambda params: jax.numpy.sin(model.apply({"params": params}, tokens, encoder_tokens=source)[0]).mean())
    one, many = gradient(model)(params), dc.replace(model, layout=Layout(**sizes))
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(labels(many), abstract_params(many), mesh))
        assert far(jax.device_get(jax.jit(gradient(many))(placed)), one) < 1e-6
    assert max(float(abs(g).max()) for g in jax.tree.leaves(one)) > 1e-3


@pytest.mark.parametrize("kind, form", [("dense", "ring"), ("window", "ulysses")])
def test_forms_of_a_divided_row(kind, form):
    """Both forms whatever `auto` takes, and with activations made again in the backward pass."""
    same(on(kind, dict(sequence=4, data=2), sequence=form, remat="full"), case(kind)[3])


@pytest.mark.parametrize("ticks", ["nested", "flat"])
def test_ticks_made_again(ticks):
    """Weights that fsdp and tensor divide, in chunks that change stages; what a tick keeps changes no number. 1e-5 is what is promised; `same` asks for less."""
    same(on("dense", dict(stage=2, fsdp=2, tensor=2, interleave=2, ticks=ticks), remat="full"), case("dense")[3])


@pytest.mark.parametrize("sizes", [dict(expert=4, data=2), dict(stage=2, expert=2, data=2), dict(expert=2, sequence=2, tensor=2)], ids=str)
def test_tokens_sent_to_their_experts(sizes):
    """The exchange, with a gather in the place of the collective that a CPU lacks; and a capacity nobody reaches, which changes nothing."""
    same(on("experts", sizes, dispatch="exchange"), case("experts")[3])
    roomy = on("experts", sizes, capacity=4.0)
    same(roomy, case("experts")[3])
    assert float(roomy[2]["dropped"]) == 0


def test_a_pipeline_in_16_bits():
    """bfloat16 has 8 bits: 1 % of the loss, and gradients that point the same way as float32's."""
    kind, sizes = "dense", dict(stage=2, fsdp=2, data=2)
    many, one, start = on(kind, sizes, dtype="bfloat16"), case(kind)[3], case(kind)[1]
    flat = lambda state: np.concatenate([np.ravel(jax.device_get(a) - jax.device_get(b)) for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(start))])
    a, b = flat(many[0]), flat(one[0])
    assert many[1][0] == pytest.approx(one[1][0], rel=1e-2) and a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.999


def test_chunks_find_their_stages():
    """Each round is a permutation of the stages, and in the end every stage has its chunks g = s mod n."""
    for n in (2, 3, 4, 8):
        for v in (2, 3, 4, 6):
            got = {d: [] for d in range(n)}
            for sends in deal(n, v):
                assert sorted(d for _, d in sends) == list(range(n))
                for s, (i, d) in enumerate(sends):
                    got[d].append(s * v + i)
            assert all(sorted(chunks) == list(range(d, n * v, n)) for d, chunks in got.items())


def test_bubbles_are_counted():
    """Narayanan et al. 2021: (p - 1) / m of the work, divided by v; as a share of all ticks."""
    assert bubble(Layout(stage=4), 4) == pytest.approx(3 / 7) and bubble(Layout(stage=4, microbatches=16), 4) == pytest.approx(3 / 19)
    assert bubble(Layout(stage=4, microbatches=16, interleave=2), 4) == pytest.approx(3 / 35)


def test_what_does_not_fit_says_so():
    for options, message in ((dict(interleave=2), "set layout.stage too"), (dict(stage=2, microbatches=0), "a whole number from 1"),
                             (dict(stage=4, ticks="flat"), "set layout.interleave too"), (dict(stage=4, interleave=2, ticks="once"), "'nested' or 'flat' is wanted"),
                            (dict(stage=4, interleave=2, microbatches=6), "a multiple of layout.stage=4")):
        with pytest.raises(ConfigError, match=message):
            Layout(**options)
    with pytest.raises(ShardingError, match="dimension 0 .layer, length 4. does not divide over stage=8"):
        on("dense", dict(stage=8))
    with pytest.raises(ShardingError, match="8 rows over 2 parts does not divide into 3 microbatches"):
        on("dense", dict(stage=4, data=2, microbatches=3))
    with pytest.raises(ShardingError, match="4 repeated layers do not divide into 4 stages of 2 chunks"):
        on("dense", dict(stage=4, data=2, interleave=2))
    with pytest.raises(ConfigError, match="4 query heads and 2 kv heads of a device do not divide over layout.sequence=8"):
        on("window", dict(sequence=8), sequence="ulysses")
    apart = Decoder(KINDS["dense"], Compute("float32", scan=False))
    with pytest.raises(ShardingError, match="no weight of this model has an axis laid on 'stage'"):
        from llmjax.core import shardings
        from llmjax.models import labels
        shardings(labels(apart), abstract_params(apart), make_mesh(stage=2, data=4))
