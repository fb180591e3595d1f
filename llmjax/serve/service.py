"""What the endpoints share: the engine, the model's name, how this model's conversations are written and read, limits."""
from __future__ import annotations

import dataclasses as dc
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from llmjax.core.errors import ConfigError, DataError, nearest
from llmjax.serve.answers import Store
from llmjax.serve.engine import Engine
from llmjax.serve.errors import ApiError, bad
from llmjax.serve.metrics import Metrics
from llmjax.serve.parsers import FORMATS, MARKERS, Listener, ThinkParser, ToolParser, choose_format
from llmjax.serve.protocol import Message, Tool
from llmjax.serve.scores import Scorer
from llmjax.serve.semantic import SemanticStore
from llmjax.serve.vectors import Embedder


@dc.dataclass(frozen=True)
class Limits:
    """timeout: seconds a request may take; body: bytes it may have; body_seconds: how long they may take to come; patience: seconds a reader may leave us waiting."""
    timeout: float = 600.0
    body: int = 10 * 2**20
    body_seconds: float = 30.0
    patience: float = 60.0


@dc.dataclass(frozen=True)
class Speech:
    """How a model writes calls and thoughts: a name of parsers.FORMATS or None; whether it thinks in <think> … </think>."""
    tools: str | None
    thinks: bool

    @classmethod
    def of(cls, template: str | Mapping[str, str] | None, tools: str = "auto", thoughts: str = "auto") -> Speech:
        """Read off a chat template unless said otherwise (a format's name, "think", or "none"). Raises ConfigError for another name."""
        text = template if isinstance(template, str) else "\n".join((template or {}).values())
        for option, value, names in (("tool-parser", tools, ("auto", "none", *FORMATS)), ("reasoning-parser", thoughts, ("auto", "none", "think"))):
            if value not in names:
                raise ConfigError(f"--{option}={value}: there is no such parser" + nearest(value, names))
        return cls(choose_format(text) if tools == "auto" else None if tools == "none" else tools, "<think>" in text if thoughts == "auto" else thoughts == "think")


@dc.dataclass
class Service:
    """name: what clients call the model; aliases are taken too."""
    engine: Engine
    name: str
    metrics: Metrics
    speech: Speech
    limits: Limits = Limits()
    aliases: tuple[str, ...] = ()
    embedder: Embedder | None = None
    store: Store | None = None
    semantic: SemanticStore | None = None
    scorer: Scorer = dc.field(init=False)
    stall: float = 120.0                               # seconds without a move after which the engine counts as stuck
    draining: bool = False
    created: int = dc.field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.scorer = Scorer(self.engine)

    @property
    def tokenizer(self) -> Any:
        return self.engine.tokenizer

    @property
    def room(self) -> int:
        return self.engine.length

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(name for name in self.engine.adapters if name is not None)

    def check_model(self, name: str | None) -> str | None:
        """-> the adapter that a model's name means, None for the model itself. Raises ApiError (404) for a name that is neither."""
        if name in self.adapters:
            return name
        if name is not None and name not in (self.name, *self.aliases):
            more = [f"also called {', '.join(self.aliases)}"] * bool(self.aliases) + [f"with the adapters {', '.join(self.adapters)}"] * bool(self.adapters)
            raise ApiError(404, f"model={name!r}: this server has {self.name!r}" + (f" ({'; '.join(more)})" if more else ""), param="model", code="model_not_found")
        return None

    def deadline(self) -> float:
        return time.monotonic() + self.limits.timeout

    def markers(self) -> frozenset[int]:
        """Special tokens whose text the parsers have to see."""
        return frozenset(id for text, id in self.tokenizer.special_tokens.items() if text in MARKERS)

    def conversation(self, messages: Sequence[Message], tools: Sequence[Tool] | None, generate: bool = True, **variables: Any) -> str:
        """Messages as the text the model reads. Raises ApiError without a template, where it refuses them, and for tools it does not know."""
        template = self.tokenizer.chat_template
        if not template:
            raise bad("this model has no chat template: use /v1/completions", "messages")
        if tools and "tools" not in (template if isinstance(template, str) else "".join(template.values())):
            raise bad("tools: this model's chat template takes none", "tools")
        try:
            return self.tokenizer.render_chat([plain(m) for m in messages], add_generation_prompt=generate, tools=[t.model_dump(exclude_none=True) for t in tools] if tools else None, **variables)
        except DataError as error:
            raise bad(str(error), "messages") from None

    def demand(self, tools: Sequence[Tool], several: bool) -> str:
        """A grammar (Lark) of an answer that calls one of these tools, or several, as this model writes calls; thoughts may come before."""
        name = self.speech.tools
        assert name is not None, "the listener has refused it"

        def marker(text: str) -> str:
            token = self.tokenizer.special_tokens.get(text)
            return json.dumps(text) if token is None else f"<[{token}]>"
        arguments = "parameters" if name == "llama3" else "arguments"
        calls = [{"type": "object", "properties": {"name": {"const": t.function.name}, arguments: t.function.parameters or {"type": "object"}}, "required": ["name", arguments],
                  "additionalProperties": False} for t in tools]
        call = "%json " + json.dumps({"anyOf": calls, "x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}})      # no white space that goes on for ever
        form = {"hermes": f'one: {marker("<tool_call>")} "\\n" call "\\n" {marker("</tool_call>")}\nseveral: one ("\\n" one)*', "llama3": 'one: call\nseveral: one ("; " one)*',
                "mistral": f'one: {marker("[TOOL_CALLS]")} "[" call "]"\nseveral: {marker("[TOOL_CALLS]")} "[" call (", " call)* "]"'}[name]
        begin = "start: " + ("several" if several else "one")
        if self.speech.thinks:
            begin = f'start: thought? {"several" if several else "one"}\nthought: {marker("<think>")}? /(?s:.*)/ {marker("</think>")} /\\n*/'
        return f"{begin}\n{form}\ncall: {call}"

    def listener(self, prompt: str, tools: Sequence[Tool] | None) -> Listener:
        """A fresh reader of what the model says after this prompt."""
        think = ThinkParser(prompt.rstrip().endswith("<think>")) if self.speech.thinks else None
        if not tools:
            return Listener(think)
        if self.speech.tools is None:
            raise bad("tools: how this model writes its calls is not known; start the server with --tool-parser=" + "|".join(FORMATS), "tools")
        return Listener(think, ToolParser(FORMATS[self.speech.tools], [t.function.name for t in tools]))


def plain(message: Message) -> dict[str, Any]:
    """A message as chat templates expect it: text content, arguments of calls as objects."""
    found: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": content_text(message)}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if getattr(message, name) is not None:
            found[name] = getattr(message, name)
    if message.tool_calls:
        found["tool_calls"] = []
        for call in message.tool_calls:
            try:
                arguments = json.loads(call.function.arguments or "{}")
            except json.JSONDecodeError:
                arguments = call.function.arguments
            found["tool_calls"].append({"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}})
    return found


def content_text(message: Message) -> str:
    if message.content is None:
        return message.refusal or ""
    return message.content if isinstance(message.content, str) else "".join(part.text or part.refusal or "" for part in message.content)


def fresh_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"
