"""The table engine on small hand-made trees: loading, saving, sharding, and what does not fit."""
import dataclasses as dc
import random
import time
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from llmjax.checkpoint import table
from llmjax.checkpoint.table import Row, Table, exports, layers_of, load
from llmjax.core.errors import CheckpointError
from llmjax.core.leaves import Rows
from llmjax.core.tree import flatten

D, N, K, H, F, E, V = 8, 4, 2, 4, 16, 4, 24
L = "model.layers.{l}."
TABLE = Table((
    Row("model.embed.weight", "embed/table"), Row("head.weight", "head/kernel", "v d -> d v"), Row(L + "norm", "norm/scale", added=1.0),
    Row(L + "q.weight", "mixer/q", "(n h) d -> d n h"), Row(L + "kv.weight", ("mixer/k", "mixer/v"), "[k h] d -> d k h"),
    Row(L + "experts.{e}.up", "ffn/up", "f d -> d f"), Row(L + "all_experts.up", "ffn/up", "e f d -> e d f"),
), base="model.", extras=(r"model\.layers\.\d+\.buffer",), copies=(("head.weight", "model.embed.weight"),))


def layer(*lead):
    s = lambda *shape: jax.ShapeDtypeStruct((*lead, *shape), jnp.float32)
    return {"norm": {"scale": s(D)}, "mixer": {"q": s(D, N, H), "k": s(D, K, H), "v": s(D, K, H)}, "ffn": {"up": s(E, D, F)}}


def tree(tied=False):
    """A prefix layer, two cycles of two layers, a suffix layer: six layers."""
    top = {"embed": {"table": jax.ShapeDtypeStruct((V, D), jnp.float32)}, "prefix_0": layer(), "cycle": {"0": layer(2), "1": layer(2)}, "suffix_0": layer()}
    return top if tied else top | {"head": {"kernel": jax.ShapeDtypeStruct((D, V), jnp.float32)}}


@dc.dataclass
class Memory:
    tensors: dict
    where: str = "memory"
    reads: int = 0

    @property
    def shapes(self):
        return {name: x.shape for name, x in self.tensors.items()}

    def read(self, name, start=0, stop=None):
        self.reads += 1
        return self.tensors[name][start:stop]


def tensors(seed=0, tied=False):
    rng = np.random.default_rng(seed)
    out = {"model.embed.weight": rng.normal(size=(V, D))} | ({} if tied else {"head.weight": rng.normal(size=(V, D))})
    for l in range(6):
        out |= {f"model.layers.{l}.norm": rng.integers(-8, 8, D) / 8, f"model.layers.{l}.q.weight": rng.normal(size=(N * H, D)),
                f"model.layers.{l}.kv.weight": rng.normal(size=(2 * K * H, D))}
        out |= {f"model.layers.{l}.experts.{e}.up": rng.normal(size=(F, D)) for e in range(E)}
    return {name: x.astype(np.float32) for name, x in out.items()}


def test_layers_are_found_in_order():
    places = layers_of(flatten(tree()), "")
    assert places == [("prefix_0", None), ("cycle/0", 0), ("cycle/1", 0), ("cycle/0", 1), ("cycle/1", 1), ("suffix_0", None)]


@pytest.mark.parametrize("portion", [10 ** 6, 100, 1])
def test_every_number_lands_in_its_place_and_comes_back(portion, monkeypatch):
    monkeypatch.setattr(table, "PORTION", portion)              # large tensors are read some rows at a time
    source = Memory(tensors())
    params = load(source, TABLE, tree())
    assert source.reads > 60 if portion < 1000 else source.reads == len(source.tensors) + 6
    t = source.tensors
    np.testing.assert_array_equal(params["cycle"]["1"]["mixer"]["q"][1], t["model.layers.4.q.weight"].reshape(N, H, D).transpose(2, 0, 1))
    np.testing.assert_array_equal(params["cycle"]["0"]["mixer"]["v"][1], t["model.layers.3.kv.weight"][K * H:].reshape(K, H, D).transpose(2, 0, 1))
    np.testing.assert_array_equal(params["suffix_0"]["ffn"]["up"][2], t["model.layers.5.experts.2.up"].T)
    np.testing.assert_array_equal(params["prefix_0"]["norm"]["scale"], t["model.layers.0.norm"] - 1)
    np.testing.assert_array_equal(params["head"]["kernel"], t["head.weight"].T)
    written = {e.name: e.make() for e in exports(TABLE, params)}
    assert set(written) == set(t)
    for name, x in t.items():
        np.testing.assert_array_equal(written[name], x)


def test_leaves_are_made_dense():
    params = load(Memory(tensors()), TABLE, tree())
    before = {e.name: e.make() for e in exports(TABLE, params)}
    q = params["suffix_0"]["mixer"]["q"]
    params["suffix_0"]["mixer"]["q"] = Rows(q.reshape(q.shape[0], -1).T, None, q.shape, 1, q.dtype)
    after = {e.name: (e.shape, e.make()) for e in exports(TABLE, params)}
    for name, x in before.items():
        assert after[name][0] == x.shape
        np.testing.assert_array_equal(after[name][1], x)


