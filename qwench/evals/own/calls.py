"""Function calls against BFCL's possible answers: its AST match for Python functions [BFCL].

A call is right when name, required and permitted parameters, types and values agree. Values are lists of possible
ones; "" among them allows a parameter to be left out. Strings are compared without blanks, case and , . / - _ * ^.
Peculiarities of the published checker are kept, as scores would differ otherwise; they are named where they stand.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

TYPES: dict[str, type] = {
    "string": str,
    "integer": int,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
    "any": str,
}
JSON_TYPES = {
    "integer": "integer",
    "number": "number",
    "float": "number",
    "string": "string",
    "boolean": "boolean",
    "bool": "boolean",
    "array": "array",
    "list": "array",
    "tuple": "array",
    "dict": "object",
    "object": "object",
    "any": "string",
}
"""BFCL's names of types -> JSON Schema's."""

Call = tuple[str, Mapping[str, Any]]
"""(name, arguments)."""


def standard(text: str) -> str:
    """A string as it is compared."""
    return re.sub(r"[ ,./\-_*^]", "", text).lower().replace("'", '"')


def _plain(value: Any) -> Any:
    return standard(value) if isinstance(value, str) else value


def match(functions: Sequence[Mapping[str, Any]], calls: Sequence[Call], truth: Sequence[Mapping[str, Any]]) -> str:
    """ "" where the calls are the possible answers in any order, else what is wrong.

    `functions`: BFCL's descriptions; `truth`: one {name: {parameter: [possible values]}} a call. Raises ValueError for
    answers that name a function without description.
    """
    if len(calls) != len(truth):
        return f"{len(calls)} calls were made, {len(truth)} are expected"
    left = list(calls)
    for answer in truth:
        name = next(iter(answer))
        function = next((function for function in functions if function["name"] == name), None)
        if function is None:
            raise ValueError(f"the possible answers name {name!r}, which is not described")
        reasons = [match_one(function, call, answer[name]) for call in left]
        if "" not in reasons:
            return reasons[0] if len(truth) == 1 else f"no call fits {name}: {'; '.join(reasons)}"
        left.pop(reasons.index(""))
    return ""


def match_one(function: Mapping[str, Any], call: Call, possible: Mapping[str, Sequence[Any]]) -> str:
    """ "" where one call fits its possible values, else what is wrong."""
    name, arguments = call
    if name != function["name"]:
        return f"{name} was called, not {function['name']}"
    known = function["parameters"].get("properties", {})
    for parameter in function["parameters"].get("required", []):
        if parameter not in arguments:
            return f"{parameter} is required and missing"
    for parameter, value in arguments.items():
        if parameter not in known or parameter not in possible:
            return f"{parameter} is not expected"
        if not _fits(known[parameter], value, possible[parameter]):
            return f"{parameter} is {value!r}, expected one of {possible[parameter]!r}"
    for parameter, values in possible.items():
        if parameter not in arguments and "" not in values:
            return f"{parameter} is missing and not optional"
    return ""


def _fits(about: Mapping[str, Any], value: Any, possible: Sequence[Any]) -> bool:
    declared = about["type"]
    expected = TYPES.get(declared)
    if expected is None:
        raise ValueError(f"a parameter is of type {declared!r}; BFCL's Python types are {', '.join(TYPES)}")
    inner = TYPES.get(about.get("items", {}).get("type", "")) if declared in ("array", "tuple") else None
    if declared == "float" and type(value) is int:
        value = float(value)
    fits, variable = _type_fits(value, expected, inner, possible)
    if not fits:
        return False
    if not variable:
        if expected is dict:
            return _dict_fits(value, possible)
        if expected is list and inner is dict:
            return any(
                len(value) == len(answer)
                and all(_dict_fits(item, [wanted]) for item, wanted in zip(value, answer, strict=True))
                for answer in possible
            )
        if expected is str:
            return standard(value) in [standard(answer) for answer in possible if isinstance(answer, str)]
        if expected is list:
            # An optional list, marked by "", may also be given empty: both become [].
            return [_plain(item) for item in value] in [[_plain(item) for item in answer] for answer in possible]
    return value in possible


def _type_fits(value: Any, expected: type, inner: type | None, possible: Sequence[Any]) -> tuple[bool, bool]:
    """Whether the type is right, and whether the value counts as a variable, which is compared as it is.

    A value may have the type of the first possible answer in place of the declared one. A list with items of the wrong
    type passes in this way too, and is then compared as it is. Exact types: True is no integer.
    """
    first = next((type(answer) for answer in possible if answer != ""), None)
    if type(value) is expected:
        variable = first is not None and first is not expected
        if inner is None:
            return True, variable
        for answer in possible:
            if not isinstance(answer, list) or all(_type_fits(item, inner, None, answer)[0] for item in value):
                return True, variable
    return first is not None and type(value) is first, True


def _dict_fits(value: Any, possible: Sequence[Any]) -> bool:
    """One level deep; the possible values of each key are a list again."""
    if not isinstance(value, Mapping):
        return False
    for answer in possible:
        if answer == "":
            continue
        if all(
            key in answer and _plain(item) in [_plain(wanted) for wanted in answer[key]] for key, item in value.items()
        ) and all(key in value or "" in values for key, values in answer.items()):
            return True
    return False


def as_tool(function: Mapping[str, Any]) -> dict[str, Any]:
    """BFCL's description of a function as an OpenAI tool, with JSON Schema's types and BFCL's remark."""
    parameters = _as_schema(function["parameters"])
    description = function.get("description", "") + " Note that the provided function is in Python 3 syntax."
    return {
        "type": "function",
        "function": {"name": function["name"], "description": description, "parameters": parameters},
    }


def _as_schema(about: Mapping[str, Any]) -> dict[str, Any]:
    made = {key: value for key, value in about.items() if key not in ("type", "properties", "items", "optional")}
    kind = JSON_TYPES.get(str(about.get("type", "any")), "string")
    made = {"type": kind, **made}
    if isinstance(about.get("properties"), Mapping):
        made["properties"] = {name: _as_schema(inner) for name, inner in about["properties"].items()}
    if isinstance(about.get("items"), Mapping):
        made["items"] = _as_schema(about["items"])
    return made
