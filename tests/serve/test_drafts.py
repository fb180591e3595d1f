"""Guesses in the engine, copied from the text or forced by a grammar: the same text as without them, and what it saves."""
import dataclasses as dc
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import serving
from scipy import stats

from llmjax import tokenizers
from llmjax.core import ConfigError, LinearAttention
from llmjax.decode import Grammar, JsonSchema, Regex
from llmjax.decode.speculative import NGram
from llmjax.models import init_params
from llmjax.serve import Engine, Knobs, Observer, Request, drafts, parse_speculation, schedule
from llmjax.serve.metrics import Metrics

PROMPTS = [[5, 6, 7, 8] * 6, list(range(40, 57)), [9, 9, 9, 9, 10] * 4, list(range(100, 170))]
SCHEMA = {"type": "object", "properties": {"first_name": {"type": "string", "maxLength": 4}, "grown_up": {"type": "boolean"}}, "required": ["first_name", "grown_up"], "additionalProperties": False}


class Count(Observer):
    def __init__(self):
        self.steps, self.guessed, self.right, self.forced = 0, 0, 0, 0

    def stepped(self, work):
        self.steps += work.decoding

    def judged(self, guesses, right):
        self.guessed, self.right, self.forced = self.guessed + len(guesses.tokens), self.right + right, self.forced + guesses.forced


@pytest.fixture(scope="module")
def alone():
    """One of its layers has a window: what was guessed wrongly must not be seen in it either."""
    near = dc.replace(serving.LAYER, mixer=dc.replace(serving.LAYER.mixer, window=12))
    model, _, tokenizer = serving.make_model()
    model = dc.replace(model, config=dc.replace(model.config, cycle=(serving.LAYER, near), repeats=1))
    params = jax.tree.map(lambda x: 4 * x, init_params(model, jax.random.key(0)))
    made = serving.Alone((model, params, tokenizer), dc.replace(serving.SMALL, rows=8, speculate=NGram(5)), observer=Count())
    yield made
    made.close()


@pytest.fixture
def watched(alone, monkeypatch):
    """What the engine counts from here on; guesses may be replaced."""
    count = Count()
    monkeypatch.setattr(alone.engine, "observer", count)
    return count


def oracle(alone, monkeypatch, offline, wrong=()):
    """Guesses that are what comes, but for places (of the answer) that are made wrong."""
    def guess(text, longest, count):
        made = next((t[len(p):] for p, t in offline if list(text[:len(t)]) == t[:len(text)]), [])
        have = next((len(text) - len(p) for p, t in offline if list(text[:len(t)]) == t[:len(text)]), 0)
        return [(x + 1) % 250 if have + i in wrong else x for i, x in enumerate(made[have:have + count])]
    monkeypatch.setattr(drafts, "lookup", guess)


def test_right_guesses_save_steps_and_wrong_ones_change_nothing(alone, watched, monkeypatch):
    offline = [alone.offline(p, 24) for p in PROMPTS]
    oracle(alone, monkeypatch, [(p, p + ids) for p, ids in zip(PROMPTS, offline)])
    assert alone.wait(alone.ask(PROMPTS[1], 24))[0] == offline[1]
    assert watched.guessed == watched.right and watched.steps <= 5, "24 tokens: one of the prompt, then six a step"
    assert [alone.wait(r)[0] for r in [alone.ask(p, 24) for p in PROMPTS]] == offline, "all rows of the call taken"
    before = watched.right
    oracle(alone, monkeypatch, [(p, p + ids) for p, ids in zip(PROMPTS, offline)], wrong={3, 4, 9, 17, 22})
    for p, ids in zip(PROMPTS, offline):
        whole = alone.wait(alone.ask(p, 24))
        assert whole[0] == ids and len(whole[2]) == 24
    assert before < watched.right < watched.guessed


def test_copied_from_the_text(alone, watched):
    asked = [alone.ask(p, 40) for p in PROMPTS]
    assert [alone.wait(r)[0] for r in asked] == [alone.offline(p, 40) for p in PROMPTS]
    assert watched.guessed > 0