def test_the_row_whose_tensor_is_there_is_read():
    t = tensors()
    for l in range(6):
        t[f"model.layers.{l}.all_experts.up"] = np.stack([t.pop(f"model.layers.{l}.experts.{e}.up") for e in range(E)])
    same = jax.tree.map(np.array_equal, load(Memory(t), TABLE, tree()), load(Memory(tensors()), TABLE, tree()))
    assert all(jax.tree.leaves(same))


def test_a_bare_model_leaves_the_prefix_out():
    t = tensors(tied=True)
    bare = {name.removeprefix("model."): x for name, x in t.items()}
    same = jax.tree.map(np.array_equal, load(Memory(bare), TABLE, tree(True)), load(Memory(t), TABLE, tree(True)))
    assert all(jax.tree.leaves(same))


def test_cast_on_the_way():
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), tree())
    params = load(Memory(tensors()), TABLE, like)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(params["embed"]["table"], tensors()["model.embed.weight"].astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize(("spoil", "words"), [
    (lambda t: t.pop("model.layers.3.q.weight"), ["'model.layers.3.q.weight' (16, 8) is missing"]),
    (lambda t: t.update({"model.layers.9.q.weight": np.zeros((16, 8), np.float32)}), ["nothing reads 'model.layers.9.q.weight'"]),
    (lambda t: t.update({"model.layers.1.q.weight": np.zeros((12, 8), np.float32)}), ["'model.layers.1.q.weight'", "(12, 8)", "(16, 8)"]),
])
def test_what_does_not_fit_is_named_before_anything_is_read(spoil, words):
    source = Memory(tensors())
    spoil(source.tensors)
    with pytest.raises(CheckpointError) as error:
        load(source, TABLE, tree())
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value) and source.reads == 0


def test_declared_extras_and_equal_copies_alone_are_passed_over():
    t = tensors(tied=True)
    t |= {"model.layers.0.buffer": np.zeros(3, np.float32), "head.weight": t["model.embed.weight"].copy()}
    load(Memory(t), TABLE, tree(True))
    t["head.weight"][0, 0] += 1
    with pytest.raises(CheckpointError, match=r"'head\.weight' differs from 'model\.embed\.weight'"):
        load(Memory(t), TABLE, tree(True))


def test_a_parameter_no_row_makes_is_an_error():
    like = tree() | {"extra": {"bias": jax.ShapeDtypeStruct((3,), jnp.float32)}}
    with pytest.raises(CheckpointError, match="'extra/bias'"):
        load(Memory(tensors()), TABLE, like)


@pytest.mark.parametrize("readers", [1, 2, 8])
def test_threads_do_not_change_the_numbers(readers, monkeypatch):
    """Portions that end in another order than they began, and one that cannot be read: what comes out is the same, and the error is the reader's own."""
    class Slow(Memory):
        inside = most = 0

        def read(self, name, start=0, stop=None):
            self.inside += 1
            self.most = max(self.most, self.inside)
            time.sleep(random.random() / 2000)
            self.inside -= 1
            if name == spoiled:
                raise CheckpointError(f"memory: it ends inside the tensor {name!r}")
            return super().read(name, start, stop)
    monkeypatch.setattr(table, "PORTION", 50)
    monkeypatch.setattr(table, "READERS", readers)
    spoiled, source, single = None, Slow(tensors()), Memory(tensors())
    single.readers = 1
    same = jax.tree.map(np.array_equal, load(source, TABLE, tree()), load(single, TABLE, tree()))
    assert all(jax.tree.leaves(same)) and 1 <= source.most <= readers and (source.most > 1) == (readers > 1)
    spoiled = "model.layers.4.q.weight"
    with pytest.raises(CheckpointError, match=r"ends inside the tensor 'model\.layers\.4\.q\.weight'"):
        load(source, TABLE, tree())


class Host:
    """A sharding as one host of several sees it: two of the eight devices are its own."""
    def __init__(self, sharding):
        self.sharding = sharding

    def addressable_devices_indices_map(self, shape):
        return dict(list(self.sharding.devices_indices_map(shape).items())[:2])


class Leaf:
    def __init__(self, shape, sharding):
        self.shape, self.dtype, self.sharding = shape, np.dtype(np.float32), sharding


