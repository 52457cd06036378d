"""Typed recipes: frozen dataclasses <- TOML files merged left to right <- `key=value` overrides.

A recipe is data. There is no registry and no expression in it: files are merged by key, the result is checked against
the dataclass of the stage, and unknown keys are errors that name the nearest known one. A file may name another one
that lies under it: `base = "pretrain-qwen2.5"`, a path seen from the file or a shipped recipe.

    @config
    class OptimConfig:
        lr: float = 3e-4
        \"\"\"Peak learning rate.\"\"\"

    cfg = load(PretrainConfig, ["recipe.toml", "model.num_hidden_layers=4", "optim.lr=1e-3"])

Conversion (strings to paths, integers to floats, tables to dataclasses) is pydantic's.
"""

from __future__ import annotations

import ast
import dataclasses
import datetime
import difflib
import inspect
import json
import os
import textwrap
import tomllib
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, TypeAdapter, ValidationError

T = TypeVar("T")

NAME = "NAME"
"""What a section is called in messages and help whose name is the user's."""
RECIPES = Path(__file__).parent / "recipes"
"""Recipes that ship with the package; their names can be given without path and suffix."""


@dataclass_transform(kw_only_default=True, frozen_default=True)
def config(cls: type[T]) -> type[T]:
    """Make a class a frozen, keyword-only dataclass that refuses unknown keys."""
    made = dataclasses.dataclass(frozen=True, kw_only=True, slots=True)(cls)
    made.__pydantic_config__ = ConfigDict(extra="forbid")  # pyright: ignore[reportAttributeAccessIssue]
    return made


# ---------------------------------------------------------------------------------------------------------- loading
def load(schema: type[T], arguments: Sequence[str | Path] = ()) -> T:
    """Build `schema` from TOML files and `key=value` overrides, applied from left to right.

    Raises ValueError for an unreadable file, an unknown key or a value that does not fit.
    """
    merged: dict[str, Any] = {}
    for argument in arguments:
        text = str(argument)
        table = parse_override(text) if is_override(text) else read_recipe(find_recipe(text))
        merged = merge(merged, table)
    return from_dict(schema, merged)


def is_override(argument: str) -> bool:
    # os.path.exists, since Path.exists raises for what is too long to be a path.
    return "=" in argument and not os.path.exists(argument)


def find_recipe(name: str) -> Path:
    """A path as given, or a recipe of the package by its bare name."""
    path = Path(name)
    if os.path.isfile(path):
        return path
    shipped = RECIPES / f"{name.removesuffix('.toml')}.toml"
    if os.path.isfile(shipped):
        return shipped
    known = sorted(p.stem for p in RECIPES.glob("*.toml"))
    hint = f"; shipped recipes are {', '.join(known)}" if known else ""
    raise ValueError(f"no recipe file {name!r}{hint}. Overrides are written key=value")


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None


