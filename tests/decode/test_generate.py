"""Generation: greedy = naive, ragged = alone, rings, stops, seeds, limits, streams, conversations kept in the cache."""
import dataclasses as dc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax import decode, tokenizers
from llmjax.core import Attention, Compute, ConfigError, Layer, Mlp, ModelConfig, Rope
from llmjax.decode.prompts import bucket
from llmjax.decode.stops import find_stop
from llmjax.models import Decoder, init_params

V = 70
LAYER = Layer(Attention(4, 2, 8, Rope()), Mlp(40))
RING = dc.replace(LAYER, mixer=dc.replace(LAYER.mixer, window=6))


@pytest.fixture(scope="module")
def made():
    model = Decoder(ModelConfig(V, 32, cycle=(RING, LAYER), repeats=2, tied=True, context=96, end_tokens=(V - 1,)), Compute("float32"))
    return model, jax.tree.map(lambda x: 4 * x, init_params(model, jax.random.key(0)))


def naive(model, params, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        padded = jnp.zeros((1, 64), jnp.int32).at[0, :len(ids)].set(jnp.asarray(ids))
        segments = (jnp.arange(64) < len(ids)).astype(jnp.int32)[None]
        logits, _ = model.apply({"params": params}, padded, None, segments)
        ids.append(int(logits[0, len(ids) - 1].argmax()))
    return ids[len(prompt):]


def test_greedy_is_naive_and_rows_do_not_mix(made):
    model, params = made
    prompts = [[5, 6, 7], list(range(1, 21)), [9]]
    together = decode.generate(model, params, None, prompts, max_new_tokens=12, stop=[])
    assert together == [naive(model, params, p, 12) for p in prompts]
    assert together[1] == decode.generate(model, params, None, [prompts[1]], max_new_tokens=12, stop=[])[0]


def test_a_draw_depends_on_seed_and_position_alone(made):
    model, params = made
    knobs = dict(max_new_tokens=10, temperature=1.0, stop=[])
    prompts = [[5, 6, 7], [9] * 20]
    together = decode.generate(model, params, None, prompts, seed=[3, 4], **knobs)
    assert together == [decode.generate(model, params, None, [p], seed=[s], **knobs)[0] for p, s in zip(prompts, (3, 4))]
    assert decode.generate(model, params, None, prompts, seed=1, **knobs) == decode.generate(model, params, None, prompts, seed=1, **knobs)
    assert decode.generate(model, params, None, prompts, seed=1, **knobs) != decode.generate(model, params, None, prompts, seed=2, **knobs)
    many = decode.generate(model, params, None, [[5, 6, 7]], seed=1, n=3, **knobs)[0]
    assert len(many) == 3 and many[0] != many[1] and all(len(x) == 10 for x in many)


def test_end_tokens_limits_and_logprobs(made):
    model, params = made
    plain = decode.complete(model, params, None, [[5, 6, 7]], max_new_tokens=12, stop=[])[0]
    assert plain.finish == "length" and len(plain.ids) == len(plain.logprobs) == 12
    cut = plain.ids[5]
    stopped = decode.complete(model, params, None, [[5, 6, 7]], max_new_tokens=12, stop=[cut])[0]
    assert stopped.finish == "end" and stopped.ids == plain.ids[:plain.ids.index(cut)]
    full, _ = model.apply({"params": params}, jnp.asarray([[5, 6, 7, *plain.ids]]))
    logprobs = jax.nn.log_softmax(full)[0]
    want = [float(logprobs[2 + i, t]) for i, t in enumerate(plain.ids)]
    np.testing.assert_allclose(plain.logprobs, want, atol=1e-4)
    long = decode.complete(model, params, None, [[5] * 90], max_new_tokens=50, stop=[])[0]
    assert len(long.ids) == 7 and long.finish == "length"          # positions 90 to 96: the context is full


@pytest.mark.parametrize("prompts, knobs, word", [
    ([[]], {}, "empty"), ([[5] * 97], {}, "context is 96"), ([[V]], {}, f"id {V}"), ([[5]], dict(temperature=-1.0), "temperature=-1.0"), ([[5]], dict(top_p=1.5), "top_p=1.5"),
    ([[5]], dict(top_k=0), "top_k=0"), ([[5]], dict(max_new_tokens=0), "max_new_tokens=0"), ([[5]], dict(seed=[1, 2]), "2 seeds for 1"), (["text"], {}, "no tokenizer"),
    ([5, 6], {}, "list of prompts"), ([[5]], dict(stop=["x"]), "no tokenizer"), ([[5]], dict(temperature=[0.1, 0.2]), "2 values for 1 rows"), ([[5]], dict(n=0), "n=0")])
def test_bad_input_is_named(made, prompts, knobs, word):
    with pytest.raises(ConfigError, match=word):
        decode.generate(*made, None, prompts, **knobs)


def test_unprepared_prepared_and_steps_agree(made):
    model, params = made
    ready = decode.prepare(model, params)
    assert decode.generate(*ready, None, [[5, 6, 7]], max_new_tokens=6, stop=[]) == decode.generate(model, params, None, [[5, 6, 7]], max_new_tokens=6, stop=[])
    cache = decode.init_cache(ready[0], 1, 16)
    where = np.arange(3, dtype=np.int32)[None]
    logits, cache = decode.prefill(*ready, np.asarray([[5, 6, 7]], np.int32), where, np.ones((1, 3), np.int32), cache)
    ids = []
    for i in range(6):
        ids.append(int(logits[0].argmax()))
        logits, cache = decode.decode_step(*ready, np.asarray(ids[-1:], np.int32), np.asarray([3 + i], np.int32), np.ones(1, bool), cache)
    assert ids == naive(model, params, [5, 6, 7], 6)


CHAT = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


@pytest.fixture(scope="module")
def talking():
    """A byte tokenizer with a template, and a full-attention model with its vocabulary."""
    tokenizer = tokenizers.bytes_tokenizer(("<|endoftext|>",), eos="<|endoftext|>").with_chat_template(CHAT)
    model = Decoder(ModelConfig(-(-tokenizer.vocab_size // 8) * 8, 32, cycle=(LAYER,), repeats=2, tied=True, context=1024, end_tokens=(tokenizer.eos_id,)), Compute("float32"))
    return model, jax.tree.map(lambda x: 4 * x, init_params(model, jax.random.key(0))), tokenizer


def test_streamed_pieces_are_the_text(talking):
    model, params, tokenizer = talking
    whole = decode.complete(model, params, tokenizer, ["Hello"], max_new_tokens=30, temperature=1.0, seed=[7])[0]
    pieces = list(decode.stream(model, params, tokenizer, "Hello", max_new_tokens=30, temperature=1.0, seed=[7]))
    assert "".join(pieces) == whole.text and len(pieces) > 3
    stop = whole.text[8:10]
    stopped = decode.complete(model, params, tokenizer, ["Hello"], max_new_tokens=30, temperature=1.0, seed=[7], stop=[stop])[0]
    assert stopped.finish == "stop" and stopped.text == whole.text[:whole.text.index(stop)]
    assert "".join(decode.stream(model, params, tokenizer, "Hello", max_new_tokens=30, temperature=1.0, seed=[7], stop=[stop])) == stopped.text


def test_a_conversation_is_kept_in_the_cache(talking):
    """Two turns cost the tokens of both once, and the second answer is what the whole conversation gives anew; the cache grows past its first size."""
    model, params, tokenizer = talking
    session = decode.Session(model, params, tokenizer)
    first = "".join(session.say("Good morning. " * 20, max_new_tokens=12))
    fed = session.fed
    second = "".join(session.say("And now? " * 40, max_new_tokens=12))
    ids = tokenizer.apply_chat_template(session.messages[:-1], add_generation_prompt=True)
    assert session.cache.length == 1024 and len(ids) > 512
    assert session.fed - fed < len(ids) - fed + 24, "history was computed again"
    again = decode.Session(model, params, tokenizer)
    again.messages = session.messages[:2]
    assert "".join(again.say("And now? " * 40, max_new_tokens=12)) == second and first == session.messages[1]["content"]
    with pytest.raises(ConfigError, match="room for 1024"):
        list(session.say("x" * 1100))
    session.reset()
    assert "".join(session.say("Good morning. " * 20, max_new_tokens=12)) == first


def test_small_things():
    assert [bucket(n) for n in (1, 16, 17, 200, 256, 257, 600)] == [16, 16, 32, 256, 256, 512, 768]
    assert find_stop("abcabc", ("ca", "bc")) == 1 and find_stop("abc", ("x",)) is None


def test_alternatives_and_prompt_logprobs(made):
    model, params = made
    got = decode.complete(model, params, None, [[5, 6, 7], [8] * 20], max_new_tokens=5, stop=[], logprobs=3, prompt_logprobs=True)
    for prompt, c in zip(([5, 6, 7], [8] * 20), got):
        full, _ = model.apply({"params": params}, jnp.asarray([[*prompt, *c.ids]]))
        want, order = np.asarray(jax.nn.log_softmax(full)[0]), np.argsort(-np.asarray(full[0]))
        places = range(len(prompt) - 1, len(prompt) + 4)
        assert [[i for i, _ in a] for a in c.alternatives] == [order[p, :3].tolist() for p in places]
        assert [a[0] for a in c.alternatives] == [(i, x) for i, x in zip(c.ids, [a[0][1] for a in c.alternatives])]          # greedy: the best is what was taken
        np.testing.assert_allclose([x for a in c.alternatives for _, x in a], [want[p, i] for p in places for i in order[p, :3]], atol=1e-4)
        assert c.prompt_logprobs[0] is None and c.prompt_alternatives[0] is None
        np.testing.assert_allclose(c.prompt_logprobs[1:], [want[i, t] for i, t in enumerate(prompt[1:])], atol=1e-4)
        assert [[i for i, _ in a] for a in c.prompt_alternatives[1:]] == [order[i, :3].tolist() for i in range(len(prompt) - 1)]
    alone = decode.score(model, params, None, [[8] * 20])[0]
    np.testing.assert_allclose(alone.logprobs[1:], got[1].prompt_logprobs[1:], atol=1e-5)


def test_best_of_keeps_what_scores_best(made):
    model, params = made
    knobs = dict(max_new_tokens=6, temperature=1.5, seed=3, stop=[V - 1, 3])
    every = decode.complete(model, params, None, [[5, 6, 7]], n=4, **knobs)
    best = decode.complete(model, params, None, [[5, 6, 7]], n=2, best_of=4, **knobs)
    assert [c.ids for c in best] == [c.ids for c in sorted(every, key=lambda c: -c.score)[:2]]
    smallest = decode.complete(model, params, None, [[5, 6, 7]], n=1, best_of=4, scorer=lambda prompt, c: sum(prompt) - sum(c.ids), **knobs)[0]
    assert sum(smallest.ids) == min(sum(c.ids) for c in every) and smallest.score == 18 - sum(smallest.ids)
    for c in every:
        if c.finish == "length":
            np.testing.assert_allclose(c.score, np.mean(c.logprobs), rtol=1e-5)


def test_knobs_reach_the_loop(made):
    """Bans, penalties and limits of a whole generation, of which sample() knows each step: three rows of one batch."""
    model, params = made
    plain = decode.generate(model, params, None, [[5, 6, 7]] * 3, max_new_tokens=10, stop=[])[0]
    two = next(plain[i:i + 2] for i in range(1, 9) if plain[i] != plain[0] != plain[i + 1])
    knobs = dict(bad_words=[[[plain[0]], two], None, None], allowed_token_ids=[None, [1, 2, 3], None], frequency_penalty=[None, None, -2.0], presence_penalty=[2.0, 2.0, None],
                 logit_bias=[None, None, {9: 50.0}], min_tokens=[None, None, 5], stop=[9])
    banned, few, late = decode.complete(model, params, None, [[5, 6, 7]] * 3, max_new_tokens=10, **knobs)
    assert plain[0] not in banned.ids and two not in [banned.ids[i:i + 2] for i in range(9)]
    assert set(few.ids) <= {1, 2, 3} and len(few.ids) == 10
    assert len(late.ids) == 5 and 9 not in late.ids and late.finish == "end" and len(set(late.ids)) < 5          # the bias ends the row as soon as it may; a negative penalty repeats


def test_stops_count_after_min_tokens(talking):
    model, params, tokenizer = talking
    knobs = dict(max_new_tokens=30, temperature=1.0, seed=[7], min_tokens=15)
    whole = decode.complete(model, params, tokenizer, ["Hello"], stop=["never there"], **knobs)[0]
    early = decode.complete(model, params, tokenizer, ["Hello"], stop=[whole.text[3:5]], **knobs)[0]
    assert early.text == whole.text                              # those two characters are there, but before the fifteenth token
    stop = whole.text[-4:-2]
    late = decode.complete(model, params, tokenizer, ["Hello"], stop=[whole.text[3:5], stop], **knobs)[0]
    assert late.finish == "stop" and late.text == whole.text[:whole.text.index(stop)] and len(late.ids) > 15
    assert "".join(decode.stream(model, params, tokenizer, "Hello", stop=[whole.text[3:5], stop], **knobs)) == late.text


@pytest.mark.parametrize("knobs, word", [(dict(best_of=1, n=2), "best_of=1"), (dict(scorer=len), "scorer"), (dict(logprobs=-1), "logprobs=-1"), (dict(logprobs=V + 1), "vocabulary's"),
                                         (dict(bad_words=["x"]), "no tokenizer"), (dict(dry_multiplier=1.0, dry_sequence_breakers=["x"]), "no tokenizer"), (dict(stop=[V]), f"stop: id {V}"),
                                         (dict(temprature=1), "did you mean 'temperature'"), (dict(best_of=True), "best_of=True")])
def test_bad_requests_are_named(made, knobs, word):
    with pytest.raises(ConfigError, match=word):
        decode.complete(*made, None, [[5]], **knobs)


def test_words_as_texts(talking):
    """A banned text is banned after a space too; DRY's breakers are the tokens that hold a sign."""
    model, params, tokenizer = talking
    knobs = dict(max_new_tokens=40, temperature=1.0, seed=[3])
    text = decode.complete(model, params, tokenizer, ["Hello"], **knobs)[0].text
    banned = next(c for c in text if c.isascii() and c.isprintable() and c != " ")
    assert banned not in decode.complete(model, params, tokenizer, ["Hello"], bad_words=[banned], **knobs)[0].text
    from llmjax.decode.generate import sampling_of
    from llmjax.decode.stops import Stops
    sampling = sampling_of(1, Stops((), ()), tokenizer, model.config, dict(dry_multiplier=1.0))
    on = np.unpackbits(np.asarray(sampling.dry_sequence_breakers)[0].view(np.uint8), bitorder="little").nonzero()[0]
    assert {tokenizer.token_bytes(int(i)) for i in on} == {b"\n", b":", b'"', b"*"}
    with pytest.raises(ConfigError, match="single characters"):
        sampling_of(1, Stops((), ()), tokenizer, model.config, dict(dry_multiplier=1.0, dry_sequence_breakers=["ab"]))
