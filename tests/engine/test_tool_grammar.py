"""Answers under a tool grammar: free text or calls that are well formed, known and valid, and nothing behind them."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from grammar_walk import allowed, walk

from qwench.engine.grammar import GrammarCompiler, tool_grammar
from qwench.tokenizer import Tokenizer
from qwench.tokenizer.special import TOOL_CALL, TOOL_CALL_END, control_tokens
from qwench.tokenizer.vocabulary import Vocabulary
from qwench.types import Message, ToolCall

ASSETS = Path(os.environ.get("QWENCH_ASSETS", Path.home() / ".cache" / "qwench-assets"))
RANKS = ASSETS / "qwen.tiktoken"
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["°C", "°F"]},
        "days": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 3},
    },
    "required": ["city"],
    "additionalProperties": False,
}
FORMATS = ["qwen2.5", "qwen2.5-braces", "qwen2", "qwen"]


def tool(name: str, parameters: Any = None) -> dict[str, Any]:
    function = {"name": name, "description": "d"} | ({} if parameters is None else {"parameters": parameters})
    return {"type": "function", "function": function}


TOOLS = [tool("get_weather", WEATHER), tool("now"), tool("获取", {"properties": {"x": {"type": "null"}}})]
SCHEMAS = {
    "get_weather": WEATHER,
    "now": {"type": "object", "maxProperties": 0},
    "获取": {"type": "object", "properties": {"x": {"type": "null"}}},
}
NAMED = {"type": "function", "function": {"name": "now"}}


def without_tool_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """The vocabulary with Qwen2's three control tokens: tags can only be spelled."""
    regular = tokenizer.vocabulary.tokens
    controls = control_tokens("qwen2", len(regular))
    return Tokenizer(Vocabulary(regular, tokenizer.vocabulary.merges, controls), chat_format="qwen2.5")


@pytest.fixture(scope="module", params=[*FORMATS, "spelled"])
def compiler(request: pytest.FixtureRequest, tiny_tokenizer: Tokenizer) -> GrammarCompiler:
    spelled = request.param == "spelled"
    tok = without_tool_tokens(tiny_tokenizer) if spelled else tiny_tokenizer.with_chat_format(request.param)
    return GrammarCompiler(tok, tok.vocab_size + 7)


def check_calls(message: Message, text: str) -> None:
    for call in message.tool_calls:
        jsonschema.validate(dict(call.arguments), SCHEMAS[call.name])
    assert text.count("get_weather") + text.count("now") + text.count("获取") >= len(message.tool_calls)


def check_walks(compiler: GrammarCompiler, rounds: int) -> None:
    rng, tok = random.Random(2), compiler.tokenizer
    many = 0
    for choice in ("required", NAMED):
        for parallel in (True, False):
            grammar = tool_grammar(tok, TOOLS, choice, parallel)
            assert grammar is not None
            for _ in range(rounds):
                patience = 200 if choice is NAMED else 30  # the tool without arguments leaves room for more calls
                text = walk(compiler, compiler.compile(grammar), rng, patience)
                message = tok.parse_assistant(text)
                assert message.content == "", text
                assert message.tool_calls, text
                check_calls(message, text)
                if choice is NAMED:
                    assert {call.name for call in message.tool_calls} == {"now"}
                if not parallel:
                    assert len(message.tool_calls) == 1
                many += len(message.tool_calls) > 1
    assert many or tok.chat_format == "qwen"


def test_forced_calls_are_valid(compiler: GrammarCompiler) -> None:
    check_walks(compiler, rounds=25)


@pytest.mark.real
@pytest.mark.parametrize("name", FORMATS)
def test_forced_calls_are_valid_in_the_real_vocabulary(name: str) -> None:
    if not RANKS.exists():
        pytest.skip(f"no {RANKS.name} in QWENCH_ASSETS ({ASSETS})")
    tok = Tokenizer.load(RANKS, generation="qwen2" if name == "qwen2" else "qwen2.5").with_chat_format(name)
    check_walks(GrammarCompiler(tok, 151_936), rounds=10 if name != "qwen" else 5)


