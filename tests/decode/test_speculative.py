"""Speculation: greedy text token for token that of plain decoding, over rings, states and encoder-decoders too; draws in distribution (chi-square over all continuations); acceptance = Σ min(p, q)."""
import dataclasses as dc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax import decode
from llmjax.core import Attention, Compute, ConfigError, GatedDelta, Layer, Mlp, ModelConfig, Rope
from llmjax.decode import DraftModel, EarlyExit, NGram
from llmjax.decode.rows import Row
from llmjax.decode.speculative import Drafting, lookup, speculated
from llmjax.decode.stops import Stops
from llmjax.models import Decoder, init_params

V = 11
LAYER = Layer(Attention(2, 1, 8, Rope()), Mlp(16))
RING = dc.replace(LAYER, mixer=dc.replace(LAYER.mixer, window=5))
STATE = Layer(GatedDelta(2, 2, 8, 8, 4), Mlp(16))
PROMPTS = [[1, 2, 3, 1, 2], [5, 6, 7, 8, 5, 6, 7, 8, 5], [9]]


def tiny(seed, *layers, scale=3.0):
    model = Decoder(ModelConfig(V, 16, prefix=layers, tied=True, context=128), Compute("float32"))
    return model, jax.tree.map(lambda x: scale * x, init_params(model, jax.random.key(seed)))


@pytest.fixture(scope="module")
def models():
    return tiny(0, LAYER, LAYER), tiny(1, LAYER)


@pytest.mark.parametrize("layers", [(LAYER, LAYER), (LAYER, RING), (LAYER, STATE)], ids=["full", "ring", "state"])
def test_greedy_is_plain_decoding(layers, models):
    model, params = tiny(0, *layers)
    knobs = dict(max_new_tokens=25, stop=[])
    plain = decode.complete(model, params, None, PROMPTS, logprobs=2, **knobs)
    for draft in (NGram(4, 2), DraftModel(*models[1], 3), EarlyExit(1, 3)):
        fast = decode.complete(model, params, None, PROMPTS, draft=draft, logprobs=2, **knobs)
        assert [c.ids for c in fast] == [c.ids for c in plain] and [c.finish for c in fast] == [c.finish for c in plain]
        np.testing.assert_allclose([c.logprobs for c in fast], [c.logprobs for c in plain], atol=1e-4)
        assert [[i for i, _ in a] for a in fast[0].alternatives] == [[i for i, _ in a] for a in plain[0].alternatives]


def test_knobs_ends_and_limits(models):
    """Penalties, bans and min tokens see guesses as draws do; end tokens in the midst of right guesses end the row."""
    (model, params), small = models
    knobs = dict(max_new_tokens=20, stop=[3], repetition_penalty=1.3, frequency_penalty=0.3, bad_words=[[4], [5, 6]], min_tokens=4, dry_multiplier=0.8)
    plain = decode.complete(model, params, None, PROMPTS, **knobs)
    for draft in (NGram(4, 2), DraftModel(*small, 3)):
        assert [(c.ids, c.finish) for c in decode.complete(model, params, None, PROMPTS, draft=draft, **knobs)] == [(c.ids, c.finish) for c in plain]
    long = decode.complete(model, params, None, [[5] * 120], max_new_tokens=50, stop=[], draft=NGram(4))[0]
    assert len(long.ids) == 9 and long.ids == decode.complete(model, params, None, [[5] * 120], max_new_tokens=50, stop=[])[0].ids


def exact(model, params, prompt, temperature):
    """Probabilities [V, V] of two tokens after the prompt."""
    first = jax.nn.softmax(model.apply({"params": params}, jnp.asarray([prompt]))[0][0, -1] / temperature)
    second = jax.nn.softmax(model.apply({"params": params}, jnp.asarray([[*prompt, t] for t in range(V)]))[0][:, -1] / temperature)
    return np.asarray(first[:, None] * second, np.float64)


@pytest.mark.parametrize("kind", ["model", "ngram", "exit"])
def test_draws_follow_the_model_s_own_distribution(kind, models):
    """6,000 answers of three tokens to one prompt; chi-square over the 121 continuations' second and third token given by the exact joint, cells of less than 5 together: three standard
    deviations above its degrees of freedom are exceeded once in about 500."""
    (model, params), small = models
    draft = {"model": DraftModel(*small, 2), "ngram": NGram(2, 2), "exit": EarlyExit(1, 2)}[kind]
    n, prompt = 6000, [1, 2, 3, 1, 2, 7, 1, 2]
    found = decode.complete(model, params, None, [prompt], n=n, max_new_tokens=3, temperature=1.5, seed=5, stop=[], draft=draft)
    ids = np.asarray([c.ids for c in found])
    first = jax.nn.softmax(model.apply({"params": params}, jnp.asarray([prompt]))[0][0, -1] / 1.5)
    joint = sum(float(first[t]) * exact(model, params, [*prompt, t], 1.5) for t in range(V))
    counts = np.zeros((V, V))
    np.add.at(counts, (ids[:, 1], ids[:, 2]), 1)
    common = n * joint >= 5
    want, got = n * joint[common], counts[common]
    if not common.all():
        want, got = np.append(want, n * joint[~common].sum()), np.append(got, counts[~common].sum())
    freedom = len(want) - 1
    assert ((got - want) ** 2 / want).sum() < freedom + 3 * np.sqrt(2 * freedom) and freedom > 20


