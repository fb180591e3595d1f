"""Copies of a state on the hosts' own disks: equal bits back, older ones gone, those of another mesh or run not taken, a lost replica mended by another."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llmjax.checkpoint import Replicas, replicas
from llmjax.core import CheckpointError, make_mesh

DTYPES = (jnp.float32, jnp.bfloat16, jnp.int8, jnp.int32, jnp.bool_, jnp.float8_e4m3fn)


def state(mesh, spec=("fsdp",)):
    place = NamedSharding(mesh, PartitionSpec(*spec))
    random = np.random.default_rng(0)
    arrays = {str(jnp.dtype(d)): jax.device_put(random.standard_normal((8, 6)).astype(np.float32).astype(d), place) for d in DTYPES}
    return {**arrays, "step": jax.device_put(jnp.int32(3), NamedSharding(mesh, PartitionSpec())), "key": jax.device_put(jax.random.key(1), NamedSharding(mesh, PartitionSpec()))}


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def same(a, b):
    raw = lambda x: np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
    return all(raw(x).tobytes() == raw(y).tobytes() and x.sharding == y.sharding for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_bits_come_back(tmp_path):
    kept = state(make_mesh(data=2, fsdp=4))
    store = Replicas(str(tmp_path / "{process}"), "run")
    assert store.newest(shapes(kept)) is None
    for step in (2, 4, 6):
        store.save(step, kept, {"loader": step})
    store.wait()
    found = store.newest(shapes(kept))
    assert found is not None and found.step == 6 and found.whole and sorted(f.name for f in (tmp_path / "0/run").iterdir()) == ["4", "6"]
    again, extra = store.restore(found, shapes(kept))
    assert same(again, kept) and extra == {"loader": 6}
    assert Replicas(str(tmp_path / "{process}"), "other").newest(shapes(kept)) is None
    assert store.newest(shapes(state(make_mesh(data=4, fsdp=2)))) is None, "the pieces of another mesh"
    file = next((tmp_path / "0/run/6").glob("*.json"))
    file.write_text(json.dumps({"arrays": {}, "extra": {}}))
    with pytest.raises(CheckpointError, match="another model"):
        store.restore(found, shapes(kept))
    file.unlink()                                            # a copy that was not finished
    assert store.newest(shapes(kept)).step == 4
    store.close(done=True)
    assert not (tmp_path / "0/run").exists()


@pytest.mark.parametrize("spec", [("fsdp",), (None, "tensor"), ("fsdp", "tensor"), ()], ids=str)
def test_a_lost_replica_is_mended(spec):
    """Every device but those that give a piece holds rubbish."""
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    for name, x in state(mesh, spec).items():
        if name in ("step", "key"):
            continue
        seen, pieces = set(), []
        for shard in sorted(x.addressable_shards, key=lambda s: s.device.id):
            part = np.asarray(shard.data)
            first = replicas.spans(shard.index, x.shape) not in seen
            seen.add(replicas.spans(shard.index, x.shape))
            pieces.append(jax.device_put(part if first else np.zeros_like(part) if x.dtype == bool else (part + part).astype(part.dtype), shard.device))
        torn = jax.make_array_from_single_device_arrays(x.shape, x.sharding, pieces)
        found = replicas.mended(torn, frozenset({0}), x.sharding)
        assert all(np.asarray(a.data).tobytes() == np.asarray(b.data).tobytes() for a, b in zip(found.addressable_shards, x.addressable_shards)), name
