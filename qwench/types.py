"""The values that flow between stages: small frozen records, each with a worked example.

This file imports neither torch nor any other part of qwench, so every stage can share it. Tensors that travel
between the trainer and the model live with their owners (`ops.attention.AttnMeta`, `train.batch.Batch`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

Role = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "abort"]
"""Why an answer ended: an end token or stop string, max_tokens or the context's end, or the caller gave it up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text with its origin.

    >>> Document(id="stdlib/abc.py", text="import sys", source="stdlib", kind="code", lang="python")

    `kind` is the domain label of the mixture (for example "code", "docs", "web"); `lang` a language code or "".
    """

    id: str
    text: str
    source: str = ""
    kind: str = ""
    lang: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a filter says of a document: keep it, or drop it for a named reason with the measured value.

    >>> Verdict(keep=False, reason="too_short", value=12)
    """

    keep: bool
    reason: str = ""
    value: float | None = None


KEEP = Verdict(keep=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A function call by the assistant: `ToolCall(name="get_weather", arguments={"city": "Paris"}, id="call_0")`."""

    name: str
    arguments: Mapping[str, Any]
    id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation, in OpenAI's vocabulary.

    >>> Message(role="user", content="What does len() do?")
    """

    role: Role
    content: str = ""
    tool_calls: Sequence[ToolCall] = ()
    name: str = ""
    """Name of the tool that answers (role "tool" only)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Tokens of one training example with the loss weight of each token *as a target*.

    >>> Sample(token_ids=np.array([5, 6, 7], np.int32), loss_weights=np.array([0, 1, 1], np.float32))

    Here token 6 and 7 are learnt, token 5 is only read. Both arrays have shape [T].
    """

    token_ids: np.ndarray
    loss_weights: np.ndarray


MAX_TOP_LOGPROBS = 20
GrammarKind = Literal["json_schema", "json_object", "regex", "choice", "lark"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """What an answer must look like, as text, so that it travels and compares by value.

    >>> Grammar(kind="json_schema", value='{"type": "object", "properties": {"city": {"type": "string"}}}')

    `value` is a JSON schema; "" for json_object; a regular expression; a JSON list of strings for choice; or a Lark
    grammar in llguidance's dialect.
    """

    kind: GrammarKind
    value: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens. `temperature=0` is greedy; `top_k=0`, `top_p=1`, `min_p=0` switch those filters off.

    The order: repetition penalty, presence and frequency penalties, logit bias, temperature, top-k, top-p, min-p.
    Among equally likely tokens at the edge of a filter all are kept.

    >>> SamplingParams(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05, max_tokens=512)
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    """Drop tokens less likely than min_p times the likeliest one."""
    repetition_penalty: float = 1.0
    """> 1 divides positive and multiplies negative logits of tokens that stand in prompt or answer [Keskar 2019]."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token that stands in the answer (OpenAI's definition: the prompt not)."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for each time that it stands in the answer."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id -> number added to its logit; -inf bans it."""
    max_tokens: int = 256
    min_tokens: int = 0
    """End tokens cannot be drawn before this many tokens of the answer; stop strings do not end it either."""
    stop: Sequence[str] = ()
    """Strings that end the answer; they are not part of `Completion.text`."""
    stop_token_ids: Sequence[int] = ()
    """Further ids that end the answer, beside the model's own end tokens."""
    ignore_eos: bool = False
    seed: int | None = None
    """The same seed draws the same tokens from the same probabilities, whatever else the engine is serving."""
    n: int = 1
    """Answers to each prompt; the i-th of a seeded request draws with seed + i."""
    top_logprobs: int = 0
    """Also report this many of the likeliest tokens at each place of the answer."""
    prompt_logprobs: bool = False
    """Also report the log-probability of every prompt token, and whether it is the likeliest one."""
    prompt_logprobs_from: int = 0
    """Report those of the prompt tokens from this index on only; what comes before may then be in the prefix cache."""
    first_logprobs: Sequence[int] = ()
    """Also report the log-probabilities that these ids have as the first token of the answer."""
    grammar: Grammar | None = None
    """What the answer must look like (constrained decoding)."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; give 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; give a number in (0, 1], where 1 keeps every token")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; give 0 (off) or a positive number")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; give a number in [0, 1], where 0 is off")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; give a positive number, 1 is off")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; give at least 1")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens}; give 0 to max_tokens, which is {self.max_tokens}")
        if self.n < 1:
            raise ValueError(f"n is {self.n}; give at least 1")
        if not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise ValueError(f"top_logprobs is {self.top_logprobs}; give 0 to {MAX_TOP_LOGPROBS}")
        if self.prompt_logprobs_from < 0 or (self.prompt_logprobs_from and not self.prompt_logprobs):
            raise ValueError(
                f"prompt_logprobs_from is {self.prompt_logprobs_from}; give an index into the prompt, together with "
                "prompt_logprobs=True"
            )
        if isinstance(self.stop, str):
            raise ValueError('stop is a string; give a list of strings, for example stop=["\\n\\n"]')


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What a generator returns for one prompt.

    >>> Completion(token_ids=[9707, 151645], text="Hello", logprobs=[-0.1, -0.02], finish_reason="stop")

    `token_ids` has every sampled token, the end token included; `text` leaves end tokens and stop strings out.
    `logprobs` are natural logarithms of the model's own distribution (before temperature and filters).
    """

    token_ids: list[int]
    text: str
    logprobs: list[float]
    finish_reason: FinishReason
    top_logprobs: list[dict[int, float]] | None = None
    """For each token of the answer: the likeliest ids with their log-probabilities, best first, when asked for."""
    prompt_logprobs: list[float | None] | None = None
    """Log-probability of each prompt token given those before it (None for the first, and where not asked for)."""
    prompt_greedy: list[bool | None] | None = None
    """Whether each prompt token is the likeliest one given those before it; None in the same places."""
    first_logprobs: dict[int, float] | None = None
    """Log-probabilities of the ids that were asked for as the first token of the answer."""
    num_cached_tokens: int = 0
    """Prompt tokens whose keys and values were already in the cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """One step of a streamed answer: what became final since the last one, and at the end the whole completion.

    >>> Chunk(text="Hel", token_ids=[9707], logprobs=[-0.1])

    Text lags behind tokens while it could still turn into a stop string or is half of a character.
    """

    text: str
    token_ids: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    top_logprobs: Sequence[Mapping[int, float]] = ()
    completion: Completion | None = None


@runtime_checkable
class Generator(Protocol):
    """The one protocol by which synthesis, tools, evaluation and RL ask for text."""

    def generate(self, token_ids: Sequence[int], params: SamplingParams) -> Completion:
        """Continue `token_ids`."""
        ...
