"""Function calls, tool selection, JSON schemas, tables, infilling and CRUXEval: right answers score 1, wrong ones 0."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import jsonschema
import pytest

from qwench.evals import context
from qwench.evals.local_files import Files, MissingDataError
from qwench.evals.own import bfcl, calls, cruxeval, fim, schemas, tables, tool_choice
from qwench.evals.own_data import OWN_LAYOUTS
from qwench.tokenizer import Tokenizer
from qwench.tools.sandbox import SandboxUnavailable

WEATHER = {
    "name": "weather.get",
    "description": "Tells the weather.",
    "parameters": {
        "type": "dict",
        "properties": {
            "city": {"type": "string", "description": "Where."},
            "days": {"type": "integer", "description": "How long."},
            "limit": {"type": "float", "description": "Top."},
            "tags": {"type": "array", "items": {"type": "string"}, "description": "Words."},
            "place": {"type": "dict", "properties": {"lat": {"type": "float"}}, "description": "Where."},
            "steps": {"type": "array", "items": {"type": "dict"}, "description": "Steps."},
            "fast": {"type": "boolean", "description": "Or not."},
        },
        "required": ["city"],
    },
}
POSSIBLE: dict[str, list[Any]] = {
    "city": ["New York", "NYC"],
    "days": [3, ""],
    "limit": [5, ""],
    "tags": [["rain", "snow"], ""],
    "place": [{"lat": [1.5], "name": ["A-b", ""]}, ""],
    "steps": [[{"n": [1]}, {"n": [2, 3]}], ""],
    "fast": [True, ""],
}


@pytest.fixture
def running(tiny_tokenizer: Tokenizer, tmp_path: Path) -> Iterator[context.TaskContext]:
    made = context.TaskContext(tokenizer=tiny_tokenizer, max_len=4096, data_dirs=(tmp_path,), workers=1)
    with context.using(made):
        yield made


def write(path: Path, *rows: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


class TestMatch:
    @pytest.mark.parametrize(
        "arguments",
        [
            {"city": "New York"},
            {"city": "new-york."},  # blanks, case and some marks do not count
            {"city": "nyc", "days": 3, "limit": 5, "fast": True},
            {"city": "NYC", "limit": 5.0},
            {"city": "NYC", "tags": ["Rain", "snow"]},
            {"city": "NYC", "tags": []},  # an optional list may be empty
            {"city": "NYC", "place": {"lat": 1.5}},
            {"city": "NYC", "place": {"lat": 1.5, "name": "a b"}},
            {"city": "NYC", "steps": [{"n": 1}, {"n": 3}]},
        ],
    )
    def test_right_calls(self, arguments: dict) -> None:
        assert calls.match_one(WEATHER, ("weather.get", arguments), POSSIBLE) == ""

    @pytest.mark.parametrize(
        ("arguments", "why"),
        [
            ({}, "city is required and missing"),
            ({"city": "Boston"}, "city is 'Boston'"),
            ({"city": "NYC", "colour": "red"}, "colour is not expected"),
            ({"city": "NYC", "days": "3"}, "days is '3'"),
            ({"city": "NYC", "days": 3.0}, "days is 3.0"),
            ({"city": "NYC", "days": True}, "days is True"),
            ({"city": "NYC", "days": 4}, "days is 4"),
            ({"city": "NYC", "tags": ["snow", "rain"]}, "tags is"),
            ({"city": "NYC", "tags": "rain"}, "tags is"),
            ({"city": "NYC", "place": {"name": "a b"}}, "place is"),
            ({"city": "NYC", "place": {"lat": 1.5, "lon": 2}}, "place is"),
            ({"city": "NYC", "steps": [{"n": 1}]}, "steps is"),
            ({"city": "NYC", "fast": "true"}, "fast is 'true'"),
        ],
    )
    def test_wrong_calls(self, arguments: dict, why: str) -> None:
        assert why in calls.match_one(WEATHER, ("weather.get", arguments), POSSIBLE)

    def test_names_must_be_exact_and_all_values_given(self) -> None:
        assert "weather_get was called" in calls.match_one(WEATHER, ("weather_get", {"city": "NYC"}), POSSIBLE)
        needed = {"city": ["NYC"], "days": [3]}
        assert calls.match_one(WEATHER, ("weather.get", {"city": "NYC"}), needed) == "days is missing and not optional"

    def test_parallel_calls_match_in_any_order_and_once(self) -> None:
        truth = [{"weather.get": {"city": ["A"]}}, {"weather.get": {"city": ["B"]}}]
        one, other = ("weather.get", {"city": "A"}), ("weather.get", {"city": "B"})
        assert calls.match([WEATHER], [other, one], truth) == ""
        assert "no call fits" in calls.match([WEATHER], [one, one], truth)
        assert calls.match([WEATHER], [one], truth) == "1 calls were made, 2 are expected"
        with pytest.raises(ValueError, match="not described"):
            calls.match([], [one], truth[:1])

    def test_a_list_with_items_of_another_type_is_compared_as_it_is(self) -> None:
        """As the published checker does, which takes it for a variable."""
        assert (
            calls.match_one(WEATHER, ("weather.get", {"city": "NYC", "tags": [1]}), {"city": ["NYC"], "tags": [[1]]})
            == ""
        )

    def test_tools_have_json_types(self) -> None:
        tool = calls.as_tool(WEATHER)["function"]
        assert tool["parameters"]["type"] == "object"
        assert tool["parameters"]["properties"]["limit"]["type"] == "number"
        assert tool["parameters"]["properties"]["place"]["properties"]["lat"] == {"type": "number"}
        assert tool["name"] == "weather.get"
        assert tool["description"].endswith("in Python 3 syntax.")


class TestBfcl:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        question = [[{"role": "user", "content": "Weather in NYC?"}]]
        row = {"id": "simple_python_0", "question": question, "function": [WEATHER]}
        write(tmp_path / "bfcl" / "BFCL_v4_simple_python.json", row)
        write(tmp_path / "bfcl" / "BFCL_v4_irrelevance.json", row)
        answer = {"id": "simple_python_0", "ground_truth": [{"weather.get": POSSIBLE}]}
        write(tmp_path / "bfcl" / "possible_answer" / "BFCL_v4_simple_python.json", answer)
        return tmp_path / "bfcl"

    def test_answers_are_parsed_and_matched(self, running: context.TaskContext, folder: Path) -> None:
        simple = OWN_LAYOUTS["qwench/bfcl"](Files(running.data_dirs), "simple")["test"]
        none = OWN_LAYOUTS["qwench/bfcl"](Files(running.data_dirs), "irrelevance")["test"]
        right = '<tool_call>\n{"name": "weather.get", "arguments": {"city": "NYC"}}\n</tool_call>'
        said = [[right, "It is sunny.", right.replace("NYC", "Rome")]]
        assert [answer["wrong"] == "" for answer in bfcl.check(said, simple)[0]] == [True, False, False]
        assert [answer["wrong"] == "" for answer in bfcl.check(said, none)[0]] == [False, True, False]
        assert bfcl.score(simple[0], bfcl.check([[right]], simple)) == {"acc": 1.0, "acc_lenient": 1.0}
        assert bfcl.score(simple[0], bfcl.check([["?"]], simple)) == {"acc": 0.0, "acc_lenient": 0.0}
        fenced = '```json\n{"name": "weather.get", "arguments": {"city": "NYC"}}\n```'
        assert bfcl.score(simple[0], bfcl.check([[fenced]], simple)) == {"acc": 0.0, "acc_lenient": 1.0}
        assert bfcl.score(none[0], bfcl.check([[fenced]], none)) == {"acc": 1.0, "acc_lenient": 0.0}
        prompt = bfcl.question(simple[0])
        assert "weather.get" in prompt
        assert prompt.endswith("<|im_start|>assistant\n")

    def test_bare_json_is_read_leniently(self, running: context.TaskContext) -> None:
        one, other = ("f", {"a": [1]}), ("g", {})
        both = '{"name": "f", "arguments": {"a": [1]}} and [{"name": "g", "arguments": {}}]'
        assert bfcl.read_lenient(f"[see] {{x}} {both}") == [one, other]
        for text in ('{"name": "f"}', "[1, {2}]", "", '{"name": 1, "arguments": {}}', "{" * 3000):
            assert bfcl.read_lenient(text) == []

    def test_broken_files_are_named(self, running: context.TaskContext, folder: Path) -> None:
        write(folder / "possible_answer" / "BFCL_v4_simple_python.json", {"id": "other", "ground_truth": []})
        with pytest.raises(ValueError, match=r"row 1 \(simple_python_0\) has no possible answer"):
            OWN_LAYOUTS["qwench/bfcl"](Files(running.data_dirs), "simple")
        (folder / "possible_answer" / "BFCL_v4_simple_python.json").unlink()
        with pytest.raises(MissingDataError, match="possible_answer"):
            OWN_LAYOUTS["qwench/bfcl"](Files(running.data_dirs), "simple")
        write(folder / "BFCL_v4_irrelevance.json", {"id": "x", "question": [[], []], "function": []})
        with pytest.raises(ValueError, match="has 2 turns"):
            OWN_LAYOUTS["qwench/bfcl"](Files(running.data_dirs), "irrelevance")


class TestToolChoice:
    DOC: ClassVar = {"query": "?", "tools": "[]", "action": "getFacts", "arguments": '{"limit": 3, "kind": "a"}'}

    def test_react_answers(self, running: context.TaskContext) -> None:
        right = 'Thought: facts.\nAction: getfacts \nAction Input: {"kind": "a", "limit": 3}'
        assert tool_choice.score_react(self.DOC, [right]) == {"tool_selection": 1.0, "tool_input": 1.0}
        assert tool_choice.score_react(self.DOC, [right.removeprefix("Thought: facts.\n")])["tool_selection"] == 1
        other = tool_choice.score_react(self.DOC, [right.replace("getfacts", "search").replace("3", "7")])
        assert other["tool_selection"] == 0
        assert 0 < other["tool_input"] < 1
        assert tool_choice.score_react(self.DOC, ["I do not know."]) == {"tool_selection": 0.0, "tool_input": 0.0}
        assert tool_choice.read_react("\nAction: a\nAction Input: {}\nObservation: {}\nAction: b") == ("a", "{}")

    def test_native_answers(self, running: context.TaskContext) -> None:
        right = '<tool_call>{"name": "getFacts", "arguments": {"kind": "a", "limit": 3}}</tool_call>'
        assert tool_choice.score_native(self.DOC, [right]) == {"tool_selection": 1.0, "tool_input": 1.0}
        bare = right.removeprefix("<tool_call>").removesuffix("</tool_call>")
        assert tool_choice.score_native(self.DOC, [f"```json\n{bare}\n```"])["tool_selection"] == 1
        assert tool_choice.score_native({**self.DOC, "action": ""}, [right]) == {"false_positive": 1.0}
        assert tool_choice.score_native({**self.DOC, "action": ""}, ["None fits."]) == {"false_positive": 0.0}

    def test_rouge_l(self) -> None:
        assert tool_choice.rouge_l([1, 2, 3], [1, 2, 3]) == 1
        assert tool_choice.rouge_l([], []) == 1
        assert tool_choice.rouge_l([1, 9, 2, 3], [1, 2, 4]) == pytest.approx(2 * 2 / 7)
        assert tool_choice.rouge_l([], [1]) == 0 == tool_choice.rouge_l([2], [1])

    def test_arguments_are_normalised(self) -> None:
        assert tool_choice.normal("```json\n{'b': 1, 'a': True,}\n```") == '{"a": true, "b": 1}'
        assert tool_choice.normal("{broken") == "{broken"

    def test_own_form_is_read_and_checked(self, running: context.TaskContext, tmp_path: Path) -> None:
        tool = {"type": "function", "function": {"name": "getFacts", "parameters": {"type": "object"}}}
        rows = [{"query": "q", "tools": [tool], "action": name, "arguments": {"a": 1}} for name in ("getFacts", None)]
        write(tmp_path / "tool_selection.jsonl", *rows)
        found = OWN_LAYOUTS["qwench/tool_selection"](Files(running.data_dirs), None)["test"]
        assert [row["action"] for row in found] == ["getFacts", ""]
        assert found[0]["arguments"] == '{"a": 1}'
        assert "Action: the action to take, should be one of [getFacts]" in tool_choice.ask_react(found[0])
        assert '"getFacts"' in tool_choice.ask_native(found[0])
        write(tmp_path / "tool_selection.jsonl", {"query": "q", "tools": [tool], "action": "x"})
        with pytest.raises(ValueError, match="row 1: action 'x' is none of its tools"):
            OWN_LAYOUTS["qwench/tool_selection"](Files(running.data_dirs), None)

    def test_toolalpaca_gives_positive_and_negative_questions(
        self, running: context.TaskContext, tmp_path: Path
    ) -> None:
        def api(name: str, count: int) -> dict:
            about = 'Does it.\nParameters: {"id": "Required. integer. Which.", "note": "string. Text."}\nOutput: ok'
            functions = [f"{name}{n}" for n in range(count)]
            return {
                "Name": name,
                "Function_Description": dict.fromkeys(functions, about),
                "Function_Projection": {function: ["/", "get"] for function in functions},
                "Instructions": ["one", "two"],
                "Golden_Answers": [[{"Action": f"{name}0", "Action_Input": '{"id": 1}'}], [{}, {}]],
            }

        (tmp_path / "toolalpaca").mkdir()
        path = tmp_path / "toolalpaca" / "eval_real.json"
        path.write_text(json.dumps([api("a", 7), api("b", 2)]), encoding="utf-8")
        found = OWN_LAYOUTS["qwench/tool_selection"](Files(running.data_dirs), None)["test"]
        assert [row["action"] for row in found] == ["a0", "", "b0", ""]
        names = [[tool["function"]["name"] for tool in json.loads(row["tools"])] for row in found]
        assert len(names[0]) == 5
        assert "a0" in names[0]
        assert set(names[1]) == {"b0", "b1"}
        assert len(names[3]) == 5
        parameters = json.loads(found[0]["tools"])[0]["function"]["parameters"]
        assert parameters["required"] == ["id"]
        assert parameters["properties"]["id"] == {"type": "integer", "description": "Which."}


class TestSchemas:
    def test_the_validator_agrees_with_jsonschema(self, running: context.TaskContext) -> None:
        """On values that obey, and on the same with one part changed."""
        seen = set[bool]()
        for text in schemas.docs(samples=60)["test"]["schema"]:
            schema = json.loads(text)
            value = example(schema)
            assert schemas.violation(value, schema) == ""
            for name in (*value, "zzz"):
                for item in (None, "", "x" * 100, -1, 10**6, 2.5, True, [], ["a"] * 9, {}, [1, "a"]):
                    changed = {**value, name: item}
                    valid = jsonschema.Draft202012Validator(schema).is_valid(changed)
                    assert (schemas.violation(changed, schema) == "") == valid, (schema, changed)
                    seen.add(valid)
        assert seen == {True, False}

    def test_scores(self, running: context.TaskContext) -> None:
        docs = schemas.docs(samples=5)["test"]
        assert len(docs) == 5
        assert docs["schema"] == schemas.docs(samples=5)["test"]["schema"]
        right = json.dumps(example(json.loads(docs[0]["schema"])))
        both, half, none = ({"valid_json": a, "obeys_schema": b} for a, b in ((1.0, 1.0), (1.0, 0.0), (0.0, 0.0)))
        assert schemas.score(docs[0], [right]) == both == schemas.score(docs[0], [f"```json\n{right}\n```\n"])
        assert schemas.score(docs[0], ["{}"]) == half == schemas.score(docs[0], ["[1]"])
        for text in ("", "Here it is: " + right, right[:-1], '{"a": NaN}', "[" * 100_000):
            assert schemas.score(docs[0], [text]) == none


def example(schema: dict[str, Any]) -> Any:
    """A value that obeys."""
    if "enum" in schema:
        return schema["enum"][0]
    if schema["type"] == "object":
        return {name: example(inner) for name, inner in schema["properties"].items() if name in schema["required"]}
    if schema["type"] == "array":
        return [example(schema["items"])] * schema["minItems"]
    return {"string": "word", "boolean": False}.get(schema["type"], schema.get("minimum", 0))


class TestTables:
    @pytest.mark.parametrize("language", ["en", "zh"])
    def test_answers_follow_from_the_table(self, running: context.TaskContext, language: str) -> None:
        docs = getattr(tables, f"docs_{language}")(samples=60)["test"]
        assert set(docs["kind"]) == set(tables.KINDS)
        assert set(docs["format"]) == set(tables.FORMATS)
        for doc in docs:
            assert tables.score(doc, [f" {doc['answer']}"])["acc"] == 1
            assert tables.score(doc, ["I cannot say"])["acc"] == 0
            if doc["format"] == "csv":
                assert solve(doc, language) == doc["answer"]

    def test_answers_are_read_with_sense(self, running: context.TaskContext) -> None:
        doc = {"kind": "sum", "format": "csv", "answer": "1204", "names": ["Anna", "Boris"]}
        for text in ("1,204", " 1204.0 kg", "The answer is 1204.", "\n1204\nBecause 1000 + 204 is that."):
            assert tables.score(doc, [text]) == {"acc": 1.0, "acc_sum": 1.0, "acc_csv": 1.0}
        for text in ("1000 + 204 = 1204", "", "1205"):
            assert tables.score(doc, [text])["acc"] == 0
        who = {**doc, "kind": "max", "answer": "Anna"}
        assert tables.score(who, ["Anna."])["acc"] == 1
        assert tables.score(who, ["Anna or Boris"])["acc"] == 0 == tables.score(who, ["Annabel"])["acc"]


def solve(doc: dict, language: str) -> str:
    """The answer from the prompt's own CSV, for look-ups, maxima and counts."""
    prompt = doc["question"]
    head, *rows = [line.split(",") for line in prompt.split("\n\n")[1].split("\n")]
    ask = prompt.split("\n\n")[2]
    columns = [place for place, name in enumerate(head) if place > 1 and (name in ask)]
    if doc["kind"] == "lookup":
        return next(row[columns[0]] for row in rows if row[0] in ask)
    if doc["kind"] == "max":
        return max(rows, key=lambda row: int(row[columns[0]]))[0]
    if doc["kind"] == "count":
        return str(sum(row[1] in ask for row in rows))
    return doc["answer"]


