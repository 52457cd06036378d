"""Streamed tool calls: the same whatever the pieces, and what the reader of whole answers finds."""

from __future__ import annotations

import json
import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwench.engine.grammar import GrammarCompiler, tool_grammar
from qwench.serve.tool_stream import TextDelta, ToolCallArguments, ToolCallStart, ToolCallStream, ToolEvent
from qwench.tokenizer import Tokenizer
from qwench.tokenizer.replies import parse_assistant

FORMATS = ["qwen2.5", "qwen2", "qwen"]
HERMES = '<tool_call>\n{"name": "f", "arguments": {"a": "}\\"<tool_call>"}}\n</tool_call>'
FLOWER = '✿FUNCTION✿: f\n✿ARGS✿: {"a": "}\\"✿"}'
REACT = 'Action: f\nAction Input: {"a": "}\\"Action:"}'
FRAGMENTS = [
    *(HERMES, FLOWER, REACT, "\n" + FLOWER, "\n" + REACT, "\n" + HERMES),
    *(
        "<tool_call>",
        "</tool_call>",
        "\n",
        " ",
        '{"name": "f", "arguments": ',
        '{"a": 1}',
        "{",
        "}",
        '"',
        "\\",
        "<",
        "✿",
    ),
    *("Thought:", "Action:", "Action Input:", " f", " {}", "\nObservation:", "Final Answer:", "✿FUNCTION✿", "✿ARGS✿"),
    *("✿RESULT✿", "✿RETURN✿", ": g", "hello", "é🙂", "[", ",", '"name"', "```json\n"),
]
answers = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=4)), max_size=9).map("".join)


@pytest.fixture(scope="module")
def tokenizers(tiny_tokenizer: Tokenizer) -> dict[str, Tokenizer]:
    return {name: tiny_tokenizer.with_chat_format(name) for name in FORMATS}


def joined(events: list[ToolEvent]) -> tuple[str, list[tuple[str, str]]]:
    """Content, and name and argument text of each call. Checks the form of the stream."""
    content, calls, ids = "", [], []
    for event in events:
        if isinstance(event, TextDelta):
            assert event.text
            content += event.text
        elif isinstance(event, ToolCallStart):
            assert event.index == len(calls)
            assert event.name
            calls.append((event.name, ""))
            ids.append(event.id)
        else:
            assert event.text
            assert event.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
    assert len(set(ids)) == len(ids)
    assert all(one.startswith("call_") and len(one) > 12 for one in ids)
    return content, calls


def read(tokenizer: Tokenizer, pieces: list[str], *, constrained: bool) -> tuple[str, list[tuple[str, str]]]:
    stream = ToolCallStream(tokenizer, constrained=constrained)
    events = [event for piece in pieces for event in stream.push(piece)]
    content, calls = joined([*events, *stream.close()])
    assert stream.num_calls == len(calls)
    assert stream.close() == []
    return content, calls


@settings(max_examples=1500, deadline=None)
@given(text=answers, cuts=st.lists(st.integers(0, 200), max_size=8), data=st.data())
def test_pieces_do_not_matter(
    tokenizers: dict[str, Tokenizer], text: str, cuts: list[int], data: st.DataObject
) -> None:
    name, constrained = data.draw(st.sampled_from(FORMATS)), data.draw(st.booleans())
    whole = read(tokenizers[name], [text], constrained=constrained)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    assert read(tokenizers[name], [text[a:b] for a, b in pairwise(edges)], constrained=constrained) == whole
    assert read(tokenizers[name], list(text), constrained=constrained) == whole
    if not whole[1] and not (name == "qwen" and "Final Answer:" in text) and (constrained or "✿RETURN✿" not in text):
        assert whole[0] == text.rstrip() or whole[0] == text  # nothing is lost


@settings(max_examples=1500, deadline=None)
@given(text=answers, data=st.data())
def test_without_a_grammar_it_reads_as_parse_assistant(
    tokenizers: dict[str, Tokenizer], text: str, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(FORMATS))
    content, calls = read(tokenizers[name], list(text), constrained=False)
    message = parse_assistant(text, name)
    if name == "qwen" and "Final Answer:" in text:
        return  # the stream cannot take back what it began to give as the final answer
    assert [(call, json.loads(arguments)) for call, arguments in calls] == [
        (call.name, call.arguments) for call in message.tool_calls
    ]
    if calls:
        content = content.lstrip()
    if not (name == "qwen2" and not calls and "✿RETURN✿" in text):
        assert content == message.content


TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {}, "b": {"type": "string"}}}}},
    {"type": "function", "function": {"name": "g"}},
]