class Held:
    """Bytes of arrays that are alive: how many there are, the most there were, all there ever were."""
    def __init__(self):
        self.now = self.most = self.ever = 0

    def __call__(self, x):
        self.now, self.ever = self.now + x.nbytes, self.ever + x.nbytes
        self.most = max(self.most, self.now)
        weakref.finalize(x, self.drop, x.nbytes)
        return x

    def drop(self, n):
        self.now -= n


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 (fake) devices")
@pytest.mark.parametrize("names", [("up", "q"), ("up", "q", "kv")])
def test_a_host_holds_its_shard_and_one_tensor(names, monkeypatch):
    """What buffers are asked for is the host's shard to the byte; what is read and alive at any moment, while two threads load, is never more than one tensor (one that holds two
    parameters is not read in portions: two such at once would show here)."""
    layers, width, hidden = 4, 64, 256
    every = {"up": Row("up.{l}", "up", "f d -> d f"), "q": Row("q.{l}", "q", "(n h) d -> d n h"), "kv": Row("kv.{l}", ("k", "v"), "[f] d -> d f")}
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    place = lambda *spec: Host(jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, *spec)))
    leaves = {"up": Leaf((layers, width, hidden), place(None, "x")), "q": Leaf((layers, width, 8, hidden // 8), place(None, "x"))}
    if "kv" in names:
        leaves |= {"k": Leaf((layers, width, hidden), place("x")), "v": Leaf((layers, width, hidden), place("x"))}
    rng = np.random.default_rng(0)
    source = Memory({f"{name}.{l}": rng.normal(size=(hidden * (2 if name == "kv" else 1), width)).astype(np.float32) for name in names for l in range(layers)})
    buffers, read = Held(), Held()
    make = table.aligned

    def slowly(name, start=0, stop=None):
        x = read(source.tensors[name][start:stop].copy())
        time.sleep(0.002)
        return x
    monkeypatch.setattr(table, "aligned", lambda shape, dtype: buffers(make(shape, dtype)))
    monkeypatch.setattr(source, "read", slowly, raising=False)
    monkeypatch.setattr(table, "READERS", 2)
    monkeypatch.setattr(table, "PORTION", width * hidden // 8)
    monkeypatch.setattr(jax, "make_array_from_single_device_arrays", lambda shape, sharding, shards: shards)
    loaded = load(source, Table(tuple(every[name] for name in names)), {"cycle": {"0": leaves}})
    assert buffers.ever == sum(np.prod(leaf.shape) * 4 for leaf in leaves.values()) // 4       # two of eight devices
    assert read.now == 0 and read.most <= max(x.nbytes for x in source.tensors.values())
    got = loaded["cycle"]["0"]
    np.testing.assert_array_equal(got["up"][1][3], source.tensors["up.3"][hidden // 8:hidden // 4].T)
    np.testing.assert_array_equal(got["q"][1][2][:, 0], source.tensors["q.2"][hidden // 8:hidden // 4].T)


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 (fake) devices")
@pytest.mark.parametrize("portion", [10 ** 6, 50])
def test_sharded_places_hold_the_same_numbers(portion, monkeypatch):
    monkeypatch.setattr(table, "PORTION", portion)
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = {"q": (None, "b"), "up": ("b", "a"), "table": ("a", "b"), "k": ("a",)}

    def place(path, x):
        spec = specs.get(path[-1].key, ())
        stacked = path[0].key == "cycle"
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*((None,) if stacked else ()), *spec)))
    like = jax.tree_util.tree_map_with_path(place, tree())
    source = Memory(tensors())
    params, plain = load(source, TABLE, like), load(Memory(tensors()), TABLE, tree())
    for x, y, want in zip(jax.tree.leaves(params), jax.tree.leaves(plain), jax.tree.leaves(like)):
        assert x.sharding == want.sharding
        np.testing.assert_array_equal(x, y)
    assert params["cycle"]["0"]["ffn"]["up"].addressable_shards[0].data.shape == (2, E // 4, D // 2, F)
    written = {e.name: e.make() for e in exports(TABLE, params)}
    assert all(np.array_equal(written[name], x) for name, x in source.tensors.items())
    assert portion < 1000 or source.reads == len(source.tensors) + 6      # each tensor once, the fused one once for each of its two parameters


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 (fake) devices")
def test_a_layer_is_gathered_alone():
    """Bit for bit, and without all layers of a parameter on any device, however it is divided."""
    from jax.sharding import AxisType, NamedSharding, PartitionSpec
    mesh = jax.make_mesh((4, 2), ("stage", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    whole = NamedSharding(mesh, PartitionSpec())
    for dtype in (np.float32, jnp.bfloat16, np.int8):
        numbers = np.random.default_rng(0).normal(size=(8, 6, 4)) * 30
        for spec in (PartitionSpec("stage"), PartitionSpec(None, "fsdp"), PartitionSpec("stage", None, "fsdp")):
            x = jax.device_put(jnp.asarray(numbers, dtype), NamedSharding(mesh, spec))
            np.testing.assert_array_equal(table.gather(x, 3), np.asarray(x)[3])
            np.testing.assert_array_equal(table.gather(x), np.asarray(x))
            text = jax.jit(table.pick, out_shardings=whole).lower(x, np.int32(3)).compile().as_text()
            assert "[8,6,4]" not in text.split("ENTRY")[1]
