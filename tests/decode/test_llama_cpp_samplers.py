"""DRY, mirostat 2, top-n-sigma and typical sampling against llama.cpp's definitions, written here in NumPy from its documented algorithms; a changed exponent, range or breaker is seen."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.decode import filters, make_sampling, sample, start_history
from llmjax.decode.sampling import pack, row_keys

V = 23


def dry(logits, text, multiplier, base, allowed_length, last_n, breakers):
    """A token loses multiplier · base^(n - allowed_length), n being the longest end of the text that was followed by it before; a breaker ends a match and is never fined."""
    text = list(text)[-last_n:]
    out, longest = logits.copy(), {}
    for end in range(1, len(text)):                          # text[:end] was followed by text[end]
        n = 0
        while n < end and text[end - 1 - n] == text[-1 - n] and text[-1 - n] not in breakers:
            n += 1
        longest[text[end]] = max(longest.get(text[end], 0), n)
    for token, n in longest.items():
        if n >= allowed_length and token not in breakers:
            out[token] -= multiplier * base ** (n - allowed_length)
    return out


def test_dry():
    random = np.random.default_rng(0)
    rows, length = 48, 48
    knobs = dict(multiplier=random.uniform(0.5, 2, rows), base=random.uniform(1.1, 2, rows), allowed_length=random.integers(1, 4, rows), last_n=random.integers(5, 60, rows))
    texts = [np.where(random.random(n) < 0.08, 5, random.integers(0, 3, n)) for n in random.integers(1, length, rows)]
    texts[0], knobs["last_n"][0] = np.tile([1, 2, 3], 14), 60                  # a long loop
    breakers = [set() if i % 2 else {5} for i in range(rows)]
    logits = random.normal(size=(rows, V)).astype(np.float32)
    recent = np.full((rows, 64), -1, np.int32)
    for row, text in zip(recent, texts):
        row[:len(text)] = text[::-1]
    got = jax.jit(filters.penalize_dry)(logits, recent, *(jnp.asarray(knobs[k], jnp.float32) for k in ("multiplier", "base")),
                                        *(jnp.asarray(knobs[k], jnp.int32) for k in ("allowed_length", "last_n")), np.stack([pack(sorted(b), V) for b in breakers]))
    want = np.stack([dry(logits[i], texts[i], *(knobs[k][i] for k in knobs), breakers[i]) for i in range(rows)])
    np.testing.assert_allclose(got, want, rtol=2e-5)             # a power in float32
    assert (np.abs(want - logits) > 0.4).sum() > 20
    other = np.stack([dry(logits[i], texts[i], *(knobs[k][i] for k in knobs), set()) for i in range(rows)])
    assert np.abs(other - want).max() > 0.4, "breakers make no difference here"


def test_an_endless_loop_is_fined_without_overflow():
    """256 equal tokens: base 4 to the 253rd is more than float32 holds."""
    recent = jnp.full((1, 256), 7, jnp.int32)
    got = filters.penalize_dry(jnp.zeros((1, V)), recent, jnp.ones(1), jnp.full(1, 4.0), jnp.full(1, 2), jnp.full(1, 256), None)
    assert np.isfinite(np.asarray(got)).all() and -1e30 < float(got[0, 7]) < -1e28 and (np.asarray(got)[0, :7] == 0).all()


def test_dry_follows_the_text_as_it_grows():
    """A loop of sample() gives what penalising the text written out gives at every step."""
    drawn = jax.jit(sample)
    sampling = make_sampling(2, V, dry_multiplier=[2.0, None], dry_sequence_breakers=[[9], None])
    texts = [[1, 2, 9, 4, 5, 1, 2], [1, 2, 3, 1, 2, 3]]
    history = start_history(sampling, V, texts, length=32)
    random = np.random.default_rng(1)
    for step in range(12):
        logits = random.normal(size=(2, V)).astype(np.float32) * 0.5
        logits[:, :5] += 2
        tokens, _, history = drawn(logits, sampling, row_keys(0, 2), jnp.full(2, step), history)
        want = dry(logits[0], texts[0], 2.0, 1.75, 2, 32, {9}).argmax(), logits[1].argmax()
        assert tuple(np.asarray(tokens)) == want
        texts = [[*t, int(x)] for t, x in zip(texts, tokens)]


def test_mirostat_2():
    """mu by llama.cpp's rule, and what it cuts: surprises in bits above mu; the best token stays."""
    random, rows = np.random.default_rng(0), 6
    tau = random.uniform(1, 4, rows).astype(np.float32)
    sampling = make_sampling(rows, temperature=1.0, mirostat_tau=tau.tolist(), mirostat_eta=0.3)
    history, mu, drawn = start_history(sampling, V, [[]] * rows, length=8), 2 * tau, jax.jit(sample)
    for step in range(15):
        logits = (2 * random.normal(size=(rows, V))).astype(np.float32)
        tokens, _, history = drawn(logits, sampling, row_keys(5, rows), jnp.full(rows, step), history)
        for i, token in enumerate(np.asarray(tokens)):
            p = np.exp(logits[i] - logits[i].max())
            p /= p.sum()
            kept = -np.log2(p) <= mu[i]
            kept[p.argmax()] = True
            assert kept[token]
            surprise = -np.log2(p[token] / p[kept].sum())
            mu[i] -= 0.3 * (surprise - tau[i])
        np.testing.assert_allclose(history.mu, mu, rtol=1e-4, atol=1e-4)
    assert (np.abs(mu - 2 * tau) > 0.1).any()


def test_mirostat_reaches_its_target():
    """Over a fixed flat distribution the mean surprise comes to tau."""
    logits = jnp.broadcast_to(-0.15 * jnp.arange(64.0), (32, 64))
    sampling = make_sampling(32, temperature=1.0, mirostat_tau=3.0)
    history = start_history(sampling, 64, [[]] * 32, length=8)

    def body(history, position):
        before = history.mu
        _, _, history = sample(logits, sampling, row_keys(0, 32), jnp.full(32, position), history)
        return history, (before - history.mu) / 0.1 + 3.0
    _, surprise = jax.lax.scan(body, history, jnp.arange(300))
    assert abs(float(surprise[100:].mean()) - 3.0) < 0.05          # 6,400 draws with a standard deviation of about 1.5 bits: 0.02


@pytest.mark.parametrize("n", [0.5, 1.0, 2.5])
def test_top_n_sigma(n):
    logits = np.random.default_rng(0).normal(size=(5, 200)).astype(np.float32) * 3
    want = logits >= logits.max(-1, keepdims=True) - n * logits.std(-1, keepdims=True)
    got = np.asarray(filters.keep_top_n_sigma(jnp.asarray(logits), jnp.full(5, n)))
    assert ((got > filters.LOW / 2) == want).all() and want.sum() < want.size
    banned = np.where(np.arange(200) % 3 == 0, filters.LOW, logits).astype(np.float32)         # what is banned is no part of the deviation
    left = np.ma.masked_less(banned, -1e29)
    want = ~left.mask & (banned >= left.max(-1, keepdims=True) - n * left.std(-1, keepdims=True))
    assert ((np.asarray(filters.keep_top_n_sigma(jnp.asarray(banned), jnp.full(5, n))) > filters.LOW / 2) == want).all()


def test_temperature_does_not_move_top_n_sigma():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 100)).astype(np.float32) * 3)
    kept = [np.asarray(filters.keep_top_n_sigma(logits / t, jnp.full(3, 1.2))) > filters.LOW / 2 for t in (0.3, 1.0, 4.0)]
    assert (kept[0] == kept[1]).all() and (kept[1] == kept[2]).all()
