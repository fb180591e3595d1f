"""Conversations that fork, are saved and restored: no history is computed again, and nobody disturbs anybody."""
import jax
import numpy as np
import pytest

from llmjax import decode, tokenizers
from llmjax.core import Attention, CheckpointError, Compute, ConfigError, GatedDelta, Layer, Mlp, ModelConfig, Rope
from llmjax.models import Decoder, init_params

CHAT = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
FULL, STATE = Layer(Attention(4, 2, 8, Rope()), Mlp(40)), Layer(GatedDelta(2, 2, 8, 8), Mlp(24))


def spoken(layer):
    tokenizer = tokenizers.bytes_tokenizer(("<|endoftext|>",), eos="<|endoftext|>").with_chat_template(CHAT)
    model = Decoder(ModelConfig(-(-tokenizer.vocab_size // 8) * 8, 32, cycle=(layer,), repeats=2, tied=True, context=512, end_tokens=(tokenizer.eos_id,)), Compute("float32"))
    return model, jax.tree.map(lambda x: 4 * x, init_params(model, jax.random.key(0))), tokenizer


@pytest.fixture(scope="module")
def talking():
    return spoken(FULL)


def say(session, text):
    return "".join(session.say(text, max_new_tokens=9))


def test_forks_do_not_disturb_each_other(talking):
    alone = decode.Session(*talking)
    answers = [say(alone, text) for text in ("Good morning.", "And now?", "Why?")]
    session = decode.Session(*talking)
    assert say(session, "Good morning.") == answers[0]
    other, third = session.fork(), session.fork()
    fed = other.fed
    assert say(other, "Something else, and longer: " * 3) != answers[1]
    assert say(session, "And now?") == answers[1] and say(other, "Yes.") and say(third, "And now?") == answers[1] and say(session, "Why?") == answers[2]
    assert third.messages == session.messages[:4] and other.messages[:2] == session.messages[:2] and other.fed - fed < 140       # its own words; with the history twice it would be twice that


@pytest.mark.parametrize("kind", [None, "int8"])
def test_a_saved_conversation_goes_on(talking, tmp_path, kind):
    session = decode.Session(*talking, cache=kind, system="Be brief.")
    say(session, "Good morning.")
    session.save(tmp_path / "talk")
    want = [say(session, text) for text in ("And now?", "Why?")]
    back = decode.Session.load(tmp_path / "talk", *talking)
    fed = back.fed
    assert [say(back, text) for text in ("And now?", "Why?")] == want and back.messages == session.messages and back.fed == session.fed > fed
    assert [p.name for p in tmp_path.iterdir()] == ["talk"]


def test_what_is_no_conversation_of_this_model_is_named(talking, tmp_path):
    model, params, tokenizer = talking
    session = decode.Session(*talking)
    session.save(tmp_path / "new")
    assert say(decode.Session.load(tmp_path / "new", *talking), "Hello") == say(session, "Hello")
    with pytest.raises(CheckpointError, match="other weights"):
        decode.Session.load(tmp_path / "new", model, jax.tree.map(lambda x: 2 * x, params), tokenizer)
    (tmp_path / "junk").write_bytes(b"x" * 99)
    with pytest.raises(CheckpointError, match="junk"):
        decode.Session.load(tmp_path / "junk", *talking)
    with pytest.raises(FileNotFoundError):
        decode.Session.load(tmp_path / "none", *talking)
    answer = session.say("Once more.", max_new_tokens=9)
    next(answer)
    for move in (session.fork, lambda: session.save(tmp_path / "half")):
        with pytest.raises(ConfigError, match="an answer is being made"):
            move()
    answer.close()
    assert np.all(session.fork().ids == session.ids)


def test_a_state_forks_too(tmp_path):
    """A recurrent layer cannot be rewound: what the template adds decides whether history is computed again; a fork and a restored one do the same."""
    talking = spoken(STATE)
    session = decode.Session(*talking)
    say(session, "Good morning.")
    session.save(tmp_path / "talk")
    other, back = session.fork(), decode.Session.load(tmp_path / "talk", *talking)
    say(other, "Something else.")
    assert say(session, "And now?") == say(back, "And now?")
