"""Filters against transformers' logits processors on random logits; draws by chi-square."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.decode import make_sampling, sample
from llmjax.decode.sampling import LOW, keep_min_p, keep_top_k, keep_top_p, penalize_repetition, row_keys

B, V = 4, 301


@pytest.fixture(scope="module")
def logits():
    return 3 * jax.random.normal(jax.random.key(0), (B, V))


def same_kept(ours, theirs):
    kept = np.asarray(ours) > LOW / 2
    assert (kept == np.isfinite(theirs.numpy())).all() and kept.sum() < kept.size
    np.testing.assert_array_equal(np.asarray(ours)[kept], theirs.numpy()[kept])


def test_filters_are_transformers(logits):
    import torch
    from transformers.generation import logits_process as theirs
    raw = torch.tensor(np.asarray(logits))
    ids = torch.zeros((B, 1), dtype=torch.long)
    for k in (1, 7, 200):
        same_kept(keep_top_k(logits, jnp.full(B, k)), theirs.TopKLogitsWarper(k)(ids, raw))
    for p in (0.1, 0.5, 0.9, 0.99):
        same_kept(keep_top_p(logits, jnp.full(B, p)), theirs.TopPLogitsWarper(p)(ids, raw))
    for p in (0.01, 0.2):
        same_kept(keep_min_p(logits, jnp.full(B, p)), theirs.MinPLogitsWarper(p)(ids, raw))
    seen = np.zeros((B, V), bool)
    rows = np.random.default_rng(0).integers(0, V, (B, 20))
    np.put_along_axis(seen, rows, True, 1)
    got = penalize_repetition(logits, jnp.asarray(seen), jnp.full(B, 1.3))
    np.testing.assert_allclose(got, theirs.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor(rows), raw).numpy(), rtol=1e-6)


def test_ties_and_edges():
    flat = jnp.zeros((1, 8))
    assert int((keep_top_k(flat, jnp.asarray([3])) > LOW / 2).sum()) == 8          # equal to the third largest: all stay
    assert int((keep_top_p(flat + jnp.arange(8.0)[None] * 100, jnp.asarray([1e-6])) > LOW / 2).sum()) == 1
    assert int((keep_top_p(flat, jnp.asarray([1.0])) > LOW / 2).sum()) == 8


def test_rows_have_their_own_knobs(logits):
    sampling = make_sampling(B, temperature=[0.0, 1.0, 1.0, 1.0], top_k=[None, 1, 2, None])
    tokens, logprobs = sample(logits, sampling, row_keys(0, B), jnp.arange(B))
    best = np.asarray(logits.argmax(-1))
    assert tokens[0] == best[0] and tokens[1] == best[1] and tokens[2] in np.argsort(-np.asarray(logits[2]))[:2]
    np.testing.assert_allclose(logprobs, jax.nn.log_softmax(logits)[jnp.arange(B), tokens], rtol=1e-5)
    assert make_sampling(2, temperature=0.0).temperature is None


def test_draws_follow_the_distribution():
    """Chi-square with 5 degrees of freedom: 20.5 is exceeded once in a thousand."""
    row = jnp.log(jnp.asarray([0.3, 0.25, 0.2, 0.15, 0.07, 0.03]))
    n = 4000
    sampling = make_sampling(n, temperature=2.0)
    tokens, _ = sample(jnp.broadcast_to(row, (n, 6)), sampling, row_keys(11, n), jnp.zeros(n, jnp.int32))
    want = n * np.asarray(jax.nn.softmax(row / 2))
    counts = np.bincount(np.asarray(tokens), minlength=6)
    assert ((counts - want) ** 2 / want).sum() < 20.5
