"""Chat templates: Jinja in a sandbox, with what Hugging Face templates expect of it (transformers' `chat_template_utils` is the reference). No ids here (`tokenizer.py`)."""
import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime

from llmjax.core.errors import ConfigError, DataError, nearest

CHATML = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}" \
         "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
"""The ChatML template. Never put in silently: `tokenizer.with_chat_template(CHATML)`; the vocabulary must hold `<|im_start|>` and `<|im_end|>` as special tokens."""

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


@functools.lru_cache(16)
def _compiled(template: str):
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what an assistant says; the text inside is rendered as it stands (loss masks come from prefixes, `Tokenizer.chat_with_mask`)."""
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

        def _render(self, caller):
            return caller()

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _plain(value):
    """Templates see JSON types only: what a message carries besides them becomes a name in angle brackets, so no method can be reached from a template."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    for kind in (str, int, float):  # a subclass (an enum's member, say) carries methods of its own
        if isinstance(value, kind):
            return getattr(kind, f"__{kind.__name__}__")(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return _plain(value.item())
    return f"<{type(value).__name__}>"


def check_messages(messages) -> list[dict]:
    """A conversation as plain data. Raises DataError where it is no list of {"role": ..., "content": ...}."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise DataError(f"a conversation is a list of {{'role': ..., 'content': ...}}, not {type(messages).__name__} {str(messages)[:60]!r}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise DataError(f"message {i} of a conversation is a dict with 'role' and 'content', not {str(message)[:80]!r}")
    return _plain(messages)


def render(template: str, messages: list[dict], **variables) -> str:
    """The conversation as text. `variables` are what the template may read besides `messages`. Raises DataError where the template does not compile or refuses the conversation."""
    import jinja2
    try:
        return _compiled(template).render(messages=messages, **variables)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"the chat template does not compile: line {error.lineno}: {error.message}") from None
    except (jinja2.TemplateError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"the chat template refuses this conversation: {error}") from None


def choose(templates: str | Mapping[str, str] | None, name: str | None, tools) -> str:
    """One template of those a tokenizer has: the named one, else `tool_use` where tools are given, else `default`. Raises ConfigError where there is none or it is not clear
    which."""
    if templates is None:
        raise ConfigError("this tokenizer has no chat template: give it one, tokenizer.with_chat_template(...) (llmjax.tokenizers.CHATML is a common one)")
    if isinstance(templates, str):
        if name not in (None, "default"):
            raise ConfigError(f"chat template {name!r}: this tokenizer has a single, unnamed one")
        return templates
    wanted = name or ("tool_use" if tools and "tool_use" in templates else "default")
    if wanted not in templates:
        raise ConfigError(f"chat template {wanted!r} is not among this tokenizer's{nearest(wanted, templates)}")
    return templates[wanted]
