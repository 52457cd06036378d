"""What the model wrote, read back into messages."""

import pytest

from qwench.tokenizer import Tokenizer, chat
from qwench.tokenizer.replies import parse_assistant
from qwench.types import Message, ToolCall

CALLS = (ToolCall(name="f", arguments={"a": "é\n"}, id="call_0"), ToolCall(name="g", arguments={}, id="call_1"))


@pytest.mark.parametrize("name", chat.FORMATS)
def test_what_is_rendered_is_read_back(small: Tokenizer, name: str) -> None:
    tok = small.with_chat_format(name)
    calls = CALLS[:1] if chat.FORMATS[name].tools == "react" else CALLS  # ReAct has one call a step
    user = Message(role="user", content="?")
    for reply in (
        Message(role="assistant", content="Let me see.", tool_calls=calls),
        Message(role="assistant", tool_calls=calls),
        Message(role="assistant", content="Just text, 你好."),
    ):
        whole, prompt = tok.render([user, reply], None, False), tok.render([user], None, True)
        assert whole[: len(prompt)] == prompt
        assert tok.parse_assistant(whole[len(prompt) : -1]) == reply


def test_lenient_reading() -> None:
    one = (ToolCall(name="f", arguments={"a": 1}, id="call_0"),)
    for text in (
        '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>',
        '<tool_call>\n\n {"name": "f",\n "arguments": {"a": 1}} ',  # cut off before the closing tag
        '<tool_call>\n{{"name": "f", "arguments": {"a": 1}}}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": "{\\"a\\": 1}"}\n</tool_call><|im_end|>\n',
        '✿FUNCTION✿:f\n✿ARGS✿:\n```json\n{"a": 1}\n```\n✿RESULT✿',
        'Action: f\nAction Input: {"a": 1}\nObservation:',
        'Thought:\nAction:  f \n Action Input: \n{"a": 1}',
    ):
        assert parse_assistant(text) == Message(role="assistant", tool_calls=one), text
    mixed = parse_assistant('first\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\nlast')
    assert (mixed.content, mixed.tool_calls) == ("first\nlast", one)
    assert parse_assistant("Thought: I know.\nFinal Answer: 42").content == "42"
    assert parse_assistant(" I now know the final answer.\nFinal Answer: 42", "qwen").content == "42"


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "",
        "<tool_call>\n{broken\n</tool_call>",
        '<tool_call>\n{"arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": [1]}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n<tool_call>\nbroken\n</tool_call>',
        "✿FUNCTION✿: f\n✿ARGS✿: not json",
        "Thought: x\nAction: f\nAction Input: not json",
        "Action: talk about actions",
    ],
)
def test_malformed_calls_stay_text(text: str) -> None:
    assert parse_assistant(text) == Message(role="assistant", content=text)


def test_only_the_calls_of_the_format() -> None:
    react = 'Action: f\nAction Input: {"a": 1}'
    assert parse_assistant(react, "qwen2.5").content == react
    assert parse_assistant(react, "qwen").tool_calls
