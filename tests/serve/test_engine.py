"""The engine without HTTP: together = alone = offline, prefixes, preemption, cancellation, poison, limits, failure."""
import dataclasses as dc
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import serving

from llmjax.core import ConfigError
from llmjax.serve import Knobs, Refused
from llmjax.serve.schedule import Shape

PROMPTS = [list(range(40, 40 + n)) for n in (3, 17, 70, 8, 33, 1, 16, 50)]


@pytest.fixture(scope="module")
def alone():
    made = serving.Alone(serving.make_model())
    yield made
    made.close()


def idle(engine, seconds=10):
    """Waits until nothing runs; -> pages in use."""
    until = time.monotonic() + seconds
    while (engine.waiting or engine.schedule.busy) and time.monotonic() < until:
        time.sleep(0.01)
    return engine.pages.used


def test_together_is_alone_is_offline(alone):
    offline = [alone.offline(p, 12) for p in PROMPTS]
    together = [alone.ask(p, 12) for p in PROMPTS]
    assert [alone.wait(r)[0] for r in together] == offline
    assert [alone.wait(alone.ask(p, 12))[0] for p in PROMPTS] == offline, "now with prefixes that are in the cache"
    assert idle(alone.engine) == 0


def test_draws_depend_on_seed_and_position_alone(alone):
    knobs = dict(temperature=1.0, top_k=20, top_p=0.9)
    offline = alone.offline(PROMPTS[1], 12, seed=7, **knobs)
    asked = [alone.ask(PROMPTS[1], 12, knobs=Knobs(seed=7, fold=0, **knobs)), *(alone.ask(p, 9) for p in PROMPTS), alone.ask(PROMPTS[1], 12, knobs=Knobs(seed=8, **knobs))]
    made = [alone.wait(r)[0] for r in asked]
    assert made[0] == offline != made[-1]


def test_prefixes_are_found_again(alone):
    prompt = [9] * 5 + list(range(100, 160))
    first = alone.ask(prompt, 6)
    cold = alone.wait(first)
    again = alone.ask(prompt, 6)
    warm = alone.wait(again)
    assert first.sequence.hit == 0 and again.sequence.hit == 64 and warm[0] == cold[0]
    longer = alone.ask(prompt + cold[0] + [77, 78, 79], 6)                    # a conversation that goes on: its answer is found too
    assert alone.wait(longer)[0] == alone.offline(prompt + cold[0] + [77, 78, 79], 6) and longer.sequence.hit >= 64


def test_logprobs_and_best_tokens(alone):
    request = alone.ask(PROMPTS[1], 6, best=3)
    ids, _, logprobs, _ = alone.wait(request)
    tokens = jnp.asarray([PROMPTS[1] + ids])
    whole = jax.nn.log_softmax(alone.model.apply({"params": alone.params}, tokens)[0][0], -1)
    at = len(PROMPTS[1]) - 1
    expected = [float(whole[at + i, t]) for i, t in enumerate(ids)]
    np.testing.assert_allclose(logprobs, expected, atol=2e-4)        # float32, other shapes of the same products
    again = alone.ask(PROMPTS[1], 6, best=3)
    pieces = []
    while len(pieces) < 6:
        event = again.box.get(timeout=60)
        pieces.append(event)
    for i, piece in enumerate(pieces):
        assert len(piece.best) == 3 and piece.best[0][0] == piece.token and [t for t, _ in piece.best] == np.argsort(-np.asarray(whole[at + i]))[:3].tolist()


def test_end_tokens_stop_strings_and_limits(alone):
    ids, text, _, end = alone.wait(alone.ask(PROMPTS[1], 12))
    assert end.reason == "length" and len(ids) == 12 and text == alone.tokenizer.decode(ids, skip_special_tokens=True)
    cut = ids[5]
    made, _, _, end = alone.wait(alone.ask(PROMPTS[1], 12, end_tokens=(cut,)))
    assert end.reason == "stop" and made == ids[:ids.index(cut)]
    if len(text) > 4:
        word = text[2:4]
        _, short, _, end = alone.wait(alone.ask(PROMPTS[1], 12, stops=(word, "never")))
        assert end.reason == "stop" and end.stopped_at == word and short == text[:text.find(word)]
    with pytest.raises(ConfigError, match=r"prompt has 250 tokens and 7 more.*room for 256"):
        alone.ask([1] * 250, 7)