def follow(compiler: GrammarCompiler, text: str, *, controls: bool, parallel: bool = True, choice: Any = "auto") -> str:
    """ "refused" or, at the end of the text, "complete" or "open"."""
    grammar = tool_grammar(compiler.tokenizer, TOOLS, choice, parallel)
    assert grammar is not None
    matcher = compiler.compile(grammar)
    for token in compiler.tokenizer.encode(text, parse_special=controls):
        try:
            matcher.consume(token)
        except ValueError:
            assert not matcher.error
            return "refused"
    return "complete" if matcher.is_complete else "open"


def written(compiler: GrammarCompiler, calls: list[ToolCall], content: str = "") -> str:
    """The assistant's turn as the chat format renders it."""
    tok = compiler.tokenizer
    user = Message(role="user", content="?")
    turn = Message(role="assistant", content=content, tool_calls=tuple(calls))
    prompt, whole = tok.render([user], None, True), tok.render([user, turn], None, False)
    return tok.decode(whole[len(prompt) : whole.index(tok.im_end_id, len(prompt))])


def test_what_the_chat_format_writes_is_accepted(compiler: GrammarCompiler) -> None:
    one = ToolCall(name="get_weather", arguments={"city": 'Aï "x" }', "days": [1, 2]})
    two = ToolCall(name="now", arguments={})
    assert follow(compiler, written(compiler, [one], "Let me see."), controls=True) == "complete"
    assert follow(compiler, written(compiler, [one]), controls=True) == "complete"
    assert follow(compiler, written(compiler, [], "No call, 你好.\n"), controls=True) == "complete"
    if compiler.tokenizer.chat_format != "qwen":  # ReAct makes one call and waits
        both = written(compiler, [one, two], "Both.")
        assert follow(compiler, both, controls=True) == "complete"
        assert follow(compiler, both, controls=True, parallel=False) == "refused"
        assert follow(compiler, both + "\nmore", controls=True) == "refused"
    forced = written(compiler, [two])
    if compiler.tokenizer.chat_format == "qwen":
        forced = forced.removeprefix("Thought:\n")
    assert follow(compiler, forced, controls=True, choice="required") == "complete"
    assert follow(compiler, forced, controls=True, choice=NAMED) == "complete"
    assert follow(compiler, "text", controls=True, choice="required") == "refused"
    assert (
        follow(compiler, written(compiler, [one]).removeprefix("Thought:\n"), controls=True, choice=NAMED) == "refused"
    )


def test_bad_calls_are_refused_where_they_go_wrong(compiler: GrammarCompiler) -> None:
    good = written(compiler, [ToolCall(name="get_weather", arguments={"city": "x"})], "Hm.")
    for old, new in (
        ("get_weather", "get_rain"),
        ('"city"', '"town"'),
        ('{"city": "x"}', "{}"),
        ('{"city": "x"}', '{"city": 1}'),
        ('{"city": "x"}', '{"city": "x", "unit": "K"}'),
        ('{"city": "x"}', "[]"),
        ('{"city": "x"}', '{"city": "x"'),
    ):
        assert old in good
        assert follow(compiler, good.replace(old, new), controls=True) in ("refused", "open")
        assert follow(compiler, good.replace(old, new), controls=True) != "complete"
    assert follow(compiler, good, controls=True) == "complete"


def test_a_spelled_opening_is_held_to_the_same(tiny_tokenizer: Tokenizer) -> None:
    """Readers of the text cannot tell it from the token, so it opens a call too; the closing tag is then the token."""
    compiler = GrammarCompiler(tiny_tokenizer, tiny_tokenizer.vocab_size)
    assert follow(compiler, "a <tool_call>", controls=False) == "open"
    assert follow(compiler, "a <tool_call> is a tag", controls=False) == "refused"
    assert follow(compiler, 'a <tool_call>\n{"name": "now', controls=False) == "open"
    assert follow(compiler, "a <tool_calls> is a tag, and <tool_call", controls=False) == "complete"
    matcher = compiler.compile(tool_grammar(tiny_tokenizer, TOOLS, "auto", True))  # pyright: ignore[reportArgumentType]
    for token in tiny_tokenizer.encode('<tool_call>\n{"name": "now", "arguments": {}}\n'):
        matcher.consume(token)
    assert allowed(matcher) == [tiny_tokenizer.special_ids[TOOL_CALL_END]]
    assert TOOL_CALL not in without_tool_tokens(tiny_tokenizer).special_ids