@pytest.mark.parametrize("name", FORMATS)
def test_answers_under_a_grammar_read_as_parse_assistant(tokenizers: dict[str, Tokenizer], name: str) -> None:
    """Random answers that follow the tool grammar, token by token."""
    tok, rng = tokenizers[name], random.Random(6)
    compiler = GrammarCompiler(tok, tok.vocab_size)
    grammar = tool_grammar(tok, TOOLS, "required", True)
    assert grammar is not None
    row = np.empty(compiler.num_words, np.int32)
    ranks = tok.vocabulary.ranks
    closing = [*tok.eos_token_ids, ranks[b'"'], ranks[b"}"], ranks[b"]"]]
    for lead in ["", "Let me see.\n", "\n\n你好 <tool ✿FUNC\nAction\n"] * 12:
        matcher = compiler.compile(grammar)
        pieces: list[bytes] = []
        while True:
            matcher.fill_mask(row)
            choices = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()
            if len(pieces) > 40:
                choices = [token for token in closing if token in choices][:1] or choices
            token = rng.choice(choices)
            matcher.consume(token)
            if token in tok.eos_token_ids:
                break
            pieces.append(tok.token_bytes(token))
        text = lead + b"".join(pieces).decode()
        content, calls = read(tok, [lead, *list(text[len(lead) :])], constrained=True)
        message = parse_assistant(text, name)
        assert message.tool_calls
        assert content.lstrip() == message.content
        assert [(call, json.loads(arguments)) for call, arguments in calls] == [
            (call.name, call.arguments) for call in message.tool_calls
        ]


def test_arguments_pass_on_as_they_come(tokenizers: dict[str, Tokenizer]) -> None:
    for name, opening, closing in (
        ("qwen2.5", 'Hm.\n<tool_call>\n{"name": "f", "arguments": ', "}\n</tool_call>"),
        ("qwen2", "Hm.\n✿FUNCTION✿: f\n✿ARGS✿: ", "\n✿RESULT✿"),
        ("qwen", "Thought: Hm.\nAction: f\nAction Input: ", "\nObservation:"),
    ):
        stream = ToolCallStream(tokenizers[name])
        before = stream.push(opening)
        assert joined(before) == ("" if name == "qwen" else "Hm.", [])
        first = stream.push('{"ci')
        starts = [event for event in first if isinstance(event, ToolCallStart)]
        assert [(start.index, start.name) for start in starts] == [(0, "f")]
        assert first[-1] == ToolCallArguments(0, '{"ci')
        assert stream.push('ty": "Pa}') == [ToolCallArguments(0, 'ty": "Pa}')]
        assert stream.push('ris"}' + closing) == [ToolCallArguments(0, 'ris"}')]
        assert stream.close() == []


def test_content_passes_on_at_once(tokenizers: dict[str, Tokenizer]) -> None:
    for name in ("qwen2.5", "qwen2"):
        stream = ToolCallStream(tokenizers[name])
        assert stream.push("Hello wor") == [TextDelta("Hello wor")]
        assert stream.push("ld \n") == [TextDelta("ld")]
        assert stream.push("2 < 3") == [TextDelta(" \n2 < 3")]
        assert stream.push(" <tool_" if name == "qwen2.5" else " ✿FUNC") == []
        assert joined(stream.push("x"))[0] == (" <tool_x" if name == "qwen2.5" else " ✿FUNCx")
        assert stream.push(" ") == []
        assert stream.close() == [TextDelta(" ")]
    stream = ToolCallStream(tokenizers["qwen"])
    assert stream.push("Thought: I know it.\nFinal Ans") == []
    assert stream.push("wer: 4") == [TextDelta("4")]
    assert stream.push("2\n") == [TextDelta("2")]
    assert stream.close() == []


def test_an_answer_cut_off_in_a_call(tokenizers: dict[str, Tokenizer]) -> None:
    """In the arguments, the call stays with what there is of it. Before them there is no call: the text is content."""
    text = 'Hm.\n<tool_call>\n{"name": "f", "arguments": {"a": 1'
    assert read(tokenizers["qwen2.5"], [text], constrained=True) == ("Hm.", [("f", '{"a": 1')])
    assert read(tokenizers["qwen2.5"], [text], constrained=False) == (text, [])
    for end in (4, 8, 16, 25, 35):
        assert read(tokenizers["qwen2.5"], [text[:end]], constrained=True) == (text[:end], [])


def test_malformed_calls_are_content(tokenizers: dict[str, Tokenizer]) -> None:
    for name, text in (
        ("qwen2.5", "<tool_call>\nnonsense\n</tool_call> after"),
        ("qwen2.5", '<tool_call>\n{"name": "\\x", "arguments": {}}\n</tool_call>'),
        ("qwen2.5", '<tool_call>\n{"name": "", "arguments": {}}\n</tool_call>'),
        ("qwen2.5", '<tool_call>\n{"name": "f", "arguments": [1]}\n</tool_call>'),
        ("qwen2", "✿FUNCTION✿: f\n✿ARGS✿: no JSON"),
        ("qwen", "Thought: x\nAction: f\nAction Input: no JSON\n"),
        ("qwen", "Action: talk about actions"),
    ):
        for constrained in (True, False):
            assert read(tokenizers[name], list(text), constrained=constrained) == (text, [])


def test_an_unknown_chat_format(tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="chat template"):
        ToolCallStream(Tokenizer(tiny_tokenizer.vocabulary, chat_format=None, chat_template="?"))


def test_a_zero_character_is_text_too(tokenizers: dict[str, Tokenizer]) -> None:
    text = '\0 a\0b\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    for constrained in (False, True):
        content, calls = read(tokenizers["qwen2.5"], [text], constrained=constrained)
        assert content.rstrip() == "\0 a\0b"
        assert calls == [("f", "{}")]
    assert parse_assistant(text, "qwen2.5").content == "\0 a\0b"
