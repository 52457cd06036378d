"""A conversation as the prompt of an evaluation: text for records, ids for the model.

lm-eval hands prompts on as strings. A rendered conversation keeps its ids beside the text, so that what users write in
it can never become control tokens; a string that lm-eval has joined with other text is encoded anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qwench.tokenizer import Tokenizer
from qwench.tokenizer.chat import find_format
from qwench.types import Message


class ChatPrompt(str):
    """The text of a rendered conversation, with its ids."""

    ids: tuple[int, ...]

    def __new__(cls, text: str, ids: Sequence[int]) -> ChatPrompt:
        made = super().__new__(cls, text)
        made.ids = tuple(ids)
        return made


def render_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Message | Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    opened: str | None = None,
) -> ChatPrompt:
    """A conversation up to where the assistant writes. `opened`: how its answer begins already (prefilled).

    Raises ValueError for a tokenizer without a known chat template, and for malformed messages.
    """
    ids = tokenizer.render(list(messages), list(tools) if tools is not None else None)
    if opened and not find_format(tokenizer.chat_format or "").joined:
        ids = ids + tokenizer.encode(opened)
    elif opened:
        # The role line and the answer are one text to the encoder, as they are in a template.
        start = 1 + max(place for place, token in enumerate(ids) if token == tokenizer.im_start_id)
        ids = ids[:start] + tokenizer.encode(tokenizer.decode(ids[start:]) + opened)
    return ChatPrompt(tokenizer.decode(ids), ids)
