"""safetensors files against the safetensors package, shards, damage and a full disk."""
import json
import resource
import signal

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmjax.checkpoint import safetensors_file as st
from llmjax.checkpoint.table import Export
from llmjax.core.errors import CheckpointError

rng = np.random.default_rng(0)
TENSORS = {"a": rng.normal(size=(5, 7)).astype(np.float32), "b.weight": rng.normal(size=(300,)).astype(np.float16), "empty": np.zeros((0, 3), np.float32),
           "scalar": np.array(3.5, np.float32), "ids": np.arange(6, dtype=np.int64).reshape(2, 3)}
HALF = rng.normal(size=(4, 6)).astype(ml_dtypes.bfloat16)


def as_exports(tensors):
    return [Export(name, x.shape, x.dtype, lambda x=x: x) for name, x in tensors.items()]


def nothing(folder):
    pass


def test_reads_what_the_package_writes(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    source = st.open_folder(tmp_path)
    assert source.shapes == {name: x.shape for name, x in TENSORS.items()}
    for name, x in TENSORS.items():
        got = source.read(name)
        assert got.dtype == x.dtype
        np.testing.assert_array_equal(got, x)


def test_the_package_reads_what_is_written(tmp_path):
    st.write_folder(tmp_path / "out", as_exports(TENSORS | {"half": HALF}), nothing)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model.safetensors"]
    for name, x in load_file(tmp_path / "out" / "model.safetensors").items():
        want = HALF if name == "half" else TENSORS[name]
        assert x.tobytes() == want.tobytes() and x.shape == want.shape
    np.testing.assert_array_equal(st.open_folder(tmp_path / "out").read("half"), HALF)


def test_shards_and_their_index(tmp_path):
    st.write_folder(tmp_path, as_exports(TENSORS), nothing, shard_bytes=400)
    index = json.loads((tmp_path / st.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in TENSORS.values())
    assert set(index["weight_map"]) == set(TENSORS) and len(set(index["weight_map"].values())) == 3
    source = st.open_folder(tmp_path)
    assert all(np.array_equal(source.read(name), x) for name, x in TENSORS.items())
    st.write_folder(tmp_path, as_exports({"a": TENSORS["a"]}), nothing)         # a smaller model later: nothing of the first is left
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors"]


@pytest.mark.parametrize(("spoil", "words"), [
    (lambda b: b[:-10], "truncated"), (lambda b: b[:5], "truncated"), (lambda b: b[:60], "truncated"), (lambda b: b"", "truncated"),
    (lambda b: b[:8] + b"x" * (len(b) - 8), "header cannot be read"), (lambda b: b.replace(b"[5,7]", b"[5,8]"), "claims shape"),
    (lambda b: b.replace(b'"F16"', b'"F17"'), "type F17"),
])
def test_damaged_files_get_one_line(tmp_path, spoil, words):
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(spoil((tmp_path / "model.safetensors").read_bytes()))
    with pytest.raises(CheckpointError, match=words) as error:
        st.open_folder(tmp_path)
    assert "\n" not in str(error.value) and "model.safetensors" in str(error.value) and len(str(error.value)) < 400


def test_a_file_that_became_shorter_after_it_was_opened(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"w": np.zeros((50, 7), np.float32)}, file)
    source = st.open_folder(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    np.testing.assert_array_equal(source.read("w", 0, 40), np.zeros((40, 7), np.float32))
    for rows in ((), (40, 50)):
        with pytest.raises(CheckpointError, match=r"model\.safetensors: it ends inside the tensor 'w'"):
            source.read("w", *rows)


def test_folders_without_usable_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        st.open_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"pickled.*any code"):
        st.open_folder(tmp_path)


def test_missing_shard_and_doubled_tensor(tmp_path):
    st.write_folder(tmp_path, as_exports(TENSORS), nothing, shard_bytes=400)
    (tmp_path / "model-00003-of-00003.safetensors").rename(tmp_path / "kept")
    with pytest.raises(FileNotFoundError, match="1 of 3 shards are missing, model-00003"):
        st.open_folder(tmp_path)
    (tmp_path / "model-00003-of-00003.safetensors").write_bytes((tmp_path / "model-00001-of-00003.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="stands in both"):
        st.open_folder(tmp_path)


@pytest.fixture
def small_files():
    """Files may not grow over 100 kB, as if the disk were full there."""
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_what_stood_there(tmp_path, small_files):
    st.write_folder(tmp_path / "old", as_exports(TENSORS), nothing)
    before = (tmp_path / "old" / "model.safetensors").read_bytes()
    big = as_exports({"big": np.zeros(100_000, np.float32)})
    for name in ("old", "new"):
        with pytest.raises(CheckpointError, match="disk is full"):
            st.write_folder(tmp_path / name, big, nothing)
    assert (tmp_path / "old" / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["model.safetensors", "old"]
