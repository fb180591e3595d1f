"""Plans and order: every token of an epoch once, rows within their length, documents put together again exactly, permutations, exact mixtures."""
import collections

import numpy as np
import pytest

from llmjax import data
from llmjax.core.errors import DataError
from llmjax.data.dataset import Piece, Split
from llmjax.data.order import BLOCK, epochs, mix, permute, proportions
from llmjax.data.packing import Packed, best_fit, make_plan
from llmjax.data.store import TokenStore

PACKINGS = [data.BestFit(), data.Concatenate()]


def store(sizes, seed=0, cuts=3, masked=False):
    """Documents of distinct ids, over several shards. -> (store, documents, masks)."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(sum(sizes)).astype(np.uint32) + 1
    documents = np.split(ids, np.cumsum(sizes)[:-1])
    masks = [rng.random(len(d)) < 0.5 for d in documents]
    groups = np.array_split(np.arange(len(sizes)), cuts)
    arrays = [np.concatenate([documents[i] for i in g]) for g in groups]
    return TokenStore(arrays, [np.cumsum([len(documents[i]) for i in g]) for g in groups],
                      [np.concatenate([masks[i] for i in g]).astype(np.uint8) for g in groups] if masked else None, str(seed), 0), documents, masks


def split(packing, sizes, context, masked=False, seed=3):
    made, documents, masks = store(sizes, masked=masked)
    return Split([Piece(made, make_plan(packing, made.document_starts, context), 1.0)], context, seed), documents, masks


def sizes_for(context):
    return [1, 2, context - 1, context, context + 1, 3 * context, 3 * context + 1, 5, 5, 5, 1, 7, 2 * context - 1, *np.random.default_rng(1).integers(1, 2 * context, 40).tolist()]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("context", [2, 16, 61])
def test_documents_come_back(packing, context):
    """Each (token, target) pair of each document once, nothing across documents, positions from 0 by ones, segments counted from 1."""
    made, documents, _ = split(packing, sizes_for(context), context)
    pairs, tokens = collections.Counter(), collections.Counter()
    for batch in made.batches(4):
        assert all(v.shape == (4, context) and v.dtype == (np.float32 if k == "weights" else np.int32) for k, v in batch.items())
        for t, y, w, p, s in zip(*(batch[k] for k in ("tokens", "targets", "weights", "positions", "segment_ids"))):
            used = int((s > 0).sum())
            assert (s[:used] > 0).all() and (s[used:] == 0).all() and (w[used:] == 0).all() and (t[used:] == 0).all()
            assert (np.diff(s[:used]) >= 0).all() and (np.diff(s[:used]) <= 1).all() and (not used or s[0] == 1)
            for k in range(1, s.max() + 1):
                assert (p[s == k] == np.arange((s == k).sum())).all()
            inside = (s[1:] == s[:-1]) & (s[1:] > 0)
            assert (y[:-1][inside] == t[1:][inside]).all() and (w[:-1][inside] == 1).all()
            tokens.update(t[:used].tolist())
            pairs.update(zip(t[w > 0].tolist(), y[w > 0].tolist()))
    assert tokens == collections.Counter(np.concatenate(documents).tolist())
    assert pairs == collections.Counter((a, b) for d in documents for a, b in zip(d.tolist(), d.tolist()[1:]))


@pytest.mark.parametrize("packing", PACKINGS)
def test_an_epoch_of_training_is_everything_once_and_the_next_has_another_order(packing):
    made, documents, _ = split(packing, sizes_for(16), 16)
    rows = made.rows_per_epoch
    seen = [np.stack([made.batch(i, 1)["tokens"][0] for i in range(e * rows, (e + 1) * rows)]) for e in range(2)]
    plain = np.concatenate([b["tokens"] for b in made.batches(1)])
    for order in seen:
        assert sorted(map(tuple, order)) == sorted(map(tuple, plain))
    assert not np.array_equal(seen[0], seen[1]) and not np.array_equal(seen[0], plain)
    assert made.tokens_per_epoch == sum(map(len, documents)) and made.steps_per_epoch(7) == -(-rows // 7)


def test_documents_that_fit_stay_whole():
    made, documents, _ = split(data.BestFit(), sizes_for(16), 16)
    rows = [tuple(t[s == k]) for b in made.batches(1) for t, s in zip(b["tokens"], b["segment_ids"]) for k in range(1, s.max() + 1)]
    assert all(tuple(d) in rows for d in documents if len(d) <= 16)


@pytest.mark.parametrize("packing", PACKINGS)
def test_masks_become_weights(packing):
    made, documents, masks = split(packing, sizes_for(16), 16, masked=True)
    learnt = {int(d[i]) for d, m in zip(documents, masks) for i in range(1, len(d)) if m[i]}
    got = [int(y) for b in made.batches(4) for y in b["targets"][b["weights"] > 0]]
    assert sorted(got) == sorted(learnt)


def simple_best_fit(lengths, context):
    """One item at a time, by the book."""
    rooms = []
    for size in sorted(lengths, reverse=True):
        fits = [r for r in range(len(rooms)) if rooms[r] >= size]
        if fits:
            rooms[min(fits, key=lambda r: rooms[r])] -= size
        else:
            rooms.append(context - size)
    return sorted(rooms)


@pytest.mark.parametrize("seed", range(8))
def test_best_fit_equals_the_simple_algorithm(seed):
    rng = np.random.default_rng(seed)
    context = int(rng.integers(5, 200))
    lengths = np.minimum(rng.geometric(3 / context, 500), context)
    plan = best_fit(np.concatenate([[0], np.cumsum(lengths)]), context)
    rooms = sorted(context - sum(n for _, n, _ in plan.segments(r)) for r in range(plan.rows))
    assert rooms == simple_best_fit(lengths.tolist(), context)


def test_mistakes_would_be_seen():
    """A plan that swaps two starts breaks the equality that the tests above rest on."""
    made, _, _ = store([5, 6, 7])
    plan = best_fit(made.document_starts, 8)
    broken = Packed(plan.first, plan.starts[::-1].copy(), plan.lengths, plan.goes_on)
    assert [broken.segments(r) for r in range(3)] != [plan.segments(r) for r in range(3)]


def test_windows():
    made, documents, _ = split(data.Windows(), [30, 40, 50], 16)
    stream = np.concatenate(documents)
    at = {int(t): i for i, t in enumerate(stream)}
    starts = []
    for step in range(200):
        batch = made.batch(step, 4)
        for t, y, w in zip(batch["tokens"], batch["targets"], batch["weights"]):
            starts.append(at[int(t[0])])
            assert (t == stream[starts[-1]:starts[-1] + 16]).all() and (y == stream[starts[-1] + 1:starts[-1] + 17]).all() and w.all()
    assert min(starts) == 0 and max(starts) == len(stream) - 17 and len(set(starts)) > 100  # every place can be drawn, the last one too
    targets = np.concatenate([b["targets"][b["weights"] > 0] for b in made.batches(3)])
    assert targets.tolist() == stream[1:].tolist()
    with pytest.raises(DataError, match="too few"):
        split(data.Windows(), [5, 5, 6], 16)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 4097])
def test_permutations(size):
    everything = np.arange(size)
    one, two = permute(everything, size, 1), permute(everything, size, 2)
    assert sorted(one) == sorted(two) == list(range(size))
    assert size < 7 or (one != two).any()
    assert permute(everything[-1:], size, 1) == one[-1]
    if size >= 1000:  # no place keeps near its neighbours: the correlation of place and row is noise
        assert abs(np.corrcoef(everything, one)[0, 1]) < 0.1 and abs(np.corrcoef(one[1:], one[:-1])[0, 1]) < 0.1


def test_permutations_have_no_favourites():
    counts = np.zeros((5, 5))
    for key in range(2000):
        counts[np.arange(5), permute(np.arange(5), 5, key)] += 1
    assert abs(counts - 400).max() < 6 * np.sqrt(400)


def test_mixtures_are_exact():
    counts = proportions([0.5, 0.3, 0.2001])
    assert counts.sum() == BLOCK and abs(counts / BLOCK - np.array([0.5, 0.3, 0.2001]) / 1.0001).max() <= 1 / BLOCK
    part, nth = mix(np.arange(3 * BLOCK), counts, 5)
    for b in range(3):
        assert np.bincount(part[b * BLOCK:(b + 1) * BLOCK]).tolist() == counts.tolist()
    for p in range(3):
        assert sorted(nth[part == p]) == list(range(3 * counts[p]))  # each part counts its own rows, none left out
    assert not np.array_equal(part[:BLOCK], part[BLOCK:2 * BLOCK])


def test_parts_keep_their_own_epochs():
    a, b = store([10] * 20, 1)[0], store([10] * 7, 2)[0]
    made = Split([Piece(s, make_plan(data.BestFit(), s.document_starts, 10), w) for s, w in ((a, 3.0), (b, 1.0))], 10, 0)
    drawn = [made.row(i) for i in range(BLOCK)]
    for piece, rows in ((0, 20), (1, 7)):
        count = collections.Counter(r for p, r in drawn if p == piece)
        assert len(count) == rows and max(count.values()) - min(count.values()) <= 1 + 1
    assert sum(p == 0 for p, _ in drawn) == 768
    assert np.array_equal(epochs(np.arange(7), 7, 0, "x"), epochs(np.arange(21), 7, 0, "x")[:7])