class TestFim:
    DOC: ClassVar = {
        "prompt": "def f(a):\n",
        "suffix": "\n    return b\n",
        "canonical_solution": "    b = a",
        "language": "py",
    }

    def test_the_prompt_is_made_of_control_tokens(
        self, running: context.TaskContext, tiny_tokenizer: Tokenizer
    ) -> None:
        prompt = fim.question(self.DOC)
        assert prompt == "<|fim_prefix|>def f(a):\n<|fim_suffix|>\n    return b\n<|fim_middle|>"
        ids = tiny_tokenizer.encode(prompt, parse_special=True)
        assert ids[0] == tiny_tokenizer.special_ids["<|fim_prefix|>"]
        assert ids[-1] == tiny_tokenizer.special_ids["<|fim_middle|>"]

    def test_long_sides_are_cut_away_from_the_gap(self, running: context.TaskContext) -> None:
        numbers = "".join(f"{n},\n" for n in range(3000))
        prompt = fim.question({**self.DOC, "prompt": numbers, "suffix": numbers})
        left, right = prompt.removeprefix(fim.PREFIX).removesuffix(fim.MIDDLE).split(fim.SUFFIX)
        assert left.endswith("2999,\n")
        assert right.startswith("0,\n1,")
        count = running.tokenizer.encode
        assert len(count(left)) <= 1472
        assert len(count(right)) <= 512
        assert len(count(left)) > 1400

    def test_the_first_line_that_is_not_empty_counts(self, running: context.TaskContext) -> None:
        for text in ("    b = a", "\n \n  b = a\n    return", "b = a  \nx"):
            assert fim.score(self.DOC, [text]) == {"exact_match": 1.0, "exact_match_py": 1.0}
        for text in ("", "b = b", "b  = a", "return b\nb = a"):
            assert fim.score(self.DOC, [text])["exact_match"] == 0

    def test_a_vocabulary_without_the_tokens_is_refused(self, tiny_tokenizer: Tokenizer) -> None:
        from qwench.tokenizer import train

        old = train(["plain text to learn from"], 259, generation="qwen2")
        with (
            context.using(context.TaskContext(tokenizer=old, max_len=100)),
            pytest.raises(ValueError, match=r"lacks <\|fim_"),
        ):
            fim.question(self.DOC)

    def test_broken_rows_are_named(self, running: context.TaskContext, tmp_path: Path) -> None:
        write(tmp_path / "fim.jsonl", {**self.DOC, "name": "a", "language": "rust"})
        with pytest.raises(ValueError, match="row 1: the language is 'rust'"):
            OWN_LAYOUTS["qwench/fim"](Files(running.data_dirs), None)
        write(tmp_path / "fim.jsonl", self.DOC)
        with pytest.raises(ValueError, match="line 1 has no field 'name'"):
            OWN_LAYOUTS["qwench/fim"](Files(running.data_dirs), None)


