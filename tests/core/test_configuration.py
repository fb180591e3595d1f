"""Configurations as text, their checks, labels, and the mesh."""
import dataclasses as dc
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llmjax.core import AdamW, Attention, ConfigError, Layer, Layout, Lion, MixtureOfExperts, Mlp, ModelConfig, Rope, ShardingError, explain_sharding, find_cycle, make_mesh, shardings, unrolled
from llmjax.core.labels import parse
from llmjax.core.mesh import MESH_AXES, RULES, batch_parts, batch_sharding, constrain, hybrid, partition
from llmjax.core.model_config import Groups
from llmjax.core.override import call_typed, from_json, override, to_json
from llmjax.core.positions import Alibi, LongRope
from llmjax.core.tree import flatten, merge, split, unflatten

LAYER = Layer(Attention(4, 2, 8), Mlp(16))
MODEL = ModelConfig(32, 16, cycle=(LAYER,), repeats=2)


@dc.dataclass(frozen=True)
class Run:
    model: ModelConfig = MODEL
    optimizer: AdamW | Lion = AdamW()
    steps: int | str = 10
    clip: float | None = 1.0
    names: tuple[str, ...] = ()


@pytest.mark.parametrize("path, text, got", [
    ("steps", "7", 7), ("steps", "2ep", "2ep"), ("steps", "1e4", 10000), ("clip", "None", None), ("clip", "2", 2.0), ("optimizer.learning_rate", "1e-4", 1e-4), ("names", "('a','b')", ("a", "b")),
    ("names", "a", ("a",)), ("optimizer", "Lion(b1=0.5)", Lion(b1=0.5)), ("optimizer", "Lion", Lion()), ("model.cycle.0.ffn.hidden", "24", 24), ("model.tied", "true", True),
    ("model.cycle.0.mixer.window", "5", 5)])
def test_overrides(path, text, got):
    value = override(Run(), path, text)
    for part in path.split("."):
        value = value[int(part)] if part.isdigit() else getattr(value, part)
    assert value == got and type(value) is type(got)


@pytest.mark.parametrize("path, text, words", [
    ("step", "7", "did you mean 'steps'"), ("optimizer.learning_rat", "1", "learning_rate"), ("clip", "many", "config.clip=many: float | None"), ("model.cycle.3.wiring", "pre", "from 0 to 0"),
    ("model.cycle.0.wiring", "twisted", "'sandwich'"), ("model.dim", "1.5", "int is wanted"), ("optimizer", "Sgd()", "Lion"), ("optimizer", "Lion(b3=1)", "b1"), ("steps.x", "1", "has no fields"),
    ("model.cycle", "3", "config.model.cycle=3")])
def test_bad_overrides_name_field_value_and_what_is_allowed(path, text, words):
    with pytest.raises(ConfigError) as caught:
        override(Run(), path, text)
    assert words in str(caught.value)


def test_json_round_trip_and_unknown_names():
    run = Run(names=("x",), optimizer=Lion())
    text = json.dumps(to_json(run))
    assert from_json(json.loads(text)) == run
    with pytest.raises(ConfigError, match="steps"):
        from_json({**json.loads(text), "stepz": 1})
    with pytest.raises(ConfigError, match="Nope"):
        from_json({"type": "llmjax.core.run_config:Nope"})
    with pytest.raises(ConfigError, match=r"config.optimizer.learning_rate"):
        from_json({**to_json(run), "optimizer": {**to_json(run)["optimizer"], "learning_rate": "fast"}})


def test_arguments_of_get_config():
    def get_config(size: str, lora: int = 4, rate: float = 1.0):
        return size, lora, rate
    assert call_typed(get_config, "size=135m,lora=16,rate=2", "f") == ("135m", 16, 2.0)
    for text, word in (("", "size"), ("size=a,lara=1", "lora"), ("size=a,lora=x", "int"), ("size", "needs a value")):
        with pytest.raises(ConfigError, match=word):
            call_typed(get_config, text, "f")


