"""Filters against transformers' logits processors on random logits; draws by chi-square."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.core import ConfigError
from llmjax.decode import best_logprobs, distribution, make_sampling, sample, start_history
from llmjax.decode.filters import LOW, draw, keep_min_p, keep_top_k, keep_top_p, keep_typical, penalize_repetition
from llmjax.decode.sampling import NUMBERS, row_keys

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
    for p in (0.2, 0.7, 0.95):
        same_kept(keep_typical(logits, jnp.full(B, p)), theirs.TypicalLogitsWarper(p)(ids, raw))
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
    tokens, logprobs, _ = sample(logits, sampling, row_keys(0, B), jnp.arange(B))
    best = np.asarray(logits.argmax(-1))
    assert tokens[0] == best[0] and tokens[1] == best[1] and tokens[2] in np.argsort(-np.asarray(logits[2]))[:2]
    np.testing.assert_allclose(logprobs, jax.nn.log_softmax(logits)[jnp.arange(B), tokens], rtol=1e-5)
    assert make_sampling(2, temperature=0.0).temperature is None


def test_draws_follow_the_distribution():
    """Chi-square with 5 degrees of freedom: 20.5 is exceeded once in a thousand."""
    row = jnp.log(jnp.asarray([0.3, 0.25, 0.2, 0.15, 0.07, 0.03]))
    n = 4000
    sampling = make_sampling(n, temperature=2.0)
    tokens, _, _ = sample(jnp.broadcast_to(row, (n, 6)), sampling, row_keys(11, n), jnp.zeros(n, jnp.int32))
    want = n * np.asarray(jax.nn.softmax(row / 2))
    counts = np.bincount(np.asarray(tokens), minlength=6)
    assert ((counts - want) ** 2 / want).sum() < 20.5


@pytest.mark.parametrize("sharpness", [0.01, 1.0, 12.0])
def test_thresholds_found_near_and_deep_are_the_same(sharpness):
    """Flat rows are bisected, peaked ones are found among the largest; both are a sort's."""
    logits = sharpness * jax.random.normal(jax.random.key(1), (3, 1000))
    order = np.sort(np.asarray(logits), -1)[:, ::-1]
    for k in (1, 128, 129, 999):
        assert (np.asarray(keep_top_k(logits, jnp.full(3, k))).max(-1, where=np.asarray(logits) < order[:, k - 1:k], initial=LOW) == LOW).all()
        assert (np.asarray(keep_top_k(logits, jnp.full(3, k)) > LOW / 2).sum(-1) == k).all()
    p = np.exp(order - order.max())
    p /= p.sum(-1, keepdims=True)
    for mass in (0.3, 0.9):
        want = (p.cumsum(-1) < mass - 1e-6).sum(-1) + 1
        got = np.asarray(keep_top_p(logits, jnp.full(3, mass)) > LOW / 2).sum(-1)
        assert (np.abs(got - want) <= (p.cumsum(-1) - mass <= 1e-6).sum(-1) - want + 1).all()          # where a running sum stands at the mass but for rounding, either neighbour is right


KNOBS = dict(temperature=0.8, top_k=40, top_p=0.9, min_p=0.02, typical_p=0.9, top_n_sigma=2.0, mirostat_tau=4.0, repetition_penalty=1.2, frequency_penalty=0.4, presence_penalty=0.3,
             dry_multiplier=1.0, logit_bias={3: 1.0, 5: -2.0}, allowed_token_ids=list(range(0, V, 2)), bad_words=[[4], [6, 8]], min_tokens=3, end_tokens=[0])


GROUPS = {"filters": ["top_k", "top_p", "min_p", "typical_p", "top_n_sigma"], "flat": ["top_k"], "state": ["mirostat_tau", "repetition_penalty", "dry_multiplier", "min_tokens", "end_tokens"],
          "counts": ["frequency_penalty", "presence_penalty"], "ids": ["logit_bias", "allowed_token_ids", "bad_words"]}


@pytest.mark.parametrize("name", GROUPS)
def test_a_row_is_the_same_alone_and_among_others(logits, name):
    """Rows with some knobs, with all, with none and greedy draw in one batch what each draws alone: equality."""
    mine = {"temperature": 0.8} | {k: KNOBS[k] for k in GROUPS[name]}
    if name == "flat":
        mine["top_k"], logits = 200, logits / 100                   # its threshold is bisected, the others' are found among the largest
    rows = [mine, KNOBS, dict(temperature=1.0), dict(mine, temperature=0.0)]
    texts = [[5, 6, 7, 5, 6], [8, 8, 8], [9], [4, 6, 4, 6, 4]]

    drawn = jax.jit(sample)

    def run(chosen):
        together = make_sampling(len(chosen), V, **{k: [rows[i].get(k) for i in chosen] for k in KNOBS if any(k in rows[i] for i in chosen)})
        history = start_history(together, V, [texts[i] for i in chosen], length=16)
        made = []
        for step in range(6):
            tokens, _, history = drawn(logits[jnp.asarray(chosen)] + step, together, row_keys([7 + i for i in chosen], len(chosen)), jnp.full(len(chosen), step), history)
            made.append(np.asarray(tokens))
        return np.stack(made, 1)
    together = run([0, 1, 2, 3])
    for i in (0, 1, 2):
        np.testing.assert_array_equal(run([i])[0], together[i])


