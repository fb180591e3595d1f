"""What clients send: the bodies of OpenAI's endpoints as pydantic models, the source of both the checks and the OpenAPI document. An unknown field is an error, and so is a known one that
asks for what this server does not do; hints that change nothing (user, metadata, …) are taken.
"""
from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1)]
Stop = Annotated[str, Field(min_length=1, max_length=4096)]
Stops = Stop | Annotated[list[Stop], Field(max_length=16)] | None
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
MOST_CHOICES = 64


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False


class Structure(Body):
    """What an answer must be, one of: a JSON schema, a regular expression (Rust's), one of several texts, a grammar in Lark's notation."""
    json_: dict[str, Any] | None = Field(None, alias="json")
    regex: Annotated[str, Field(min_length=1, max_length=65536)] | None = None
    choice: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=4096)] | None = None
    grammar: Annotated[str, Field(min_length=1, max_length=262144)] | None = None

    @model_validator(mode="after")
    def one(self) -> Structure:
        if sum(x is not None for x in (self.json_, self.regex, self.choice, self.grammar)) != 1:
            raise ValueError("one of json, regex, choice and grammar is wanted")
        return self


class Sampled(Body):
    """What says how tokens are drawn; the same in all endpoints that make text. top_k, min_p, repetition_penalty, min_tokens, structured_outputs, ignore_eos, stop_token_ids and priority
    are additions (named as in vLLM)."""
    model: str
    temperature: Annotated[float, Field(ge=0, le=10)] = 1.0            # below 1e-5 it is 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    logit_bias: Annotated[dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]], Field(max_length=300)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 0
    structured_outputs: Structure | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Stops = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] = []
    ignore_eos: bool = False
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    user: str | None = None

    @model_validator(mode="after")
    def consistent(self) -> Sampled:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options says something about stream, which is not true")
        return self


class FunctionCall(Body):
    name: Annotated[str, Field(min_length=1)]
    arguments: str


class ToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class TextPart(Body):
    type: Literal["text", "input_text", "output_text", "refusal"]
    text: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    cache_control: dict[str, Any] | None = None


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def whole(self) -> Message:
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.refusal)):
            raise ValueError(f"a message of role {self.role} has no content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"a message of role {self.role} calls no tools")
        return self


class FunctionSpec(Body):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: FunctionSpec


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Body):
    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextFormat(Body):
    """schema: an addition of several servers, a JSON schema beside json_object."""
    type: Literal["text", "json_object"]
    schema_: dict[str, Any] | None = Field(None, alias="schema")

    @model_validator(mode="after")
    def sound(self) -> TextFormat:
        if self.schema_ is not None and self.type == "text":
            raise ValueError("schema says something about json_object, and the type is text")
        return self


class SchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | SchemaFormat, Field(discriminator="type")]


class ChatRequest(Sampled):
    """POST /v1/chat/completions."""
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] = {}
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def sound(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs says something about logprobs, which is not true")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice asks for a tool, and there are no tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in [t.function.name for t in self.tools or ()]:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, which is not among the tools")
        return self


class CompletionRequest(Sampled):
    """POST /v1/completions."""
    prompt: str | Annotated[list[str], Field(min_length=1, max_length=256)] | Annotated[list[TokenId], Field(min_length=1)] \
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=256)]
    max_tokens: Annotated[int, Field(ge=0)] = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    best_of: None = None
    suffix: None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def something(self) -> CompletionRequest:
        if not self.max_tokens and not self.echo:
            raise ValueError("max_tokens=0: at least 1 is wanted, unless the prompt is wanted back (echo)")
        return self


class EmbeddingRequest(Body):
    """POST /v1/embeddings."""
    model: str
    input: str | Annotated[list[str], Field(min_length=1, max_length=2048)] | Annotated[list[TokenId], Field(min_length=1)] \
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=2048)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: None = None
    user: str | None = None


class TokenizeRequest(Body):
    """POST /tokenize: the ids of a text, or of a conversation as the model reads it."""
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("either prompt or messages is wanted")
        return self


class DetokenizeRequest(Body):
    """POST /detokenize."""
    model: str | None = None
    tokens: list[TokenId]