def test_sampled_text_is_that_of_the_seed(alone, watched, monkeypatch):
    knobs = dict(temperature=1.0, top_k=20, top_p=0.9)
    for seed in (7, 8):
        expected = alone.offline(PROMPTS[1], 16, seed=seed, **knobs)
        oracle(alone, monkeypatch, [(PROMPTS[1], PROMPTS[1] + expected)], wrong={5, 6, 11})
        assert alone.wait(alone.ask(PROMPTS[1], 16, knobs=Knobs(seed=seed, **knobs)))[0] == expected
    assert watched.right > 8


def test_sampled_text_is_exact_in_distribution(alone, watched, monkeypatch):
    """Three tokens out of five that a bias lets through, drawn with guesses that are sometimes right: all 125 texts as often as the model says, and guesses right as often as Σ p(guess)."""
    prompt, tokens, count = PROMPTS[1][:6], [60, 61, 62, 63, 64], 500
    texts = np.asarray([[*prompt, a, b] for a in tokens for b in tokens])
    logits = np.asarray(alone.model.apply({"params": alone.params}, jnp.asarray(texts))[0], np.float64)[:, -3:, tokens] / 6.0        # warm: every text has its chance
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p = (p / p.sum(-1, keepdims=True)).reshape(5, 5, 3, 5)
    joint = p[0, 0, 0][:, None, None] * p[:, 0, 1][:, :, None] * p[:, :, 2]
    guesses = [int(x) for x in np.unravel_index(joint.sum(0).argmax(), (5, 5))]
    monkeypatch.setattr(drafts, "lookup", lambda text, longest, count: [tokens[g] for g in guesses][:count] if len(text) == len(prompt) + 1 else [])
    found = np.zeros((5, 5, 5))
    for begin in range(0, count, 50):
        asked = [alone.ask(prompt, 4, knobs=Knobs(temperature=6.0, seed=seed, logit_bias=tuple((t, 1000.0) for t in tokens))) for seed in range(begin, begin + 50)]
        for r in asked:
            ids = alone.wait(r)[0]
            found[tuple(tokens.index(x) for x in ids[:3])] += 1
    order = np.argsort(-joint, axis=None)
    often = order[joint.reshape(-1)[order] * count >= 5]
    assert len(often) > 10
    seen, expected = found.reshape(-1)[often], joint.reshape(-1)[often] * count
    assert stats.chisquare([*seen, count - seen.sum()], [*expected, count - expected.sum()]).pvalue > 1e-3
    first = joint.sum((0, 2))[guesses[0]]
    assert abs(found.sum((0, 2))[guesses[0]] / count - first) < 4 * np.sqrt(first * (1 - first) / count)
    assert 0 < watched.right < watched.guessed


def test_ends_within_guesses(alone, watched, monkeypatch):
    """End tokens, stop strings and limits are met where they are, not at the end of a step."""
    ids = alone.offline(PROMPTS[1], 24)
    text = alone.tokenizer.decode(ids, skip_special_tokens=True)
    oracle(alone, monkeypatch, [(PROMPTS[1], PROMPTS[1] + ids)])
    made, _, _, end = alone.wait(alone.ask(PROMPTS[1], 24, end_tokens=(ids[9],)))
    assert made == ids[:ids.index(ids[9])] and end.reason == "stop"
    word = text[6:8]
    _, short, _, end = alone.wait(alone.ask(PROMPTS[1], 24, stops=(word,)))
    assert short == text[:text.find(word)] and end.stopped_at == word
    for limit in (1, 2, 8, 13):
        made, _, _, end = alone.wait(alone.ask(PROMPTS[1], limit))
        assert made == ids[:limit] and end.reason == "length"


def test_preemption_and_prefixes_among_guesses(alone, watched, monkeypatch):
    prompts = [list(range(30 + i, 50 + i)) for i in range(6)]
    offline = [alone.offline(p, 90) for p in prompts]
    oracle(alone, monkeypatch, [(p, p + ids) for p, ids in zip(prompts, offline)], wrong=set(range(0, 90, 7)))
    pages = alone.engine.pages
    held = pages.allocate(pages.free - 40)                                  # room for three and a half
    try:
        before = alone.engine.schedule.preemptions
        asked = [alone.ask(p, 90) for p in prompts]
        assert [alone.wait(r)[0] for r in asked] == offline and alone.engine.schedule.preemptions > before
    finally:
        pages.release(held)
    assert alone.wait(alone.ask(prompts[0], 90))[0] == offline[0]
    longer = alone.ask(prompts[0] + offline[0] + [3], 6)                    # an answer's pages hold what was right alone
    assert alone.wait(longer)[0] == alone.offline(prompts[0] + offline[0] + [3], 6) and longer.sequence.hit >= 96 and pages.used == 0