def test_what_no_row_uses_is_not_compiled(logits):
    """A step's program holds no more for knobs that are neutral in every row."""
    def program(**knobs):
        sampling = make_sampling(B, V, **knobs)
        return str(jax.make_jaxpr(lambda x: sample(x, sampling, row_keys(0, B), jnp.arange(B), start_history(sampling, V, [[1]] * B, length=8))[0])(logits))
    neutral = {name: knob.neutral for name, knob in NUMBERS.items() if knob.of is None and name not in ("mirostat_tau", "top_n_sigma", "temperature")}
    assert program(temperature=0.7) == program(temperature=0.7, **neutral, logit_bias={}, bad_words=[], top_n_sigma=None)
    assert len(program()) < len(program(temperature=0.7)) < len(program(temperature=0.7, top_p=0.9))


def test_penalties_are_openai_s(logits):
    """mu[j] - c[j] · frequency - (c[j] > 0) · presence over the answer's tokens, not the prompt's; repetition over both."""
    sampling = make_sampling(2, V, frequency_penalty=[0.5, None], presence_penalty=[0.25, 2.0])
    history = start_history(sampling, V, [[1, 1], [2]], [[3, 3, 4], [5]], length=8)
    got = distribution(logits[:2], make_sampling(2, V, temperature=1.0, frequency_penalty=[0.5, None], presence_penalty=[0.25, 2.0]), history)
    want = np.array(logits[:2])
    want[0, 3] -= 2 * 0.5 + 0.25
    want[0, 4] -= 0.5 + 0.25
    want[1, 5] -= 2.0
    np.testing.assert_allclose(got, jax.nn.softmax(want), rtol=1e-5, atol=1e-9)
    both = make_sampling(1, V, repetition_penalty=2.0)
    assert np.flatnonzero(start_history(both, V, [[1, 1]], [[3]], length=8).seen[0]).tolist() == [1, 3]


def test_bad_words_and_biases_are_transformers(logits):
    import torch
    from transformers.generation import logits_process as theirs
    texts = [[1, 2, 3], [9, 2, 3], [5, 6, 2], [3, 3, 3]]
    words = [[7], [2, 3, 8], [3, 11], [6, 2, 12], [1, 2, 3, 13]]
    ids, raw = torch.tensor(texts), torch.tensor(np.asarray(logits))
    sampling = make_sampling(B, V, bad_words=words)
    want = theirs.NoBadWordsLogitsProcessor(words, eos_token_id=V - 1)(ids, raw).softmax(-1)
    got = distribution(logits, make_sampling(B, V, bad_words=words, temperature=1.0), start_history(sampling, V, texts, length=8))
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-5, atol=1e-9)
    bias = {3: 1.5, 200: -4.0}
    want = theirs.SequenceBiasLogitsProcessor({(k,): v for k, v in bias.items()})(ids, raw).softmax(-1)
    np.testing.assert_allclose(distribution(logits, make_sampling(B, V, logit_bias=bias, temperature=1.0), start_history(make_sampling(B), V, texts, length=8)), want.numpy(), rtol=1e-5, atol=1e-9)


def test_allowed_ids_and_min_tokens(logits):
    sampling = make_sampling(B, V, temperature=2.0, allowed_token_ids=[[3, 31, 32, 300], None, [64], None], min_tokens=[0, 2, 0, 0], end_tokens=list(range(V - 1)))
    history = start_history(sampling, V, [[1]] * B, length=8)
    for step in range(3):
        tokens, _, history = sample(logits, sampling, row_keys(step, B), jnp.full(B, step), history)
        assert int(tokens[0]) in (3, 31, 32, 300) and int(tokens[2]) == 64
        assert (int(tokens[1]) == V - 1) == (step < 2)           # all but one token end the text


def test_draws_over_a_large_vocabulary_follow_the_distribution():
    """200,000 draws from 100,000 tokens, sixteen equal shares of them: chi-square with 15 degrees of freedom, 37.7 once in a thousand; no draw has probability zero."""
    size, n = 100_000, 200_000
    weights = np.random.default_rng(0).exponential(size=size).astype(np.float32)
    weights[::3] = 0
    u = jax.random.uniform(jax.random.key(2), (n, 2))
    tokens = np.asarray(jax.jit(lambda u: jax.lax.map(lambda v: draw(jnp.asarray(weights)[None], v[None])[0], u, batch_size=500))(u))
    assert (weights[tokens] > 0).all()
    edges = np.searchsorted(weights.cumsum(dtype=np.float64), weights.sum(dtype=np.float64) * np.arange(1, 16) / 16)
    want = n * np.add.reduceat(weights.astype(np.float64), [0, *edges]) / weights.sum(dtype=np.float64)
    counts = np.histogram(tokens, [0, *edges, size])[0]
    assert ((counts - want) ** 2 / want).sum() < 37.7


