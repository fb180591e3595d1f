"""Chat templates: rendered text and ids equal transformers', masks against hand-made ones, refusals."""
import pytest

from llmjax import tokenizers
from llmjax.core.errors import ConfigError, DataError

MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]")
LLAMA2 = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
          "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' + eos_token }}"
          "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}")
SMOL = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
TOOLS = """{%- set ns = namespace(found=false) %}
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- for tool in tools %}{{ tool | tojson(indent=2) }}{% endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}
    {%- else %}
        {{- '<|im_start|>' ~ message.role ~ '\n' ~ message.content | trim ~ '<|im_end|>' }}
    {%- endif %}
{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""
CONVERSATION = [{"role": "user", "content": "What is <b>2+2</b>? ünï"}, {"role": "assistant", "content": "4.\n\n  Four"}, {"role": "user", "content": "Sure? 🙂"},
                {"role": "assistant", "content": "Yes"}]


@pytest.fixture(scope="module")
def trained():
    return tokenizers.train_bpe(["What is two and two? Sure, four. Yes and no and user and assistant and system"] * 5, 300, MARKS, eos="</s>", bos="<s>")


@pytest.mark.parametrize("template", [tokenizers.CHATML, LLAMA2, SMOL, TOOLS], ids=["chatml", "llama2", "smol", "tools"])
@pytest.mark.parametrize("prompt", [False, True])
def test_equal_to_transformers(template, prompt, trained, tmp_path):
    import transformers
    ours = trained.with_chat_template(template)
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tools = [{"type": "function", "function": {"name": "add", "description": "a < b & c é"}}] if template is TOOLS else None
    for messages in (CONVERSATION[:1], CONVERSATION[:3], CONVERSATION):
        assert ours.render_chat(messages, prompt, tools) == theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt, tokenize=False)
        assert ours.apply_chat_template(messages, prompt, tools) == theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt)["input_ids"]
    again = tokenizers.load(tmp_path)
    assert again.chat_template == template and again.fingerprint == ours.fingerprint != trained.fingerprint


def test_several_templates(trained, tmp_path):
    import transformers
    named = {"default": tokenizers.CHATML, "tool_use": TOOLS}
    ours = trained.with_chat_template(named)
    ours.save(tmp_path / "a")
    for folder in ("a", "b"):
        again = tokenizers.load(tmp_path / "a")
        assert again.chat_template == named
        assert again.render_chat(CONVERSATION, tools=[{"x": 1}]) == trained.with_chat_template(TOOLS).render_chat(CONVERSATION, tools=[{"x": 1}])
        assert again.render_chat(CONVERSATION) == transformers.AutoTokenizer.from_pretrained(tmp_path / "a").apply_chat_template(CONVERSATION, tokenize=False)
        if folder == "a":  # the older way: a list in the configuration
            import json
            for file in [tmp_path / "a" / "chat_template.jinja", *(tmp_path / "a" / "additional_chat_templates").iterdir()]:
                file.unlink()
            config = tmp_path / "a" / "tokenizer_config.json"
            config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": [{"name": k, "template": v} for k, v in named.items()]}))
    with pytest.raises(ConfigError, match="did you mean 'tool_use'"):
        ours.render_chat(CONVERSATION, template="tool_uze")


@pytest.mark.parametrize("template", [tokenizers.CHATML, SMOL, TOOLS], ids=["chatml", "smol", "tools"])
def test_mask(template, trained):
    ours = trained.with_chat_template(template)
    ids, mask = ours.chat_with_mask(CONVERSATION)
    assert ids == ours.apply_chat_template(CONVERSATION) and len(ids) == len(mask)
    learnt = "".join(ours.decode([i]) if m else "|" for i, m in zip(ids, mask))
    said = [part for part in "".join(c for c in ("\x00" if not m else ours.token_bytes(i).decode("latin-1") for i, m in zip(ids, mask))).split("\x00") if part]
    assert said == ["4.\n\n  Four<|im_end|>", "Yes<|im_end|>"], learnt


def test_mask_with_spaces_before_the_end(trained):
    ours = trained.with_chat_template(LLAMA2)
    ids, mask = ours.chat_with_mask(CONVERSATION)
    assert ours.decode([i for i, m in zip(ids, mask) if m]) == " 4.\n\n  Four </s> Yes </s>"


def test_refusals(trained):
    chatml = trained.with_chat_template(tokenizers.CHATML)
    with pytest.raises(DataError, match="nothing to train on"):
        chatml.chat_with_mask(CONVERSATION[:1])
    forgets = trained.with_chat_template("{% for m in messages %}{{ '<|im_start|>' + m['role'] + ':' }}{% if loop.last %}{{ m['content'] }}{% endif %}<|im_end|>{% endfor %}")
    with pytest.raises(DataError, match="does not render the conversation"):
        forgets.chat_with_mask(CONVERSATION)
    with pytest.raises(DataError, match="only user and assistant"):
        trained.with_chat_template(LLAMA2).render_chat([{"role": "system", "content": "x"}])
    with pytest.raises(DataError, match="does not compile"):
        trained.with_chat_template("{% for %}").render_chat(CONVERSATION)
    with pytest.raises(DataError, match="message 1"):
        chatml.render_chat([CONVERSATION[0], "hello"])
    with pytest.raises(DataError, match="list of"):
        chatml.render_chat("hello")
    with pytest.raises(ConfigError, match="no chat template"):
        trained.render_chat(CONVERSATION)


def test_sandbox(trained):
    for attack in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ namespace.__init__.__globals__ }}"):
        with pytest.raises(DataError):
            print(repr(trained.with_chat_template(attack).render_chat(CONVERSATION)))


def test_messages_reach_the_template_as_plain_data(trained):
    import enum

    class Role(enum.StrEnum):
        user = "user"

    class Text(str):
        def shout(self):
            return "escaped"

    chatml = trained.with_chat_template(tokenizers.CHATML)
    assert chatml.render_chat([{"role": Role.user, "content": Text("hi")}]) == chatml.render_chat([{"role": "user", "content": "hi"}])
    with pytest.raises(DataError):
        trained.with_chat_template("{{ messages[0].content.shout() }}").render_chat([{"role": "user", "content": Text("hi")}])