def test_marks_of_results_may_end_an_answer(tiny_tokenizer: Tokenizer) -> None:
    """Qwen and Qwen2 write them by themselves where the program's part begins."""
    for name, mark in (("qwen2", "\n✿RESULT✿"), ("qwen", "\nObservation:")):
        tok = tiny_tokenizer.with_chat_format(name)
        compiler = GrammarCompiler(tok, tok.vocab_size)
        call = written(compiler, [ToolCall(name="now", arguments={})])
        assert follow(compiler, call + mark, controls=True) == "complete"
        assert follow(compiler, call + mark + " ", controls=True) == "refused"


def test_react_calls_begin_a_line(tiny_tokenizer: Tokenizer) -> None:
    tok = tiny_tokenizer.with_chat_format("qwen")
    compiler = GrammarCompiler(tok, tok.vocab_size)
    assert follow(compiler, "Action: now\nAction Input: {}", controls=True) == "complete"
    assert follow(compiler, " I see.\n  Action: now\nAction Input: {}", controls=True) == "complete"
    assert follow(compiler, "In Action: films", controls=True) == "complete"
    assert follow(compiler, "So\nAction: films", controls=True) == "refused"


def test_no_grammar_without_calls(tiny_tokenizer: Tokenizer) -> None:
    assert tool_grammar(tiny_tokenizer, TOOLS, "none", True) is None
    assert tool_grammar(tiny_tokenizer, [], "auto", True) is None
    assert tool_grammar(tiny_tokenizer, None, "none", True) is None


@pytest.mark.parametrize(
    ("tools", "choice", "match"),
    [
        ([tool("f", {"type": "object", "properties": {"a": {"not": {}}}})], "auto", "tool 'f' cannot be constrained"),
        ([tool("ok"), tool("f", {"$ref": "#/nowhere"})], "auto", "tool 'f'"),
        ([tool("f", {"type": "string"})], "auto", "tool 'f' have type 'string'"),
        ([tool("f", "string")], "auto", "tool 'f' are no JSON schema"),
        ([tool("f", {"properties": {"a": {"multipleOf": 999983}}})], "auto", "tool 'f' cannot.*multipleOf"),
        ([tool('f"')], "auto", "tool name"),
        ([tool("f\n")], "auto", "tool name"),
        ([tool("")], "auto", "tool name"),
        ([tool("f"), tool("f")], "auto", "two tools"),
        ([tool("f")], "always", 'give "none"'),
        ([tool("f")], {"type": "function", "function": {"name": "g"}}, "not among the tools"),
        ([tool("f")], {"type": "function"}, "tool_choice as an object"),
        ([], "required", "no tools"),
        ([{"name": "f"}], "auto", r"tools\[0\]"),
    ],
)
def test_what_cannot_be_constrained_is_named(tiny_tokenizer: Tokenizer, tools: Any, choice: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        tool_grammar(tiny_tokenizer, tools, choice, True)


def test_an_unknown_chat_format_has_no_tools(tiny_tokenizer: Tokenizer) -> None:
    tok = Tokenizer(tiny_tokenizer.vocabulary, chat_format=None, chat_template="?")
    with pytest.raises(ValueError, match="chat template"):
        tool_grammar(tok, TOOLS, "auto", True)


def test_many_tools_with_references(compiler: GrammarCompiler) -> None:
    """References are each tool's own, and a hundred tools are no matter."""
    tools = [
        tool(f"tool_{i}", {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "required": ["a"],
                           "$defs": {"a": {"const": i}}})
        for i in range(100)
    ]  # fmt: skip
    grammar = tool_grammar(compiler.tokenizer, tools, "required", False)
    assert grammar is not None
    rng = random.Random(5)
    for _ in range(10):
        message = compiler.tokenizer.parse_assistant(walk(compiler, compiler.compile(grammar), rng))
        (call,) = message.tool_calls
        assert re.fullmatch(r"tool_\d+", call.name)
        assert json.loads(call.name.removeprefix("tool_")) == call.arguments["a"]