def test_preemption_changes_nothing(alone):
    """Room for two and a half of six sequences: some are put back, all come to their end with the text they have alone."""
    before, prompts = alone.engine.schedule.preemptions, [list(range(30 + i, 50 + i)) for i in range(6)]
    asked = [alone.ask(p, 80) for p in prompts]
    assert [alone.wait(r)[0] for r in asked] == [alone.offline(p, 80) for p in prompts]
    assert alone.engine.schedule.preemptions > before and idle(alone.engine) == 0


def test_cancelling_frees_pages_and_hurts_nobody(alone):
    engine = alone.engine
    idle(engine)
    engine.delay = 0.02
    try:
        gone = [alone.ask(p, 150) for p in PROMPTS[:3]]
        kept = alone.ask(PROMPTS[4], 12)
        for r in gone:
            r.seen.wait(60)
        engine.cancel(*gone)
        assert all(alone.wait(r)[3].reason == "cancelled" for r in gone)
        assert alone.wait(kept)[0] == alone.offline(PROMPTS[4], 12)
        assert idle(engine) == 0
        late = alone.ask(PROMPTS[0], 200, deadline=time.monotonic() + 0.3)
        end = alone.wait(late)[3]
        assert end.reason == "error" and end.status == 504 and idle(engine) == 0
    finally:
        engine.delay = 0.0


def test_a_poisoned_request_ends_alone():
    """One token's embedding is NaN. Its page is used by others afterwards, who must not see it."""
    model, params, tokenizer = serving.make_model()
    params["embed"]["table"] = params["embed"]["table"].at[200].set(jnp.nan)
    alone = serving.Alone((model, params, tokenizer))
    try:
        good = [alone.ask(p, 20) for p in PROMPTS[:2]]
        bad = alone.ask([5, 200, *range(60)], 20)
        assert alone.wait(bad)[3].status == 500 and "not finite" in alone.wait(alone.ask([200], 4))[3].message
        expected = [alone.offline(p, 20) for p in PROMPTS[:2]]
        assert [alone.wait(r)[0] for r in good] == expected
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(alone.engine.memory.cache.layers))
        assert [alone.wait(alone.ask(p, 20))[0] for p in PROMPTS] == [alone.offline(p, 20) for p in PROMPTS]
        assert idle(alone.engine) == 0
    finally:
        alone.close()


def test_a_full_queue_refuses_and_a_closed_one_too():
    alone = serving.Alone(serving.make_model(), dc.replace(serving.SMALL, queue=2))
    alone.engine.delay = 0.02
    try:
        asked = [alone.ask([5, 6], 60) for _ in range(6)]
        with pytest.raises(Refused, match="queue is full") as refused:
            alone.ask([5, 6], 4)
        assert refused.value.seconds >= 1 and not refused.value.draining
        alone.engine.close()
        with pytest.raises(Refused, match="shutting down"):
            alone.ask([5, 6], 4)
        alone.engine.delay = 0.0
        assert [len(alone.wait(r)[0]) for r in asked] == [60] * 6, "what runs when it closes comes to its end"
    finally:
        alone.close()


def test_a_step_that_fails_ends_what_ran_and_nothing_else(alone, monkeypatch):
    real, calls = alone.engine.send, []

    def breaking(work):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return real(work)
    idle(alone.engine)
    monkeypatch.setattr(alone.engine, "send", breaking)
    asked = [alone.ask(p, 10) for p in PROMPTS]
    ends = [alone.wait(r) for r in asked]
    broken = [e for _, _, _, e in ends if e.reason == "error"]
    assert broken and "RuntimeError" in broken[0].message and "out of memory" not in broken[0].message
    assert all(ids == alone.offline(p, 10) for (ids, _, _, e), p in zip(ends, PROMPTS) if e.reason != "error")
    assert alone.wait(alone.ask(PROMPTS[0], 10))[0] == alone.offline(PROMPTS[0], 10) and idle(alone.engine) == 0


