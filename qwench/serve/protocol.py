"""The requests that the server reads, field by field. Not here: what is done with them (params.py, chat.py, ...).

Lists stop at their first wrong element, so that a large wrong body cannot make a large number of errors.

Every model forbids unknown fields and does no conversion of types, so nothing is accepted and ignored. A field of
OpenAI's that this server cannot honour has the type `None`: null means the same as leaving it out, anything else is
refused by name. Fields that are accepted without being read have no effect on an answer by OpenAI's own definition.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from qwench.types import MAX_TOP_LOGPROBS

MAX_STOPS = 16
MAX_ANSWERS = 128
"""Largest `n`, as OpenAI has it."""
MAX_FIELD_CHARS = 512


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


Label = Annotated[str, StringConstraints(max_length=MAX_FIELD_CHARS)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_FIELD_CHARS)]
FunctionName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
NumTokens = Annotated[int, Field(ge=1, lt=2**31)]


# ---------------------------------------------------------------------------------------------------- structured text
class JsonSchema(Strict):
    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    """For the client's bookkeeping; answers do not depend on it."""
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None
    """The schema is enforced either way."""


class TextFormat(Strict):
    type: Literal["text"]


class JsonObjectFormat(Strict):
    type: Literal["json_object"]


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema

    @field_validator("json_schema")
    @classmethod
    def _no_description(cls, value: JsonSchema) -> JsonSchema:
        if value.description:
            raise ValueError("description is not shown to the model by this server; put it into a message")
        return value


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


# ----------------------------------------------------------------------------------------------------------- sampling
class SamplingRequest(Strict):
    """What chat and plain completions share. Fields below "extras" are not OpenAI's."""

    model: str
    max_tokens: NumTokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        dict[Annotated[str, StringConstraints(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Label | None = None
    """Says who asks; has no effect on the answer."""
    # extras
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_FIELD_CHARS, fail_fast=True)] | None = None
    response_format: ResponseFormat | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1, fail_fast=True)] | None = None
    guided_grammar: str | None = None

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> SamplingRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed together with stream=true")
        return self


# --------------------------------------------------------------------------------------------------------------- chat
class TextPart(Strict):
    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise ValueError(f"parts of type {kind[:MAX_FIELD_CHARS]!r} are not supported, this server reads text only")
        return value


Content = str | Annotated[list[TextPart], Field(fail_fast=True)]


class FunctionCall(Strict):
    name: str
    arguments: str


class AssistantToolCall(Strict):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class SystemMessage(Strict):
    role: Literal["system", "developer"]
    content: Content


class UserMessage(Strict):
    role: Literal["user"]
    content: Content


class AssistantMessage(Strict):
    """As the server's own answers are, so that a client can send one back as it came."""

    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: Annotated[list[AssistantToolCall], Field(fail_fast=True)] | None = None
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None


class ToolMessage(Strict):
    role: Literal["tool"]
    content: Content
    tool_call_id: str


ChatMessage = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(Strict):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    """Arguments are held to the schema either way."""


class Tool(Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: FunctionName


class NamedToolChoice(Strict):
    type: Literal["function"]
    function: NamedFunction


class ChatRequest(SamplingRequest):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: NumTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    # no effect on an answer by definition
    metadata: dict[str, Label] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None
    # not supported
    audio: None = None
    functions: None = None
    function_call: None = None
    moderation: None = None
    prediction: None = None
    prompt_cache_options: None = None
    prompt_cache_retention: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None

    @model_validator(mode="after")
    def _belong_together(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only allowed together with logprobs=true")
        if not self.tools and self.tool_choice not in (None, "none"):
            raise ValueError("tool_choice is only allowed together with tools")
        if not self.tools and self.parallel_tool_calls is not None:
            raise ValueError("parallel_tool_calls is only allowed together with tools")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("tools has two functions of the same name")
        if isinstance(self.tool_choice, NamedToolChoice) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, which is not among tools")
        return self


# -------------------------------------------------------------------------------------------------- plain completions
class CompletionRequest(SamplingRequest):
    """Body of POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
        | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]], Field(min_length=1, fail_fast=True)
        ]
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    parse_special: bool | None = None
    """Extra: names of control tokens in a text prompt, such as <|fim_prefix|>, become those tokens."""
    # not supported, but for the value that changes nothing
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: None = None


# -------------------------------------------------------------------------------------------------------------- tokens
class TokenizeRequest(Strict):
    """Body of POST /tokenize: a text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    add_generation_prompt: bool | None = None
    parse_special: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        if self.prompt is not None and (self.tools is not None or self.add_generation_prompt is not None):
            raise ValueError("tools and add_generation_prompt are only allowed together with messages")
        if self.messages is not None and self.parse_special is not None:
            raise ValueError("parse_special is only allowed together with prompt; messages never become control tokens")
        return self


class DetokenizeRequest(Strict):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
