"""Layouts of the local files that tasks of our own read; see `local_data`.

CRUXEval, HumanEval's infilling, BFCL and ToolAlpaca in their authors' files, and tool selection in a form of ours.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

from qwench.evals.local_files import Files

Rows = list[dict[str, Any]]
LANGUAGES = {"py": "py", "python": "py", "java": "java", "js": "js", "javascript": "js"}


def cruxeval(files: Files, name: str | None) -> Mapping[str, Rows]:
    need = ("code", "input", "output", "id")
    rows = files.jsonl("cruxeval*.jsonl", "cruxeval/*.jsonl", need=need)
    path = list(files.read)[-1]
    for number, row in enumerate(rows, 1):
        if "def f(" not in row["code"]:
            raise ValueError(f"{path} row {number}: the code defines no function f")
    return {"test": [{key: str(row[key]) for key in need} for row in rows]}


def fim(files: Files, name: str | None) -> Mapping[str, Rows]:
    need = ("name", "language", "prompt", "suffix", "canonical_solution")
    rows = files.jsonl("fim*.jsonl", "humaneval_fim*.jsonl", "fim/*.jsonl", need=need)
    path = list(files.read)[-1]
    made: Rows = []
    for number, row in enumerate(rows, 1):
        if row["language"] not in LANGUAGES:
            raise ValueError(f"{path} row {number}: the language is {row['language']!r}; it should be py, java or js")
        if not row["canonical_solution"].strip():
            raise ValueError(f"{path} row {number}: the missing line is empty")
        made.append({**{key: row[key] for key in need}, "language": LANGUAGES[row["language"]]})
    return {"test": made}


# ---------------------------------------------------------------------------------------------------------- BFCL
def bfcl(files: Files, name: str | None) -> Mapping[str, Rows]:
    """`name`: simple, parallel or irrelevance. Answers stand in a file of the same name in possible_answer/."""
    part = {"simple": "simple_python"}.get(name or "", name or "")
    patterns = [f"{at}BFCL_v*_{form}.json" for form in (part, name) for at in ("bfcl/", "", "data/")]
    rows = files.jsonl(*patterns, need=("id", "question", "function"))
    path = list(files.read)[-1]
    answers: dict[str, Any] = {}
    if name != "irrelevance":
        folder = path.parent.name
        found = files.jsonl(
            f"{folder}/possible_answer/{path.name}", f"possible_answer/{path.name}", need=("id", "ground_truth")
        )
        answers = {row["id"]: row["ground_truth"] for row in found}
    made: Rows = []
    for number, row in enumerate(rows, 1):
        where = f"{path} row {number} ({row['id']})"
        if len(row["question"]) != 1:
            raise ValueError(f"{where} has {len(row['question'])} turns; this part of BFCL has one")
        for function in row["function"]:
            if not isinstance(function, dict) or not {"name", "parameters"} <= function.keys():
                raise ValueError(f"{where}: a function lacks its name or parameters")
        if name != "irrelevance" and row["id"] not in answers:
            raise ValueError(f"{where} has no possible answer; the two files should be of one version")
        made.append(
            {
                "id": row["id"],
                "messages": json.dumps(row["question"][0], ensure_ascii=False),
                "functions": json.dumps(row["function"], ensure_ascii=False),
                "truth": json.dumps(answers.get(row["id"]), ensure_ascii=False),
            }
        )
    return {"test": made}


# ------------------------------------------------------------------------------------------------- tool selection
def tool_selection(files: Files, name: str | None) -> Mapping[str, Rows]:
    """Our own JSONL (query, tools in OpenAI's form, action or null, arguments), else ToolAlpaca's evaluation files."""
    if files.search("tool_selection*.jsonl"):
        rows = files.jsonl("tool_selection*.jsonl", need=("query", "tools", "action"), may_be_null=("action",))
        return {"test": [_own_row(row, f"{list(files.read)[-1]} row {n}") for n, row in enumerate(rows, 1)]}
    found = files.search("toolalpaca/eval_*.json", "eval_simulated.json", "eval_real.json")
    if not found:
        files.find("tool_selection*.jsonl", "toolalpaca/eval_*.json")
    made: Rows = []
    for path in found:
        need = ("Name", "Function_Description", "Function_Projection", "Instructions", "Golden_Answers")
        apis = files.json(f"{path.parent.name}/{path.name}", path.name, need=need)
        made += _toolalpaca(apis, path)
    return {"test": made}


def _own_row(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    names = [tool.get("function", {}).get("name") for tool in row["tools"] if isinstance(tool, dict)]
    if not names or len(names) != len(row["tools"]) or None in names:
        raise ValueError(f'{where}: tools should be a list of {{"type": "function", "function": {{"name": ...}}}}')
    if row["action"] and row["action"] not in names:
        raise ValueError(
            f"{where}: action {row['action']!r} is none of its tools ({', '.join(names)}); null means that none fits"
        )
    arguments = row.get("arguments") or {}
    return {
        "query": row["query"],
        "tools": json.dumps(row["tools"], ensure_ascii=False),
        "action": row["action"] or "",
        "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False),
    }


def _toolalpaca(apis: Rows, path: Path) -> Rows:
    """Questions whose answer is one call, each asked twice: among tools of its API, and among those of another, where
    none fits. Candidates are five at most."""
    tools = [[_alpaca_tool(api, name) for name in api["Function_Projection"]] for api in apis]
    several = [place for place, own in enumerate(tools) if len(own) > 1]
    made: Rows = []
    for place, api in enumerate(apis):
        if len(api["Instructions"]) != len(api["Golden_Answers"]):
            raise ValueError(
                f"{path} item {place + 1} has {len(api['Instructions'])} questions and {len(api['Golden_Answers'])} "
                "answers"
            )
        others = [other for other in several if other != place]
        foreign = tools[others[(place + len(others) // 2) % len(others)]] if others else []
        for number, (query, steps) in enumerate(zip(api["Instructions"], api["Golden_Answers"], strict=True)):
            names = [tool["function"]["name"] for tool in tools[place]]
            if len(steps) != 1 or steps[0].get("Action") not in names:
                continue
            rng = Random(1000 * place + number)
            right = tools[place][names.index(steps[0]["Action"])]
            rest = [tool for tool in tools[place] if tool is not right]
            chosen = [right, *rng.sample(rest, min(4, len(rest)))]
            rng.shuffle(chosen)
            positive = {"action": steps[0]["Action"], "arguments": str(steps[0].get("Action_Input", "{}"))}
            made.append({"query": query, "tools": json.dumps(chosen, ensure_ascii=False), **positive})
            if foreign:
                chosen = rng.sample(foreign, min(5, len(foreign)))
                made.append(
                    {"query": query, "tools": json.dumps(chosen, ensure_ascii=False), "action": "", "arguments": "{}"}
                )
    return made


def _alpaca_tool(api: Mapping[str, Any], name: str) -> dict[str, Any]:
    """ToolAlpaca describes parameters in words: "Required. integer. One of: [a, b]. What it is."."""
    text = str(api["Function_Description"].get(name, ""))
    head, found, tail = text.partition("Parameters: ")
    try:
        described = json.JSONDecoder().raw_decode(tail)[0] if found else {}
    except ValueError:
        described = {}
    properties: dict[str, Any] = {}
    required: list[str] = []
    for parameter, said in described.items() if isinstance(described, dict) else ():
        words = str(said)
        if words.startswith("Required."):
            required.append(parameter)
            words = words.removeprefix("Required.").strip()
        kind = re.match(r"(string|integer|number|boolean|array|object)\b", words, re.IGNORECASE)
        about = words[kind.end() if kind else 0 :].lstrip(".").strip()
        properties[parameter] = {"type": kind[1].lower() if kind else "string", "description": about}
    parameters = {"type": "object", "properties": properties, "required": required}
    function = {"name": name, "description": head.strip() or name, "parameters": parameters}
    return {"type": "function", "function": function}


OWN_LAYOUTS: dict[str, Callable[[Files, str | None], Mapping[str, Rows]]] = {
    "qwench/cruxeval": cruxeval,
    "qwench/fim": fim,
    "qwench/bfcl": bfcl,
    "qwench/tool_selection": tool_selection,
}