def test_penalties_are_drawn_one_by_one(alone, watched):
    made = alone.wait(alone.ask(PROMPTS[0], 20, knobs=Knobs(temperature=0.0, repetition_penalty=1.6)))[0]
    assert made == alone.offline(PROMPTS[0], 20, repetition_penalty=1.6) and watched.guessed == 0


def ask_with(alone, grammar, prompt, **knobs):
    return alone.wait(alone.ask(prompt, 60, knobs=Knobs(**knobs), end_tokens=(258,), matcher=grammar.matcher()))


def test_forced_tokens_are_fed_together(alone, watched, monkeypatch):
    monkeypatch.setattr(alone.engine.drafts, "ngram", None)
    for constraint in (JsonSchema(SCHEMA), Regex(r"one (small|large) step for (a|the) (cat|dog)!")):
        grammar = Grammar(constraint, alone.tokenizer, 259, (258,))
        with monkeypatch.context() as patch:
            patch.setattr(alone.engine.schedule, "guess", None)
            plain = [ask_with(alone, grammar, p, temperature=t, seed=4) for p in PROMPTS[:3] for t in (0.0, 1.5)]
            steps, watched.steps = watched.steps, 0
        assert watched.guessed == 0
        jumped = [ask_with(alone, grammar, p, temperature=t, seed=4) for p in PROMPTS[:3] for t in (0.0, 1.5)]
        assert [x[:2] for x in jumped] == [x[:2] for x in plain]
        a, b = (np.concatenate([x[2] for x in made]) for made in (jumped, plain))
        np.testing.assert_allclose(a, b, atol=1e-3)      # float32; products of other shapes add up in another order, and with these weights (four times the usual) an ulp at the input has grown
        assert watched.forced == watched.right == watched.guessed > 0 and watched.steps < 0.6 * steps
        watched.steps = watched.guessed = watched.right = watched.forced = 0


def test_a_forced_token_is_all_its_mask_leaves(tmp_path):
    """So a text is the same whether its forced tokens are drawn or fed, however the tokenizer's pieces lie across what is forced and what is free."""
    file = tmp_path / "text.txt"
    file.write_text('{"first_name": "the quick brown fox", "grown_up": true, "firstly": false}\n' * 40 + "one small step for a cat, one large leap for the dog\n" * 40)
    tokenizer = tokenizers.train_bpe([str(file)], vocab_size=330)
    size, rng, forced = tokenizer.vocab_size, np.random.default_rng(0), 0
    for constraint in (JsonSchema(SCHEMA), Regex(r"one (small|large) step for (a|the) (cat|dog), (?s:.{2,9}) leap!"), Regex("(the quick |the brown ){3}fox")):
        grammar = Grammar(constraint, tokenizer, size)
        for _ in range(20):
            matcher = grammar.matcher()
            while not matcher.done:
                ahead = matcher.forced()
                masks = np.zeros((len(ahead) + 1, grammar.words), np.int32)
                drafts.write_masks(matcher, ahead, masks)
                allowed = [np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist() for row in masks]
                assert allowed[:-1] == [[x] for x in ahead]
                forced += len(ahead)
                matcher.advance(int(rng.choice(allowed[0])))
    assert forced > 200


def test_guesses_under_a_grammar(alone, watched):
    """Both kinds together: only what fits is guessed, and the text follows."""
    grammar = Grammar(Regex(r"(abcd|efgh){4,9}!"), alone.tokenizer, 259, (258,))
    asked = [alone.ask(PROMPTS[i], 60, knobs=Knobs(temperature=1.5, seed=i), end_tokens=(258,), matcher=grammar.matcher()) for i in range(3)]
    for r in asked:
        _, text, _, end = alone.wait(r)
        assert end.reason == "stop" and re.fullmatch(r"(abcd|efgh){4,9}!", text), text
    assert watched.guessed > watched.forced > 0