def test_penalties_biases_and_least_tokens_as_offline(alone):
    prompt = PROMPTS[1]
    for knobs in (dict(repetition_penalty=1.6), dict(frequency_penalty=1.5, presence_penalty=0.5), dict(logit_bias=((7, 50.0),)), dict(temperature=1.0, frequency_penalty=1.0, top_k=30, seed=3)):
        same = {**knobs, "logit_bias": dict(knobs["logit_bias"])} if "logit_bias" in knobs else knobs
        others = [alone.ask(p, 20) for p in PROMPTS[:3]]
        assert alone.wait(alone.ask(prompt, 20, knobs=Knobs(**{"temperature": 0.0, **knobs})))[0] == alone.offline(prompt, 20, **same), knobs
        assert [alone.wait(r)[0] for r in others] == [alone.offline(p, 20) for p in PROMPTS[:3]]
    ids = alone.offline(prompt, 20)
    held = alone.wait(alone.ask(prompt, 20, end_tokens=(ids[2],), knobs=Knobs(temperature=0.0, min_tokens=9)))[0]
    assert ids[2] not in held[:9] and len(held) >= 9


def test_a_grammar_is_followed_among_free_rows(alone):
    import re

    from llmjax.decode import Grammar, Regex
    grammar = Grammar(Regex(r"(ab|cd){2,5}!"), alone.tokenizer, alone.model.config.vocab_size, (258,))
    asked = [alone.ask(PROMPTS[i], 30, knobs=Knobs(temperature=1.5, seed=i), end_tokens=(258,), matcher=grammar.matcher()) for i in range(3)]
    free = [alone.ask(p, 20) for p in PROMPTS[:2]]
    for r in asked:
        _, text, _, end = alone.wait(r)
        assert end.reason == "stop" and re.fullmatch(r"(ab|cd){2,5}!", text), text
    assert [alone.wait(r)[0] for r in free] == [alone.offline(p, 20) for p in PROMPTS[:2]]


def test_a_form_that_does_not_run_is_not_used(alone):
    """Compiled in the background, it fails when it is first called: the others go on."""
    shape, engine = Shape(3, 1), alone.engine

    def fails(*_):
        raise RuntimeError("no memory")
    engine.programs[shape] = fails
    with engine.wake:
        engine.orders.append(("form", shape))
        engine.wake.notify()
    assert alone.wait(alone.ask(PROMPTS[1], 12))[0] == alone.offline(PROMPTS[1], 12)
    assert shape not in engine.known and engine.failure is None and idle(engine) == 0


def test_recurrent_layers_keep_their_rows():
    """A state stands in its row, whatever comes and goes in the others; nothing of it can be found again by prefix."""
    from llmjax.core import Compute, GatedDelta, Layer, Mlp, ModelConfig
    from llmjax.models import Decoder, init_params
    tokenizer = serving.make_tokenizer()
    config = ModelConfig(tokenizer.vocab_size, 32, prefix=(Layer(GatedDelta(2, 2, 8, 8), Mlp(24)), serving.LAYER), tied=False, context=128, end_tokens=(258,))
    model = Decoder(config, Compute("float32"))
    alone = serving.Alone((model, jax.tree.map(lambda x: 4 * x, init_params(model, jax.random.key(1))), tokenizer))
    try:
        assert alone.engine.fixed and not alone.engine.share
        asked = [alone.ask(p, 10 + 3 * i) for i, p in enumerate(PROMPTS)]
        assert [alone.wait(r)[0] for r in asked] == [alone.offline(p, 10 + 3 * i) for i, p in enumerate(PROMPTS)]
        again = alone.ask(PROMPTS[2], 10)
        assert alone.wait(again)[0] == alone.offline(PROMPTS[2], 10) and again.sequence.hit == 0 and idle(alone.engine) == 0
    finally:
        alone.close()