def test_model_configurations_are_checked():
    with pytest.raises(ConfigError, match="heads=4 is not a multiple of kv_heads=3"):
        dc.replace(MODEL, cycle=(dc.replace(LAYER, mixer=Attention(4, 3, 8)),))
    with pytest.raises(ConfigError, match="'sillu'.*silu"):
        dc.replace(MODEL, cycle=(dc.replace(LAYER, ffn=Mlp(8, "sillu")),))
    with pytest.raises(ConfigError, match="at least one layer"):
        ModelConfig(8, 8)
    a, b = LAYER, dc.replace(LAYER, wiring="post")
    assert find_cycle((a, b, a, b, a)) == dict(prefix=(), cycle=(a, b), repeats=2, suffix=(a,))
    assert find_cycle((b, a, a, a)) == dict(prefix=(b,), cycle=(a,), repeats=3, suffix=())
    assert unrolled(MODEL).layers == MODEL.layers and unrolled(MODEL).repeats == 0


def test_labels():
    label = parse("layer expert | embed -> heads head_dim")
    assert label.axes == ("layer", "expert", "embed", "heads", "head_dim") and label.dims("inputs") == (2,) and label.dims("outputs") == (3, 4) and label.is_matrix
    assert str(label) == "layer expert | embed -> heads head_dim" and str(parse("norm")) == "norm" and not parse("norm").is_matrix
    assert parse("embed -> mlp").stacked() == parse("layer | embed -> mlp")


def test_trees():
    tree = {"a": {"b": jnp.ones(2), "c": jnp.zeros(3)}, "d": jnp.ones(1)}
    assert list(flatten(tree)) == ["a/b", "a/c", "d"] and jax.tree.structure(unflatten(flatten(tree))) == jax.tree.structure(tree)
    on, off = split(tree, lambda name: name.startswith("a"))
    assert on["d"] is None and off["a"]["b"] is None and merge(on, off)["a"]["b"] is tree["a"]["b"]


def test_mesh_sizes():
    mesh = make_mesh(fsdp=4, tensor=2)
    assert dict(mesh.shape) == dict(stage=1, data=1, fsdp=4, expert=1, sequence=1, tensor=2) and make_mesh(data=1, fsdp=None).shape["fsdp"] == 8
    for axes, word in ((dict(fsdp=3), "needs a multiple of 3 devices, there are 8"), (dict(data=None, fsdp=None), "at most one"), (dict(tensor=0), "tensor=0"), (dict(data=4), "needs 4 devices")):
        with pytest.raises(ShardingError, match=word):
            make_mesh(**axes)


def test_rules_lay_arrays():
    mesh = make_mesh(fsdp=2, tensor=2, expert=2)
    assert partition(("layer", "expert", "embed", "mlp"), (3, 4, 8, 6), mesh, RULES, "w") == P(None, "expert", "fsdp", "tensor")
    assert partition(("embed", "embed"), (8, 8), mesh, RULES, "w") == P("fsdp")                       # an axis serves one dimension
    assert partition(("vocab", "embed"), (8, 8), mesh, (("vocab", ("tensor", "fsdp")), *RULES), "w") == P(("tensor", "fsdp"))
    with pytest.raises(ShardingError, match=r"mixer/k: dimension 1 \(kv_heads, length 3\) does not divide over tensor=2.*\('kv_heads', None\)"):
        partition(("embed", "kv_heads"), (8, 3), mesh, RULES, "mixer/k")
    with pytest.raises(ShardingError, match="no rule lays the axis 'breadth'"):
        partition(("breadth",), (8,), mesh, RULES, "w")
    labels, shapes = {"w": parse("embed -> mlp"), "s": parse("norm")}, {"w": jax.ShapeDtypeStruct((8, 6), jnp.float32), "s": jax.ShapeDtypeStruct((8,), jnp.float32)}
    with pytest.raises(ShardingError, match="layout.expert=2: no weight"):
        shardings(labels, shapes, mesh)
    table = explain_sharding(labels, shapes, make_mesh(fsdp=4, tensor=2))
    assert "embed -> mlp" in table and "fsdp tensor" in table and "2×3" in table
    for layout, word in ((dict(rules=(("wdith", None),)), "wdith"), (dict(rules=(("embed", "fdsp"),)), "fsdp"), (dict(interleave=2), "set layout.stage too")):
        with pytest.raises(ConfigError, match=word):
            Layout(**layout)


