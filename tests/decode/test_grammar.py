"""Grammars: random JSON schemas judged by jsonschema, other kinds by re and lists, forced tokens, masks, errors; a tiny random model with a byte-pair vocabulary, so that forced text has spellings."""
import dataclasses as dc
import json
import random
import re

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest

from llmjax import decode, tokenizers
from llmjax.core import Attention, Compute, ConfigError, Layer, Mlp, ModelConfig, Rope
from llmjax.decode import Choice, Grammar, JsonSchema, Lark, Regex
from llmjax.models import Decoder, init_params

TEXTS = ["alpha", "be", "the quick", "x1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_text('{"name": "alpha", "be": [1, 2.5, true, null], "the quick": {"x1": false}}\n' * 40 + "the quick brown fox jumps over the lazy dog " * 40)
    tokenizer = tokenizers.train_bpe([str(file)], vocab_size=330)
    layer = Layer(Attention(2, 1, 16, Rope()), Mlp(32))
    model = Decoder(ModelConfig(-(-tokenizer.vocab_size // 8) * 8 + 8, 32, cycle=(layer,), repeats=2, tied=True, context=256, end_tokens=(tokenizer.eos_id,)), Compute("float32"))
    return model, jax.tree.map(lambda x: 3 * x, init_params(model, jax.random.key(0))), tokenizer


def schema(r, depth=2):
    kind = r.choice(["string", "integer", "number", "boolean", "null", "enum", "const", "pattern", "any", *(["object", "array", "object", "array"] if depth else [])])
    match kind:
        case "string":
            low = r.randrange(3)
            return {"type": "string", "minLength": low, "maxLength": low + r.randrange(6)}
        case "integer":
            low = r.randrange(-50, 50)
            return {"type": "integer", "minimum": low, "maximum": low + r.randrange(200)}
        case "number":
            return {"type": "number", "minimum": r.randrange(-9, 0), "exclusiveMaximum": r.randrange(1, 9)}
        case "enum":
            return {"enum": r.sample([1, "a", True, None, "the quick", [1, "b"], {"x1": 0}, -2.5], r.randrange(1, 5))}
        case "const":
            return {"const": r.choice(["alpha", 3, {"be": [False]}])}
        case "pattern":
            return {"type": "string", "pattern": r.choice(["^[a-c]{2,4}$", "^(x|yz)+$", "^\\d{3}-\\d{2}$"]), "maxLength": 12}
        case "any":
            return {"anyOf": [schema(r, 0), schema(r, 0)]}
        case "object":
            names = r.sample(TEXTS, r.randrange(1, 4))
            return {"type": "object", "properties": {n: schema(r, depth - 1) for n in names}, "required": r.sample(names, r.randrange(len(names) + 1)), "additionalProperties": False}
        case "array":
            return {"type": "array", "items": schema(r, depth - 1), "minItems": r.randrange(3), "maxItems": r.randrange(3, 5)}
    return {"type": kind}


def judged(made, count, seed, batch=20):
    """(valid, cut) of `count` random schemas, a batch of different ones at a time; the first invalid answer fails."""
    r, valid, cut = random.Random(seed), 0, 0
    for start in range(0, count, batch):
        schemas = [schema(r) for _ in range(batch)]
        answers = decode.complete(*made, ["Answer: "] * batch, max_new_tokens=120, temperature=1.3, seed=seed + start, grammar=[JsonSchema(s) for s in schemas])
        for s, a in zip(schemas, answers):
            if a.finish == "length":
                cut += 1
            else:
                jsonschema.validate(json.loads(a.text), s)
                valid += 1
    return valid, cut


def test_two_hundred_random_schemas(made):
    valid, cut = judged(made, 200, 0)
    assert valid + cut == 200 and cut < 20


@pytest.mark.slow
def test_a_thousand_random_schemas(made):
    valid, cut = judged(made, 1000, 1000)
    assert valid + cut == 1000 and cut < 100


def test_patterns_grammars_and_choices(made):
    lark = 'start: item ("+" item)*\nitem: /[0-9]{1,3}/ | "(" start ")"\n'
    grammars = [Regex(r"[a-f]{3}-\d{2,5}"), Lark(lark), Choice(["alpha", "the quick", "日本 é\n\"x\""]), None,
                JsonSchema({"type": "array", "items": {"type": "integer"}, "maxItems": 3}, flexible=True)]
    for seed in range(3):
        a, b, c, _, e = decode.complete(*made, ["Answer: "] * 5, max_new_tokens=60, temperature=1.5, seed=seed, grammar=grammars)
        assert re.fullmatch(r"[a-f]{3}-\d{2,5}", a.text) and a.finish == "end"
        assert b.finish == "length" or (re.fullmatch(r"[0-9+()]+", b.text) and b.text.count("(") == b.text.count(")"))
        assert c.text in ("alpha", "the quick", "日本 é\n\"x\"") and c.finish == "end"
        assert e.finish == "length" or len(json.loads(e.text)) <= 3
    both = decode.complete(*made, ["Answer: "] * 2, max_new_tokens=40, temperature=1.5, seed=[5, 6], grammar=[None, Regex("a{30}")])
    assert both[0].ids == decode.complete(*made, ["Answer: "], max_new_tokens=40, temperature=1.5, seed=[5])[0].ids, "a row without a grammar is untouched by its neighbour's"


def test_forced_text_is_fed_undrawn_and_counted(made):
    """What the grammar forces costs no draw; ids, log-probabilities and alternatives are those of the plain forward on the text."""
    model, params, tokenizer = made
    s = {"type": "object", "properties": {"the quick": {"enum": ["alpha beta gamma delta", "x"]}}, "required": ["the quick"], "additionalProperties": False}
    matcher = Grammar(JsonSchema(s), tokenizer, model.config.vocab_size).matcher()
    assert tokenizer.decode(matcher.forced()).startswith('{"the quick": ')
    prompt = tokenizer.encode("Answer: ")
    c = decode.complete(model, params, tokenizer, [prompt], max_new_tokens=120, temperature=1.0, seed=1, logprobs=2, grammar=JsonSchema(s))[0]
    assert json.loads(c.text)["the quick"] in ("alpha beta gamma delta", "x") and c.finish == "end"
    full, _ = model.apply({"params": params}, jnp.asarray([[*prompt, *c.ids]]))
    want = np.asarray(jax.nn.log_softmax(full)[0])
    np.testing.assert_allclose(c.logprobs, [want[len(prompt) - 1 + i, t] for i, t in enumerate(c.ids)], atol=1e-4)
    assert [[i for i, _ in a] for a in c.alternatives] == [np.argsort(-want[len(prompt) - 1 + i])[:2].tolist() for i in range(len(c.ids))]


def test_penalties_see_forced_tokens(made):
    """History holds what was forced as well as what was drawn: the same knobs on the text so far give the same next token."""
    model, params, tokenizer = made
    knobs = dict(frequency_penalty=1.5, repetition_penalty=1.3)
    c = decode.complete(model, params, tokenizer, ["Answer: "], max_new_tokens=30, grammar=Regex("the quick brown [a-z ]{12,}"), **knobs)[0]
    grammar, ids, answer = Grammar(Regex("the quick brown [a-z ]{12,}"), tokenizer, model.config.vocab_size, model.config.end_tokens), tokenizer.encode("Answer: ", add_special_tokens=True), []
    matcher, sampling = grammar.matcher(), decode.make_sampling(1, model.config.vocab_size, **knobs)
    while len(answer) < len(c.ids):
        new = matcher.forced()
        if not new:
            history = decode.start_history(sampling, model.config.vocab_size, [ids], [answer], length=128)
            padded = jnp.zeros((1, 64), jnp.int32).at[0, :len(ids) + len(answer)].set(jnp.asarray([*ids, *answer]))
            logits, _ = model.apply({"params": params}, padded)
            here = logits[:, len(ids) + len(answer) - 1]
            new = [int(decode.sample(here, sampling, decode.row_keys(0, 1), jnp.zeros(1, jnp.int32), history, matcher.mask()[None])[0][0])]
        for token in new:
            matcher.advance(token)
        answer += new
    assert answer[:len(c.ids)] == c.ids


def test_matcher(made):
    model, _, tokenizer = made
    grammar = Grammar(Choice(["ab", "abc", "x"]), tokenizer, model.config.vocab_size)
    matcher = grammar.matcher()
    def on(m):
        bits = np.unpackbits(m.mask().view(np.uint8), bitorder="little").nonzero()[0]
        assert bits.max() < tokenizer.vocab_size
        return {tokenizer.token_bytes(int(i)) for i in bits}
    assert on(matcher) >= {b"a", b"x"} and b"c" not in on(matcher) and not matcher.complete
    fork = matcher.copy()
    matcher.advance(tokenizer.encode("x")[0])
    assert matcher.done and matcher.forced() == [] and on(matcher) == {tokenizer.token_bytes(tokenizer.eos_id)}
    assert not fork.done and fork.fits(tokenizer.encode("a") + tokenizer.encode("b")) == 2
    for text in ("a", "b"):
        if fork.fits(tokenizer.encode(text)):
            fork.advance(tokenizer.encode(text)[0])
    assert fork.complete and not fork.done and {b"c", tokenizer.token_bytes(tokenizer.eos_id)} <= on(fork)
    with pytest.raises(ConfigError, match="does not fit the grammar"):
        fork.advance(tokenizer.encode("q")[0])


def test_streams_follow_grammars_too(made):
    s = JsonSchema({"type": "object", "properties": {"be": {"type": "integer"}}, "required": ["be"], "additionalProperties": False})
    knobs = dict(max_new_tokens=40, temperature=1.0, seed=[3], grammar=s)
    parts = list(decode.stream(*made, "Answer: ", **knobs))
    assert "".join(parts) == decode.complete(*made, ["Answer: "], **knobs)[0].text and len(parts) > 2


@pytest.mark.parametrize("grammar, word", [
    (JsonSchema({"type": "nothing"}), "Invalid type: nothing"), (JsonSchema({"type": "integer", "minimum": 5, "maximum": 3}), "Unsatisfiable"), (JsonSchema({"enum": []}), "Unsatisfiable"),
    (JsonSchema(False), "a schema is a mapping"), (JsonSchema({"not": {}}), "Unimplemented"), (JsonSchema({"$ref": "#/nope"}), "nope"), (JsonSchema({"a": {1, 2}}), "JsonSchema"),
    (Regex("a(b"), "unclosed group"), (Lark("start: foo"), "unknown name"), (Choice([]), "list of texts"), (Choice("abc"), "list of texts"), ("json", "JsonSchema, Regex, Lark or Choice"),
    ([None, Regex("a")], "2 grammars for 1 rows")])
def test_bad_grammars_are_named(made, grammar, word):
    with pytest.raises(ConfigError, match=word) as error:
        decode.complete(*made, ["x"], grammar=grammar)
    assert "\n" not in str(error.value)


def test_what_does_not_go_together(made):
    model, params, tokenizer = made
    with pytest.raises(ConfigError, match="contradict"):
        decode.complete(*made, ["x"], grammar=Regex("a"), min_tokens=3)
    with pytest.raises(ConfigError, match="no tokenizer"):
        decode.complete(model, params, None, [[5]], grammar=Regex("a"))
    with pytest.raises(ConfigError, match="does not fit the grammar"):
        decode.complete(*made, ["x"], grammar=Regex("[ab]c"), bad_words=[[i] for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i)[:1] in (b"a", b"b")])
    endless = dc.replace(model, config=dc.replace(model.config, end_tokens=()))
    assert decode.complete(endless, params, tokenizer, ["x"], grammar=Choice(["ab", "abc"]), max_new_tokens=20, stop=[])[0].text in ("ab", "abc")


def test_the_extra_is_named(monkeypatch):
    import sys

    from llmjax.decode import grammar
    grammar.library.cache_clear()
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"pip install 'llmjax\[grammar\]'"):
        grammar.library()
    grammar.library.cache_clear()
