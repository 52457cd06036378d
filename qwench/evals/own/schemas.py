"""Obedience to JSON schemas: a made-up schema, a request for an object, and two questions about the answer.

`valid_json`: can it be read; `obeys_schema`: does it hold to the schema. A Markdown fence around it is taken off. The
constrained twin lets the engine's grammar enforce the schema, so its scores show what that adds, or where it fails.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from qwench.evals import context
from qwench.evals.own.lengths import dataset, read_count, refuse_unknown, seeded

_FIELDS = {
    "product in a shop": "name:string price:number stock:integer colour:red,green,blue discontinued:boolean "
    "tags:strings sizes:integers maker:object",
    "book in a library": "title:string rating:number pages:integer language:English,Chinese,French lent:boolean "
    "authors:strings reprints:integers publisher:object",
    "train journey": "from_station:string fare:number minutes:integer class:first,second reserved:boolean "
    "stops:strings platforms:integers operator:object",
    "weather report": "place:string temperature:number humidity:integer wind:north,south,east,west rain:boolean "
    "warnings:strings visitors:integers station:object",
    "recipe": "dish:string weight_kg:number servings:integer difficulty:low,medium,high vegetarian:boolean "
    "ingredients:strings minutes_per_step:integers author:object",
    "sports match": "venue:string average_age:number spectators:integer stage:group,semifinal,final indoor:boolean "
    "scorers:strings minutes_of_goals:integers referee:object",
}
_INNER = "label:string share:number count:integer active:boolean"


def make_schema(rng: Random, fields: str) -> dict[str, Any]:
    """An object with three to six of the fields, or with two if there are but four; some of them optional."""
    known = [field.split(":") for field in fields.split()]
    chosen = rng.sample(known, rng.randint(3, 6) if len(known) > 4 else 2)
    properties = {name: _property(rng, kind) for name, kind in chosen}
    required = [name for name in properties if rng.random() < 0.75] or [chosen[0][0]]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _property(rng: Random, kind: str) -> dict[str, Any]:
    if kind == "string":
        return {"type": "string", "minLength": 1, "maxLength": rng.choice((20, 40, 80))}
    if kind in ("integer", "number"):
        low = rng.choice((0, 1, 5, 10))
        return {"type": kind, "minimum": low, "maximum": low + rng.choice((10, 100, 1000))}
    if kind in ("strings", "integers"):
        inner = {"type": "string"} if kind == "strings" else {"type": "integer", "minimum": 0, "maximum": 99}
        low = rng.randint(1, 3)
        return {"type": "array", "items": inner, "minItems": low, "maxItems": low + rng.randint(0, 2)}
    if kind == "object":
        return make_schema(rng, _INNER)
    return {"type": "boolean"} if kind == "boolean" else {"type": "string", "enum": kind.split(",")}


def docs(**options: Any) -> Any:
    """Documents; option: samples (200)."""
    refuse_unknown(options)
    running = context.current()
    rows: list[dict[str, Any]] = []
    for number in range(read_count("samples", options.get("samples", 200))):
        rng = seeded("schema", running.seed, number)
        thing = rng.choice(sorted(_FIELDS))
        rows.append({"thing": thing, "schema": json.dumps(make_schema(rng, _FIELDS[thing]))})
    return dataset(rows)


def question(doc: Mapping[str, Any]) -> str:
    shown = json.dumps(json.loads(doc["schema"]), indent=2)
    return (
        f"Make up a {doc['thing']} and describe it as a JSON object that is valid under this JSON schema:\n\n"
        f"```json\n{shown}\n```\n\nReply with the JSON object only, without any explanation."
    )


def unfenced(text: str) -> str:
    """What stands in the fence, if the whole answer is one; else the text."""
    text = text.strip()
    if text.startswith("```") and text.endswith("```") and "\n" in text:
        return text.partition("\n")[2].rpartition("```")[0].strip()
    return text


def score(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    try:
        value = json.loads(unfenced(results[0]), parse_constant=_refuse)
    except (ValueError, RecursionError):
        return {"valid_json": 0.0, "obeys_schema": 0.0}
    return {"valid_json": 1.0, "obeys_schema": float(not violation(value, json.loads(doc["schema"])))}


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _is(kind: str, value: Any) -> bool:
    if kind in ("integer", "number"):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and (kind == "number" or float(value).is_integer())
    return isinstance(value, {"object": dict, "array": list, "string": str, "boolean": bool}[kind])


def violation(value: Any, schema: Mapping[str, Any], where: str = "the value") -> str:
    """The first rule of a schema that a value breaks, or "". Knows the words that `make_schema` uses."""
    if not _is(schema["type"], value):
        return f"{where} is no {schema['type']}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{where} is none of {schema['enum']}"
    if isinstance(value, str) and not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
        return f"{where} has {len(value)} characters"
    if _is("number", value) and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        return f"{where} is {value}"
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            return f"{where} has {len(value)} items"
        inner = (violation(item, schema["items"], f"{where}[{n}]") for n, item in enumerate(value))
        return next(filter(None, inner), "")
    if isinstance(value, dict):
        known = schema["properties"]
        for name in schema["required"]:
            if name not in value:
                return f"{where} lacks {name}"
        for name, item in value.items():
            wrong = violation(item, known[name], f"{where}.{name}") if name in known else f"{where} has {name}"
            if wrong:
                return wrong
    return ""