def read_recipe(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe file over the one that its key `base` names, if it has one, and so on.

    Raises ValueError for a base that does not exist or that is above itself.
    """
    table = read_toml(path)
    base = table.pop("base", None)
    if base is None:
        return table
    if not isinstance(base, str):
        raise ValueError(f"{path}: base is {base!r}; give the name of one recipe file as a string")
    beside = path.parent / base
    try:
        under = beside if beside.is_file() else find_recipe(base)
    except ValueError as error:
        raise ValueError(f"{path}: base: {error}") from None
    if under.resolve() in (chain := (*above, path.resolve())):
        raise ValueError(f"{path}: base = {base!r} leads back to {under}; a recipe cannot lie under itself")
    return merge(read_recipe(under, chain), table)


def parse_override(argument: str) -> dict[str, Any]:
    """`optim.lr=1e-3` as a nested table. What is no TOML value is taken as a string, so paths need no quotes."""
    key, _, value = argument.partition("=")
    leaf: Any
    key = key.strip()
    if not value.strip():
        raise ValueError(f"override {argument!r} has no value; write {key}=VALUE, or {key}='\"\"' for an empty string")
    try:
        parsed = tomllib.loads(f"value = {value}")
        # A second line inside the value would smuggle in further keys; a date is meant as a name (out=2025-11-21).
        dated = isinstance(parsed["value"], (datetime.date, datetime.time))
        leaf = parsed["value"] if list(parsed) == ["value"] and not dated else value
    except tomllib.TOMLDecodeError:
        leaf = value
    parts = key.split(".")
    if not all(parts):
        raise ValueError(f"override {argument!r} has an empty key; write section.key=value")
    for part in reversed(parts):
        leaf = {part: leaf}
    return leaf


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """A new table: `over` wins, tables are merged key by key, everything else is replaced whole."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def from_dict(schema: type[T], table: dict[str, Any]) -> T:
    """Convert a plain table to `schema`; every problem is named in one ValueError."""
    try:
        return TypeAdapter(schema).validate_python(_under(schema, table, None))
    except ValidationError as error:
        raise ValueError("\n".join(_explain(schema, problem) for problem in error.errors())) from None


def _under(schema: type, table: dict[str, Any], stage: Any) -> dict[str, Any]:
    """The table with the stage's own defaults under it.

    A stage may give a section other defaults than its class has (SFT's optim.lr). A table that sets one key of such a
    section must not bring back the class's values for the others. `stage` is that default section, or None.
    """
    hints = typing.get_type_hints(schema)
    result = dict(table)
    for field in dataclasses.fields(schema):
        default = _default(field) if stage is None else getattr(stage, field.name)
        inner = _config_class(hints[field.name])
        if inner is not None and isinstance(result.get(field.name), dict):
            result[field.name] = _under(inner, result[field.name], default if isinstance(default, inner) else None)
        elif stage is not None:
            result.setdefault(field.name, default)
    return result


def _explain(schema: type, problem: Any) -> str:
    # pydantic marks the chosen member of a union in the location; those marks are no keys of the user's.
    location = [str(part) for part in problem["loc"] if "[" not in str(part)]
    location, names = _nameless(schema, location)
    message = _message(schema, problem, location)
    for name in names:
        message = message.replace(f".{NAME}.", f".{name}.")
    return message


def _nameless(schema: type, location: list[str]) -> tuple[list[str], list[str]]:
    """A location with NAME in the place of names of sections that are the user's, and these."""
    inner: type | None = schema
    result, names = list(location), []
    for place, part in enumerate(location):
        if result[place] == NAME or inner is None:
            continue
        hint = typing.get_type_hints(inner).get(part)
        table = _table_class(hint)
        if table is not None and place + 2 < len(location):
            names.append(location[place + 1])
            result[place + 1] = NAME
        inner = table or _config_class(hint)
    return result, names


def _message(schema: type, problem: Any, location: list[str]) -> str:
    dotted = ".".join(location)
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = dict(_keys(schema))
        siblings = [key for key in known if key.rpartition(".")[0] == ".".join(location[:-1])]
        near = difflib.get_close_matches(dotted, siblings, n=1, cutoff=0.5)
        near = near or [key for key in known if key.rpartition(".")[2] == location[-1]][:1]
        near = near or difflib.get_close_matches(dotted, list(known), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(siblings)}"
        return f"unknown key {dotted!r}; {hint}"
    known = dict(_keys(schema))
    while len(location) > 1 and dotted not in known and not location[-1].isdigit():
        dotted = ".".join(location := location[:-1])  # the chosen member of a union again
    if problem["type"] in ("missing", "missing_argument") and not location[-1].isdigit():
        return f"key {dotted!r} is required; give it in the recipe or as {dotted}=..."
    message = problem["msg"].removeprefix("Value error, ")
    shown = f" (got {problem['input']!r})" if not isinstance(problem["input"], dict) else ""
    if problem["type"] in ("path_type", "string_type") and isinstance(problem["input"], (int, float)):
        shown += f"; a name that looks like a number needs quotes: {dotted}='\"{problem['input']}\"'"
    return f"{dotted}: {message}{shown}" if dotted else message


# ------------------------------------------------------------------------------------------------------- inspection
def _config_class(hint: Any) -> type | None:
    """The dataclass in a type hint such as `Optim`, `Optim | None`, or None if there is none."""
    if dataclasses.is_dataclass(hint):
        return typing.cast(type, hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        members = (arg for arg in typing.get_args(hint) if dataclasses.is_dataclass(arg))
        return typing.cast("type | None", next(members, None))
    return None


def _table_class(hint: Any) -> type | None:
    """The dataclass in `dict[str, Source]`, a table of sections whose names are the user's, or None."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is dict and len(arguments) == 2 and dataclasses.is_dataclass(arguments[1]):
        return typing.cast(type, arguments[1])
    return None


def _keys(schema: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Every key; sections whose names are the user's are called NAME."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        yield prefix + field.name, field
        if nested := _config_class(hints[field.name]):
            yield from _keys(nested, f"{prefix}{field.name}.")
        elif nested := _table_class(hints[field.name]):
            yield from _keys(nested, f"{prefix}{field.name}.{NAME}.")


def field_docs(schema: type) -> dict[str, str]:
    """Field name -> its attribute docstring (the string literal below the field)."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(schema))).body[0]
    assert isinstance(tree, ast.ClassDef)
    docs: dict[str, str] = {}
    for node, after in zip(tree.body, tree.body[1:], strict=False):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
            docs[node.target.id] = inspect.cleandoc(after.value.value)
    return docs


def to_dict(value: Any) -> Any:
    """Plain tables and lists; paths become strings, unset (None) keys are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((f.name, to_dict(getattr(value, f.name))) for f in dataclasses.fields(value))
        return {name: item for name, item in pairs if item is not None}
    if isinstance(value, dict):
        return {str(key): to_dict(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [to_dict(item) for item in value]
    return str(value) if isinstance(value, Path) else value


# ---------------------------------------------------------------------------------------------------------- writing
def dump(value: Any) -> str:
    """TOML text that `load` turns back into an equal value."""
    return "\n".join(_table_lines(to_dict(value))).lstrip("\n") + "\n"


def _table_lines(table: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[str]:
    for key, item in table.items():
        if not isinstance(item, dict):
            yield f"{_toml_key(key)} = {_toml_value(item)}"
    for key, item in table.items():
        if isinstance(item, dict):
            yield f"\n[{'.'.join(map(_toml_key, (*path, key)))}]"
            yield from _table_lines(item, (*path, key))


def describe(schema: type, path: tuple[str, ...] = (), stage: Any = None) -> str:
    """The defaults of a schema as commented TOML: the help page of a stage (`qwench config show STAGE`).

    `path` names the section that `schema` is, and `stage` is the default that the enclosing schema has for it.
    """
    lines: list[str] = []
    docs, hints = field_docs(schema), typing.get_type_hints(schema)
    nested = [f for f in dataclasses.fields(schema) if _config_class(hints[f.name])]
    for field in dataclasses.fields(schema):
        if field in nested:
            continue
        if _table_class(hints[field.name]):
            lines.append(f"# {field.name} = {{}}    sections of your own, see {'.'.join((*path, field.name, NAME))}")
            continue
        lines += [f"# {line}" for line in docs.get(field.name, "").splitlines()]
        default = _default(field) if stage is None else getattr(stage, field.name)
        if default is dataclasses.MISSING:
            lines.append(f"# {field.name} = ...    required, {_type_name(hints[field.name])}")
        elif default is None:
            lines.append(f"# {field.name} = ...    unset, {_type_name(hints[field.name])}")
        else:
            lines.append(f"{field.name} = {_toml_value(to_dict(default))}")
    for field in nested:
        inner = _config_class(hints[field.name])
        assert inner is not None
        lines += ["", *(f"# {line}" for line in docs.get(field.name, "").splitlines())]
        default = _default(field) if stage is None else getattr(stage, field.name)
        section = [f"[{'.'.join((*path, field.name))}]"]
        section += describe(inner, (*path, field.name), default if isinstance(default, inner) else None).splitlines()
        if default is None:  # its keys would bring it to life
            section = [line if not line or line.startswith("#") else f"# {line}" for line in section]
            section[0] += "    unset"
        lines += section
    for field in dataclasses.fields(schema):
        if inner := _table_class(hints[field.name]):
            lines += ["", *(f"# {line}" for line in docs.get(field.name, "").splitlines())]
            section = [f"[{'.'.join((*path, field.name, NAME))}]"]
            section += describe(inner, (*path, field.name, NAME)).splitlines()
            lines += [line if not line or line.startswith("#") else f"# {line}" for line in section]
    return "\n".join(lines) + "\n"


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "").replace("pathlib.", "")


def _toml_key(key: str) -> str:
    return key if key and all(c.isascii() and (c.isalnum() or c in "_-") for c in key) else _toml_value(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_key(k)} = {_toml_value(v)}" for k, v in value.items()) + "}"
    return repr(value)