def test_acceptance_is_the_overlap(models):
    """The share of first guesses that are right is Σ min(p, q): 4,000 rows, standard deviation below 0.008."""
    (model, params), (small, small_params) = models
    n, prompt = 4000, [1, 2, 3]
    p, q = (np.asarray(jax.nn.softmax(m.apply({"params": w}, jnp.asarray([[*prompt, 7]]))[0][0, -1])) for m, w in ((model, params), (small, small_params)))
    rows = [Row(prompt, Stops((), ()), 3, [7], [0.0]) for _ in range(n)]
    caches = []
    for m, w in ((model, params), (small, small_params)):
        _, cache = decode.prefill(m, w, np.asarray([prompt] * n, np.int32), np.tile(np.arange(3, dtype=np.int32), (n, 1)), np.ones((n, 3), np.int32), decode.init_cache(m, n, 64))
        caches.append(cache)
    sampling = decode.make_sampling(n, temperature=1.0)
    steps = speculated(model, params, caches[0], rows, [[]] * n, Drafting(DraftModel(small, small_params, 1), small, small_params, caches[1]), sampling, decode.row_keys(3, n), decode.History())
    right = np.asarray(next(steps))
    assert (right[:, 0] == 1).all() and 0.1 < np.minimum(p, q).sum() < 0.95
    assert abs(right[:, 1].mean() - np.minimum(p, q).sum()) < 0.025


def test_a_row_is_the_same_alone_and_among_others(models):
    (model, params), small = models
    knobs = dict(max_new_tokens=15, temperature=1.2, top_p=0.9, stop=[], mirostat_tau=2.0)
    for draft in (NGram(3, 2), DraftModel(*small, 3)):
        together = decode.generate(model, params, None, PROMPTS, seed=[4, 5, 6], draft=draft, **knobs)
        assert together == [decode.generate(model, params, None, [p], seed=[s], draft=draft, **knobs)[0] for p, s in zip(PROMPTS, (4, 5, 6))]


def test_a_good_draft_saves_calls(models):
    """The model as its own draft: every greedy guess is right, so five tokens a call."""
    (model, params), _ = models
    rows = [Row([1, 2, 3], Stops((), ()), 21)]
    from llmjax.decode.generate import speculate
    steps = list(speculate(*decode.prepare(model, params), [[1, 2, 3]], rows, DraftModel(model, params, 4), max_new_tokens=21, sampling=decode.make_sampling(1), seed=0, n=1))
    assert len(steps) == 4 and all(row == (4, 4) for step in steps for row in step) and len(rows[0].ids) == 21


def test_lookup():
    assert lookup([1, 2, 3, 4, 1, 2], 3, 2) == [3, 4] and lookup([1, 2, 9, 1, 2, 5, 1, 2], 2, 9) == [5, 1, 2] and lookup([1, 2, 3], 3, 4) == [] and lookup([7], 3, 4) == []
    assert lookup([4, 4, 4], 3, 5) == [4]


@pytest.mark.parametrize("draft, word", [("ngram", "DraftModel, NGram or EarlyExit"), (NGram(0), "tokens=0"), (NGram(3, 0), "longest=0"), (EarlyExit(2), "the model has 2"),
                                         (EarlyExit(0), "layers=0")])
def test_bad_drafts_are_named(models, draft, word):
    with pytest.raises(ConfigError, match=word):
        decode.complete(*models[0], None, [[1]], draft=draft)


def test_vocabularies_must_match(models):
    other = Decoder(dc.replace(models[1][0].config, vocab_size=V + 1), Compute("float32"))
    with pytest.raises(ConfigError, match=f"{V + 1} tokens, the model's {V}"):
        decode.complete(*models[0], None, [[1]], draft=DraftModel(other, None))
    with pytest.raises(ConfigError, match="do not go together"):
        from llmjax import tokenizers
        tokenizer = tokenizers.bytes_tokenizer(("<|endoftext|>",), eos="<|endoftext|>")
        big = Decoder(dc.replace(models[0][0].config, vocab_size=tokenizer.vocab_size), Compute("float32"))
        decode.complete(big, init_params(big, jax.random.key(0)), tokenizer, ["a"], draft=NGram(), grammar=decode.Regex("a"))