@pytest.mark.parametrize("axis", ["data", "fsdp", "stage"])
def test_slices_lie_along_one_axis(axis):
    """Two slices of four: every axis but the one that goes across stays within a slice."""
    @dc.dataclass(frozen=True)
    class Device:
        id: int
        slice_index: int
        platform: str = "gpu"
        device_kind: str = "some chip"
        process_index: int = 0
    devices = [Device(i, i % 2) for i in range(8)]
    sizes = dict(data=1, fsdp=4, stage=1) | {axis: 8 if axis == "fsdp" else 2}
    shape = [sizes.get(name, 1) for name in MESH_AXES]
    grid = hybrid(devices, shape, MESH_AXES.index(axis), [0, 1])
    halves = np.split(grid, 2, MESH_AXES.index(axis))
    assert list(grid.shape) == shape and [{d.slice_index for d in half.flat} for half in halves] == [{0}, {1}]
    with pytest.raises(ShardingError, match="2 slices do not divide tensor=1"):
        make_mesh(data=1, fsdp=8, devices=devices, dcn="tensor")
    with pytest.raises(ShardingError, match="the slices have 4, 3 devices"):
        hybrid(devices[:7], shape, MESH_AXES.index(axis), [0, 1])


def test_batches_and_constraints():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    assert batch_parts(mesh) == 4 and batch_sharding(mesh).spec == P(("data", "fsdp"), None)
    x = jnp.ones((4, 6, 8))
    assert constrain(x, "batch length .") is x                                                        # no mesh, nothing in the program
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: constrain(x, "batch length mlp"))(x)
    assert y.sharding.spec == P(("data", "fsdp"), None, "tensor")
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(("change", "words"), [
    (dict(chunked=True), "chunked attention needs a window"), (dict(window=4, globals=2, sinks=True), "globals=2 and sinks=True cannot go together"),
    (dict(window=4, globals=2, chunked=True), "globals=2 and chunked=True"), (dict(alibi=Alibi()), r"alibi=Alibi\(.*\) and rope=Rope\(.*\) cannot go together"),
    (dict(rope=None, alibi=Alibi(), softcap=3.0), "and softcap=3.0 cannot go together"), (dict(rope=Rope(scaling=LongRope((1.0,), (2.0,), 16))), "LongRope has 1 short factors, .* need 4"),
])
def test_attention_that_cannot_be(change, words):
    with pytest.raises(ConfigError, match="layer 0: .*" + words):
        ModelConfig(32, 16, prefix=(dc.replace(LAYER, mixer=dc.replace(LAYER.mixer, **change)),))


@pytest.mark.parametrize(("change", "words"), [(dict(), "cross-attention has no rope"), (dict(rope=None, window=5), "cross-attention has no window; it is 5")])
def test_cross_attention_is_plain(change, words):
    cross = dc.replace(LAYER.mixer, causal=False, **change)
    with pytest.raises(ConfigError, match=words):
        ModelConfig(32, 16, prefix=(dc.replace(LAYER, cross=cross),), encoder=MODEL)


@pytest.mark.parametrize(("change", "words"), [(dict(top_k=5), "top_k=5 must lie between 1 and experts=4"), (dict(groups=Groups(3, 1)), "4 experts do not divide into 3 groups"),
                                               (dict(top_k=3, groups=Groups(2, 1)), "of which 1 hold the 3 chosen ones")])
def test_experts_that_cannot_be(change, words):
    with pytest.raises(ConfigError, match=words):
        ModelConfig(32, 16, prefix=(dc.replace(LAYER, ffn=MixtureOfExperts(**(dict(experts=4, top_k=2, hidden=8) | change))),))