class TestCruxeval:
    DOC: ClassVar = {"id": "s0", "code": "def f(a, b):\n    return {a: b}", "input": "'x', 2", "output": "{'x': 2}"}

    def test_prompts_hold_code_with_braces(self) -> None:
        assert cruxeval.ask_output(self.DOC).endswith("return {a: b}\nassert f('x', 2) == ??\n[/PYTHON]\n[ANSWER]\n")
        assert cruxeval.ask_input(self.DOC).endswith("assert f(??) == {'x': 2}\n[/PYTHON]\n[ANSWER]\n")
        tricky = {**self.DOC, "code": "def f(x):\n    return '{input}'"}
        assert "return '{input}'" in cruxeval.ask_output_cot(tricky)
        assert "[THOUGHT]\n" in cruxeval.ask_input_cot(tricky)

    def test_answers_are_read_as_the_benchmark_does(self) -> None:
        assert cruxeval.read_output("assert f('x', 2) == {'x': 2}") == "{'x': 2}"
        assert cruxeval.read_output("[ANSWER]\nassert f(1) == 3\n[/ANSWER] more == 4") == "3"
        assert cruxeval.read_output("```python\nassert f(1) == 3\n```") == "3"
        assert cruxeval.read_output("5") == "5"
        assert cruxeval.read_input("so 1 == 1\n[ANSWER]assert f(1) == 3") == "f(1)"

    def test_answers_are_run_in_the_sandbox(self, running: context.TaskContext) -> None:
        outputs = [["assert f('x', 2) == {'x': 2}", "{'x': 3}", "f('x', 2)", "", "(", "exit(0)", "{'x': 1 + 1}"]]
        inputs = [["assert f('x', 2) == {'x': 2}", "f('y', 2)", "'x', 2", "f(", "f('x', b=2)"]]
        try:
            told = [answer["passed"] for answer in cruxeval.run_outputs(outputs, [self.DOC])[0]]
        except SandboxUnavailable as error:
            pytest.skip(str(error))
        assert told == [True, False, False, False, False, False, True]
        graded = cruxeval.run_inputs(inputs, [self.DOC])
        assert [answer["passed"] for answer in graded[0]] == [True, False, False, False, True]
        assert graded[0][2]["detail"] == "the answer does not call f"
        assert cruxeval.score(self.DOC, graded) == {"pass@1": 0.4}

    def test_broken_rows_are_named(self, running: context.TaskContext, tmp_path: Path) -> None:
        write(tmp_path / "cruxeval.jsonl", {**self.DOC, "code": "x = 1"})
        with pytest.raises(ValueError, match="row 1: the code defines no function f"):
            OWN_LAYOUTS["qwench/cruxeval"](Files(running.data_dirs), None)