def test_guesses_that_fail_pause():
    """In a text that copies nothing they are tried after 1, 3, 7, then every 15 steps; the sequence goes ahead meanwhile. One that is right brings them back."""
    made = drafts.Drafts(NGram(5))
    sequence = schedule.Sequence(0, 4, [1, 2, 1, 2], 1000)
    sequence.request = request = Request([1, 2, 1, 2], 1000, Knobs(temperature=0.0), lambda r, e: None, sequence=sequence)
    sequence.waits, tried, wide = True, [], []
    for step in range(50):
        guesses = made.guess(request, 9) if sequence.waits else schedule.Guesses()
        if guesses.tokens:
            tried.append(step)
            wide.append(len(guesses.tokens))
        made.judge(schedule.Feed(sequence, 0, 1, True, 0, 0, True, guesses), [-1] * 9)
    assert tried == [0, 2, 6, 14, 30, 46] and wide == [2, 1, 1, 1, 1, 1]
    while not sequence.waits:
        made.judge(schedule.Feed(sequence, 0, 1, True, 0, 0, True), [-1])
    guesses = made.guess(request, 9)
    assert made.judge(schedule.Feed(sequence, 0, 1, True, 0, 0, True, guesses), [*guesses.tokens, 7]) == 1 and sequence.waits and request.luck.whole


def test_the_schedule_gives_guesses_what_is_left():
    """Rows of the call are dealt out, pages are taken where they are free, and nobody is put back for a guess."""
    def plan(count, pages):
        made = schedule.Schedule(8, schedule.Pages(pages, 4), [schedule.Shape(8, 4), schedule.Shape(8, 1), schedule.Shape(4, 1)], guess=lambda s, most: schedule.Guesses((1,) * min(9, most)))
        for i in range(count):
            made.add(schedule.Sequence(i, 3, [1, 2, 3], 2 if i == 1 else 20, waits=i != 2))
        for feed in made.plan()[0].feeds:
            made.drew(feed, 7)
        (work,) = made.plan()
        assert made.preemptions == 0 and all(len(s.pages) * 4 >= f.start + f.rows for f in work.feeds for s in [f.sequence])
        return work.shape.rows, [len(f.guesses.tokens) for f in work.feeds]
    assert plan(1, 20) == (8, [7])
    assert plan(2, 20) == (8, [3, 0]), "the second may make one more token, which needs no guess"
    assert plan(3, 20) == (4, [1, 0, 0]), "five rows for three; the third waits for nothing"
    assert plan(8, 20) == (8, [0] * 8)
    assert plan(1, 1) == (4, [0]), "no page for a guess"


def test_what_cannot_be_guessed_is_refused():
    model, _, tokenizer = serving.make_model()
    model = dc.replace(model, config=dc.replace(model.config, cycle=(dc.replace(serving.LAYER, mixer=LinearAttention(4, 2, 8)),)))
    params = init_params(model, jax.random.key(0))
    with pytest.raises(ConfigError, match="keeps a state"):
        Engine(model, params, tokenizer, dc.replace(serving.SMALL, speculate=NGram(5)))


def test_prometheus_counts_guesses():
    metrics = Metrics()
    metrics.judged(schedule.Guesses((1, 2, 3, 4, 5), 2), 3)
    metrics.judged(schedule.Guesses((1, 2, 3), 0), 0)
    page = metrics.text().decode()
    for source, result, count in (("grammar", "right", 2), ("grammar", "wrong", 0), ("ngram", "right", 1), ("ngram", "wrong", 5)):
        assert f'llmjax_guessed_tokens_total{{result="{result}",source="{source}"}} {count}.0' in page


def test_what_the_command_line_says():
    assert parse_speculation("ngram:5") == NGram(5) and parse_speculation("ngram:4:2") == NGram(4, 2)
    for text in ("ngram", "ngram:0", "ngram:5:", "ngram:x", "ngrm:5", "ngram:5:3:1", "ngram:99"):
        with pytest.raises(ConfigError, match="--speculate="):
            parse_speculation(text)
