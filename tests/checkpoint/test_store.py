"""The store of a run: bits, keeping, other meshes, other models, damage, leftovers, a full disk."""
import resource
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llmjax.checkpoint import Store
from llmjax.core.errors import CheckpointError


def state(scale=1.0):
    w = jnp.arange(64, dtype=jnp.float32).reshape(8, 8) * scale / 7
    return {"params": {"w": w, "half": (w / 3).astype(jnp.bfloat16), "none": None}, "moments": [w * 2, (jnp.int8(3), jnp.zeros(()))], "key": jax.random.key(5),
            "step": jnp.int32(3)}


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def same(a, b):
    data = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return jax.tree.structure(a) == jax.tree.structure(b) and all(x.dtype == y.dtype and np.asarray(data(x)).tobytes() == np.asarray(data(y)).tobytes()
                                                                 for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def test_bits_come_back_and_the_newest_stay(tmp_path):
    store = Store(tmp_path, keep=2)
    for step in (1, 2, 3):
        store.save(step, state(step), {"data": {"position": step * 10, "names": ["a"]}})
    store.wait()
    assert store.steps() == [2, 3] and store.latest() == 3
    store.close()
    store = Store(tmp_path, keep=2)
    for like in (shapes(state()), state()):
        back, extra = store.restore(3, like)
        assert same(back, state(3)) and extra == {"data": {"position": 30, "names": ["a"]}}
    assert same(store.restore(2, state())[0], state(2)) and store.extra(2)["data"]["position"] == 20
    store.save(3, state(9), wait=True)                  # a step that is there stays as it is
    assert same(store.restore(3, state())[0], state(3))
    store.close()


def test_what_is_saved_is_the_state_at_the_call(tmp_path):
    """The step after a save may overwrite the very buffers (donation)."""
    store, s = Store(tmp_path, keep=1), jnp.full((256, 1024), 1.0)
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    store.save(1, {"x": s})
    for _ in range(20):
        s = step(s)
    store.wait()
    assert float(store.restore(1, {"x": jax.ShapeDtypeStruct((256, 1024), jnp.float32)})[0]["x"].max()) == 1.0
    store.close()


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 (fake) devices")
def test_restores_onto_another_mesh(tmp_path):
    auto = jax.sharding.AxisType.Auto
    one, two = jax.make_mesh((8,), ("a",), axis_types=(auto,)), jax.make_mesh((2, 4), ("a", "b"), axis_types=(auto,) * 2)
    x = jnp.arange(64, dtype=jnp.float32).reshape(8, 8)
    store = Store(tmp_path)
    store.save(1, {"x": jax.device_put(x, NamedSharding(one, PartitionSpec("a")))}, wait=True)
    want = NamedSharding(two, PartitionSpec("b", "a"))
    back = store.restore(1, {"x": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=want)})[0]["x"]
    assert back.sharding == want
    np.testing.assert_array_equal(back, x)
    alone = store.restore(1, {"x": jax.ShapeDtypeStruct((8, 8), jnp.float32)})[0]["x"]
    assert len(alone.sharding.device_set) == 1
    store.close()


@pytest.mark.parametrize(("change", "words"), [
    (lambda s: s["params"].update(w=jnp.zeros((8, 4))), r"'params/w' is \(8, 8\) float32, this run wants \(8, 4\) float32"),
    (lambda s: s["params"].update(half=jnp.zeros((8, 8))), r"'params/half' is \(8, 8\) bfloat16, this run wants \(8, 8\) float32"),
    (lambda s: s["params"].update(more=jnp.zeros(3)), r"it has no 'params/more' \(3,\)"),
    (lambda s: s["params"].pop("half"), r"it has 'params/half' \(8, 8\), which this run has not"),
])
def test_another_model_is_told_by_the_first_difference(tmp_path, change, words):
    store, other = Store(tmp_path), state()
    store.save(1, state(), wait=True)
    change(other)
    with pytest.raises(CheckpointError, match=words) as error:
        store.restore(1, other)
    assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match="no checkpoint of step 7; there are 1"):
        store.restore(7, state())
    store.close()


def test_a_killed_writer_leaves_nothing_that_counts(tmp_path):
    store = Store(tmp_path)
    store.save(1, state(), wait=True)
    store.close()
    left = tmp_path / "2.orbax-checkpoint-tmp-123"
    shutil.copytree(tmp_path / "1", left)
    store = Store(tmp_path)
    assert store.steps() == [1] and not left.exists()
    store.save(2, state(2), wait=True)
    assert same(store.restore(2, state())[0], state(2))
    store.close()


@pytest.mark.parametrize("part", ["state", "extra"])
def test_a_damaged_checkpoint_names_the_one_before(tmp_path, part):
    store = Store(tmp_path)
    store.save(1, state(), wait=True)
    store.save(2, state(2), wait=True)
    for file in (tmp_path / "2" / part).rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:7])
    with pytest.raises(CheckpointError, match=r"2: the checkpoint is damaged .*; remove that folder to go on from step 1") as error:
        store.restore(2, state())
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert same(store.restore(1, state())[0], state())
    store.close()


def test_a_full_disk_is_said_and_the_earlier_stay(tmp_path):
    big = {"x": jnp.asarray(np.random.default_rng(0).normal(size=(600, 600)), jnp.float32)}
    store = Store(tmp_path)
    store.save(1, big, wait=True)
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        with pytest.raises(CheckpointError, match="disk is full"):
            store.save(2, big, wait=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert 2 not in Store(tmp_path).steps()
    back = Store(tmp_path).restore(1, big)[0]
    np.testing.assert_array_equal(back["x"], big["x"])