def test_filters_together_follow_the_distribution(logits):
    """Chi-square of what is drawn against `distribution`, which is transformers' chain of the same filters: with at most 24 degrees of freedom 51.2 is exceeded once in a thousand."""
    import torch
    from transformers.generation import logits_process as theirs
    n, row = 4000, logits[:1] / 2
    knobs = dict(temperature=1.5, top_k=25, top_p=0.9, min_p=0.1)
    want = torch.tensor(np.asarray(row))
    for warper in (theirs.TemperatureLogitsWarper(1.5), theirs.TopKLogitsWarper(25), theirs.TopPLogitsWarper(0.9), theirs.MinPLogitsWarper(0.1)):
        want = warper(torch.zeros((1, 1), dtype=torch.long), want)
    p = want.softmax(-1).numpy()[0].astype(np.float64)
    np.testing.assert_allclose(distribution(row, make_sampling(1, V, **knobs), start_history(make_sampling(1), V, [[]], length=1))[0], p, rtol=1e-4, atol=1e-9)
    tokens, _, _ = sample(jnp.broadcast_to(row, (n, V)), make_sampling(n, V, **knobs), row_keys(3, n), jnp.zeros(n, jnp.int32))
    counts = np.bincount(np.asarray(tokens), minlength=V)
    assert not counts[p == 0].any() and 5 < (p > 0).sum() <= 25
    assert ((counts - n * p)[p > 0] ** 2 / (n * p[p > 0])).sum() < 51.2


def test_seeds():
    data = lambda seed, rows=1: np.asarray(jax.random.key_data(row_keys(seed, rows)))
    np.testing.assert_array_equal(data([7]), np.asarray(jax.random.key_data(jax.random.key(7)))[None])
    assert len({data([s]).tobytes() for s in (7, -7, 7 + (1 << 32), (1 << 63) - 1, 0)}) == 5
    for bad in (1.5, True, 1 << 64, [0, "x"]):
        with pytest.raises(ConfigError, match="64 bits"):
            row_keys(bad, 2)


def test_alternatives(logits):
    ids, logprobs = best_logprobs(logits, 5)
    want = np.asarray(jax.nn.log_softmax(logits))
    np.testing.assert_array_equal(ids, np.argsort(-want)[:, :5])
    np.testing.assert_allclose(logprobs, np.sort(want)[:, ::-1][:, :5], rtol=1e-5)


def test_a_row_of_nan_hurts_nobody_else(logits):
    sampling = make_sampling(B, V, temperature=0.9, top_p=0.9, top_k=50, repetition_penalty=1.1)
    history = start_history(sampling, V, [[1]] * B, length=8)
    poisoned = logits.at[1].set(jnp.nan)
    good, bad = (np.asarray(sample(x, sampling, row_keys(0, B), jnp.arange(B), history)[0]) for x in (logits, poisoned))
    np.testing.assert_array_equal(np.delete(good, 1), np.delete(bad, 1))
    assert 0 <= bad[1] < V


@pytest.mark.parametrize("knobs, word", [
    (dict(temprature=1.0), "did you mean 'temperature'"), (dict(temperature=float("nan")), "temperature=nan"), (dict(temperature=1e-9), "1e-5 or more"), (dict(typical_p=0.0), "typical_p=0.0"),
    (dict(top_n_sigma=-1), "top_n_sigma=-1"), (dict(frequency_penalty=3), "from -2 to 2"), (dict(dry_base=2.0), "says something about dry_multiplier"), (dict(mirostat_eta=0.1), "about mirostat_tau"),
    (dict(top_k=1.5), "top_k=1.5"), (dict(top_p="0.9"), "top_p='0.9'"), (dict(logit_bias={V: 1.0}), f"id {V} is outside"), (dict(logit_bias={1: float("inf")}), "no number from"),
    (dict(logit_bias=[1]), "logit_bias"), (dict(allowed_token_ids=[]), "nothing could be drawn"), (dict(bad_words=[[]]), "empty sequence"), (dict(bad_words=[[1.5]]), "1.5 is no id"),
    (dict(min_tokens=-1), "min_tokens=-1"), (dict(dry_sequence_breakers=[1]), "about dry_multiplier"), (dict(temperature=[1.0, 2.0, 3.0]), "3 values for 2 rows")])
def test_bad_knobs_are_named(knobs, word):
    with pytest.raises(ConfigError, match=word):
        make_sampling(2, V, **knobs)
