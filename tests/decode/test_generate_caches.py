"""Texts over every kind of cache: float kinds make the contiguous one's text, evicting ones what feeding token by token makes; what does not go together is said."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax import cli, decode, tokenizers
from llmjax.core import Attention, Compute, ConfigError, GatedDelta, Layer, Mlp, ModelConfig, Rope
from llmjax.models import Decoder, init_params

CHAT = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
CONTEXT = 40
FULL, STATE = Layer(Attention(4, 2, 8, Rope()), Mlp(40)), Layer(GatedDelta(2, 2, 8, 8), Mlp(24))
PROMPTS = [[5, 9, 11, 70, 80, 3, 9, 11], [7, 8, 9]]


def spoken(*layers):
    tokenizer = tokenizers.bytes_tokenizer(("<|endoftext|>",), eos="<|endoftext|>").with_chat_template(CHAT)
    model = Decoder(ModelConfig(-(-tokenizer.vocab_size // 8) * 8, 32, cycle=layers, repeats=2, tied=True, context=CONTEXT, end_tokens=(tokenizer.eos_id,)), Compute("float32"))
    return model, jax.tree.map(lambda x: 4 * x, init_params(model, jax.random.key(0))), tokenizer


@pytest.fixture(scope="module")
def talking():
    return spoken(FULL)


def drawn(model, params, cache, prompts=PROMPTS, **knobs):
    return decode.complete(model, params, None, prompts, **dict(max_new_tokens=12, stop=[], temperature=0.9, seed=3, n=2, cache=cache) | knobs)


@pytest.mark.parametrize("layers", [(FULL,), (FULL, STATE)], ids=["attention", "with a state"])
def test_float_caches_make_the_same_text(layers):
    model, params, _ = spoken(*layers)
    want = drawn(model, params, None)
    assert len({tuple(c.ids) for c in want}) == 4
    for kind in (decode.Paged(4), decode.CacheKind(dtype="float32"))[:3 - len(layers)]:
        for a, b in zip(drawn(model, params, kind), want):
            assert a.ids == b.ids
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)                     # float32, another order of sums


@pytest.mark.parametrize("kind", ["int8", "int4", "paged=8,int8"])
def test_quantised_caches_reach_the_text(talking, kind):
    """Greedy text and log-probabilities are those of decode_step over a cache of this kind (whose logits tests/models/test_quantised_cache.py bounds), and not those over floats."""
    model, params, _ = talking
    for a, b, prompt in zip(drawn(model, params, kind, n=1, temperature=0.0), drawn(model, params, None, n=1, temperature=0.0), PROMPTS):
        cache, ids, told, tokens = decode.make_cache(model, 1, 64, kind.split(",")[-1]), [], [], np.asarray([prompt])
        logits, cache = decode.prefill(model, params, tokens, np.arange(len(prompt))[None], np.ones_like(tokens), cache)
        if "paged" in kind:                                                                    # pages are always read as they are kept; slots see a first chunk's own keys
            cache = decode.make_cache(model, 1, 64, "int8")
            for i, token in enumerate(prompt):
                logits, cache = decode.decode_step(model, params, jnp.asarray([token]), jnp.asarray([i]), jnp.ones(1, bool), cache)
        for i in range(12):
            ids.append(int(logits[0].argmax()))
            told.append(float(jax.nn.log_softmax(logits[0]).max()))
            logits, cache = decode.decode_step(model, params, jnp.asarray(ids[-1:]), jnp.asarray([len(prompt) + i]), jnp.ones(1, bool), cache)
        assert a.ids == ids and np.abs(np.asarray(a.logprobs) - b.logprobs).max() > 1e-4
        np.testing.assert_allclose(a.logprobs, told, atol=1e-4)            # rows of another batch size may round to the next of 255 or 15 steps here and there


def one_by_one(model, params, policy, prompt, count):
    """Greedy text, every token fed alone."""
    cache, ids = decode.init_evicting(model, 1, policy), list(prompt)
    for i in range(len(prompt) + count - 1):
        logits, cache = decode.decode_step(model, params, jnp.asarray(ids[i:i + 1]), jnp.asarray([i]), jnp.ones(1, bool), cache)
        if i >= len(prompt) - 1:
            ids.append(int(logits[0].argmax()))
    return ids[len(prompt):]


def test_evicting_caches_give_up_what_their_rule_says(talking, monkeypatch):
    model, params, _ = talking
    greedy = dict(n=1, temperature=0.0, max_new_tokens=14)
    plain = [c.ids for c in drawn(model, params, None, **greedy)]
    for name, policy in (("sinks:2+6", decode.Streaming(2, 6)), ("h2o:4+6", decode.HeavyHitters(4, 6))):
        found = [c.ids for c in drawn(model, params, name, **greedy)]
        assert found == [one_by_one(model, params, policy, prompt, 14) for prompt in PROMPTS] != plain
    monkeypatch.setattr("llmjax.decode.reading.PIECE", 3)                                      # a prompt in pieces is the same prompt
    assert [c.ids for c in drawn(model, params, "sinks:2+6", **greedy)] == [one_by_one(model, params, decode.Streaming(2, 6), prompt, 14) for prompt in PROMPTS]
    guessed = drawn(model, params, "sinks:2+6", **greedy, draft=decode.NGram(3))
    assert [c.ids for c in guessed] == [one_by_one(model, params, decode.Streaming(2, 6), prompt, 14) for prompt in PROMPTS]


def test_a_streaming_text_has_no_end(talking):
    model, params, _ = talking
    knobs = dict(n=1, temperature=0.0, max_new_tokens=CONTEXT + 20)
    assert [len(c.ids) for c in drawn(model, params, "sinks:2+6", **knobs)] == [CONTEXT + 20] * 2
    assert [len(c.ids) for c in drawn(model, params, None, **knobs)] == [CONTEXT - 7, CONTEXT - 2]


def test_conversations(talking, tmp_path):
    session = decode.Session(*talking, cache="sinks:4+12")
    said = ["".join(session.say(text, max_new_tokens=8)) for text in ("Good morning, all.", "And a second turn beyond the context.")]
    assert len(session.ids) > CONTEXT and session.cache.length == 16 and all(said)
    session.save(tmp_path / "talk")
    back = decode.Session.load(tmp_path / "talk", *talking)
    assert back.kind == session.kind and "".join(back.say("More", max_new_tokens=8)) == "".join(session.say("More", max_new_tokens=8))


def test_what_does_not_go_together_is_said(talking):
    model, params, tokenizer = talking
    for words, call in (("beams and a cache of kind 'paged=16'", lambda: decode.beam_search(model, params, None, PROMPTS, cache="paged")),
                        ("beams and a cache of kind 'heavy=4\\+4'", lambda: decode.beam_search(model, params, None, PROMPTS, cache="h2o:4+4")),
                        ("draft and a cache of kind 'heavy=512\\+512'", lambda: drawn(model, params, "h2o", draft=decode.NGram())),
                        ("prompt_logprobs and a cache of kind 'streaming=4\\+1020'", lambda: drawn(model, params, "sinks", prompt_logprobs=True)),
                        ("a conversation, whose cache grows, and a cache of kind 'paged=16,int8'", lambda: decode.Session(model, params, tokenizer, cache="paged,int8")),
                        ("did you mean 'sinks'", lambda: drawn(model, params, "sinkz"))):
        with pytest.raises(ConfigError, match=words):
            call()
    assert [c.ids for c in decode.beam_search(model, params, None, PROMPTS, beams=2, max_new_tokens=6, cache="float32")] == [
        c.ids for c in decode.beam_search(model, params, None, PROMPTS, beams=2, max_new_tokens=6)]


def test_on_the_command_line(talking, monkeypatch, capsys):
    monkeypatch.setattr("llmjax.run.pretrained.load", lambda *args, **kwargs: talking)
    assert cli.main(["generate", "--model=x", "--prompt=Hello", "--max-new-tokens=4", "--cache=paged=8,int8"]) == 0
    captured = capsys.readouterr()
    size = decode.cache_bytes(decode.make_cache, talking[0], 1, 64, "paged=8,int8")
    assert captured.out.startswith("Hello") and f"cache: paged=8,int8, 1 rows of up to 64 tokens, {size / 2**20:.1f} MiB" in captured.err
    assert cli.main(["generate", "--model=x", "--prompt=Hello", "--beams=2", "--cache=h2o:4+4"]) == 2 and "do not go together" in capsys.readouterr().err
    assert cli.main(["chat", "--model=x", "--cache=padged"]) == 2 and "did you mean 'paged'" in capsys.readouterr().err
