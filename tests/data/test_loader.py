"""Resuming, and sharding over processes: the same rows, bit for bit."""
import json

import numpy as np
import pytest

from llmjax import data
from llmjax.core.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in ("a", "b"):
        (folder / name).mkdir()
        for i in range(12):
            (folder / name / f"{i:02d}.txt").write_text(f"document {i} of {name}: " + "word " * (i * 7 % 40))
    mixture = data.Mixture((data.Part(data.TextFiles(str(folder / "a")), 2.0), data.Part(data.TextFiles(str(folder / "b")), 1.0)))
    return {type(p).__name__: data.build(data.Corpus(mixture, data.Bytes(), data.Fraction(0.2), p), folder / f"shards-{type(p).__name__}", context=32, seed=4, progress=False)
            for p in (data.BestFit(), data.Concatenate(), data.Windows())}


def same(a, b):
    return all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("packing", ["BestFit", "Concatenate", "Windows"])
def test_resume_equals_uninterrupted(packing, built):
    train = built[packing].train
    loader = train.loader(4)
    whole, states = [], []
    for _ in range(30):
        states.append(json.loads(json.dumps(loader.get_state())))
        whole.append(next(loader))
    for step in (0, 1, 7, 29):
        for again in (train.loader(4, start_step=step), train.loader(4, prefetch=1)):
            if step != again.get_state()["step"]:
                again.set_state(states[step])
            assert all(same(next(again), whole[i]) for i in range(step, min(step + 5, 30)))
        assert same(train.batch(step, 4), whole[step])
    assert any(not same(whole[0], w) for w in whole[1:])


@pytest.mark.parametrize("packing", ["BestFit", "Concatenate", "Windows"])
def test_processes_joined_equal_one(packing, built):
    made = built[packing]
    for count in (2, 4):
        for step in (0, 5):
            parts = [made.train.batch(step, 8, i, count) for i in range(count)]
            assert same({k: np.concatenate([p[k] for p in parts]) for k in parts[0]}, made.train.batch(step, 8))
        loaders = [made.train.loader(8, 3, i, count) for i in range(count)]
        parts = [next(loader) for loader in loaders]
        assert same({k: np.concatenate([p[k] for p in parts]) for k in parts[0]}, made.train.batch(3, 8))
        whole, shares = list(made.validation.batches(8)), zip(*(made.validation.batches(8, i, count) for i in range(count)))
        for one, parts in zip(whole, shares, strict=True):
            assert same({k: np.concatenate([p[k] for p in parts]) for k in parts[0]}, one)


def test_seed_and_data_decide(built):
    train = built["BestFit"].train
    other = data.Split(train.pieces, 32, 5)
    assert not same(train.batch(0, 8), other.batch(0, 8)) and train.fingerprint != other.fingerprint
    assert same(data.Split(train.pieces, 32, 4).batch(6, 8), train.batch(6, 8))


def test_a_state_of_something_else_is_refused(built):
    train = built["BestFit"].train
    state = train.loader(4).get_state()
    with pytest.raises(DataError, match="batch_size 4"):
        train.loader(8).set_state(state)
    with pytest.raises(DataError, match="other data"):
        data.Split(train.pieces, 32, 99).loader(4).set_state(state)
    with pytest.raises(ConfigError, match="multiple of 3"):
        train.loader(4, 0, 0, 3)


def test_validation_is_everything_once(built):
    made = built["BestFit"].validation
    batches = list(made.batches(3))
    assert sum(int((b["segment_ids"] > 0).sum()) for b in batches) == made.tokens_per_epoch
    assert len(batches) == made.steps_per_epoch(3) and all(b["tokens"].shape == (3, 32) for b in batches)
