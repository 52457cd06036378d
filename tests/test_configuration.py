"""Recipes: files merged in order, the grammar of overrides, defaults of stages, errors that help, and round trips."""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwench import config
from qwench.cli import SCHEMAS, load_function
from qwench.train.config import OptimConfig, PretrainConfig, SFTConfig


@config.config
class Inner:
    """A section."""

    size: int = 3
    """How many."""
    rate: float = 0.5
    words: tuple[str, ...] = ("a", "b")
    limit: int | None = None


@config.config
class Outer:
    path: Path
    """Where."""
    mode: Literal["fast", "slow"] = "fast"
    flag: bool = False
    pair: tuple[float, float] = (0.9, 0.95)
    ends: int | tuple[int, ...] | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    inner: Inner = Inner()
    tuned: Inner = Inner(size=30, limit=7)
    """A section whose defaults are not its class's."""
    maybe: Inner | None = None


# ------------------------------------------------------------------------------------------------------------- loading
def test_merge_order(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('path = "x"\nmode = "slow"\n[inner]\nsize = 1\nrate = 0.1\n')
    (tmp_path / "b.toml").write_text("[inner]\nsize = 2\n")
    a, b = tmp_path / "a.toml", tmp_path / "b.toml"
    assert config.load(Outer, [a, b]).inner == Inner(size=2, rate=0.1)
    assert config.load(Outer, [b, a]).inner == Inner(size=1, rate=0.1)
    assert config.load(Outer, ["inner.size=9", a]).inner.size == 1, "also overrides are applied from left to right"
    loaded = config.load(Outer, [str(a), "inner.size=9", "mode=fast", str(b), "inner.rate=7"])
    assert (loaded.inner.size, loaded.inner.rate, loaded.mode, loaded.path) == (2, 7.0, "fast", Path("x"))
    assert config.load(Outer, [a, 'inner={words=["z"]}']).inner == Inner(size=1, rate=0.1, words=("z",))


@pytest.mark.parametrize(
    ("override", "want"),
    [
        ("path=runs/a b", {"path": "runs/a b"}),
        ("path=a=b", {"path": "a=b"}),
        ('path="quoted"', {"path": "quoted"}),
        ("path='single'", {"path": "single"}),
        ('path="7"', {"path": "7"}),
        ("path=C:\\new", {"path": "C:\\new"}),
        ("path=a#b", {"path": "a#b"}),
        ("path=2024-11-21", {"path": "2024-11-21"}),
        ("path=07:32:00", {"path": "07:32:00"}),
        ("path=日本", {"path": "日本"}),
        ("path=x\ninjected = 1", {"path": "x\ninjected = 1"}),
        ("path=1\ninjected = 1", {"path": "1\ninjected = 1"}),
        ("a.b.c=1e-3", {"a": {"b": {"c": 1e-3}}}),
        (" a.b = 2 ", {"a": {"b": 2}}),
        ("a=[1, 2]", {"a": [1, 2]}),
        ("a=[one, two]", {"a": "[one, two]"}),
        ("a={b = 1, c = {d = true}}", {"a": {"b": 1, "c": {"d": True}}}),
        ("a=true", {"a": True}),
        ("a=True", {"a": "True"}),
        ("a=1_000", {"a": 1000}),
        ("a=-inf", {"a": float("-inf")}),
        ("a='''x'''", {"a": "x"}),
        ('a=""', {"a": ""}),
    ],
)
def test_overrides(override: str, want: dict[str, Any]) -> None:
    assert config.parse_override(override) == want


@pytest.mark.parametrize("override", ["=1", "a..b=1", ".a=1", "a.=1"])
def test_empty_keys(override: str) -> None:
    with pytest.raises(ValueError, match="has an empty key; write"):
        config.parse_override(override)


@pytest.mark.parametrize("override", ["a=", "a= "])
def test_empty_values(override: str) -> None:
    with pytest.raises(ValueError, match="has no value; write a=VALUE"):
        config.parse_override(override)


def test_what_is_a_file_and_what_an_override(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("path=x.toml").write_text('path = "from the file"')
    assert config.load(Outer, ["path=x.toml"]).path == Path("from the file")
    assert config.load(Outer, ["path=y.toml"]).path == Path("y.toml")
    long = ", ".join(f'"{"w" * 30}{i}"' for i in range(200))
    loaded = config.load(Outer, ["path=x", f"inner.words=[{long}]"])
    assert len(loaded.inner.words) == 200, "an override longer than any path"
    with pytest.raises(ValueError, match=r"no recipe file 'nowhere\.toml'.*Overrides are written key=value"):
        config.load(Outer, ["nowhere.toml"])
    with pytest.raises(ValueError, match="no recipe file"):
        config.load(Outer, ["w" * 5000])


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("a = [1,")
    (tmp_path / "latin.toml").write_bytes('a = "é"'.encode("latin-1"))
    for name in ("bad.toml", "latin.toml"):
        with pytest.raises(ValueError, match=f"{name} is not valid TOML"):
            config.load(Outer, [tmp_path / name])


def test_base(tmp_path: Path) -> None:
    """A file over the one that it names, beside it or shipped, and so on; what comes later on the command line wins."""
    (tmp_path / "low.toml").write_text("path = 'a'\nflag = true\n[inner]\nsize = 1\nrate = 0.1\n")
    (tmp_path / "middle.toml").write_text('base = "low.toml"\nmode = "slow"\n[inner]\nsize = 2\n')
    (tmp_path / "top.toml").write_text('base = "middle.toml"\n[inner]\nlimit = 7\n')
    got = config.load(Outer, [tmp_path / "top.toml", "inner.rate=0.9"])
    assert (got.path, got.flag, got.mode) == (Path("a"), True, "slow")
    assert got.inner == Inner(size=2, rate=0.9, limit=7)
    (tmp_path / "shipped.toml").write_text('base = "pretrain-small"\n')
    assert config.read_recipe(tmp_path / "shipped.toml") == config.read_toml(config.find_recipe("pretrain-small"))
    (tmp_path / "low.toml").write_text('base = "top.toml"\n')
    for name, text, message in (
        ("top.toml", None, "cannot lie under itself"),
        ("lost.toml", 'base = "nothing"', r"lost\.toml: base: no recipe file 'nothing'"),
        ("list.toml", "base = ['a']", "name of one recipe file"),
    ):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            config.load(Outer, [tmp_path / name])


def test_conversion() -> None:
    loaded = config.load(Outer, ["path=x", "inner.rate=1", "pair=[1, 2]", "ends=[1, 2]", "extra.a.b=1", "flag=true"])
    assert isinstance(loaded.inner.rate, float)
    assert loaded.pair == (1.0, 2.0)
    assert loaded.ends == (1, 2)
    assert loaded.extra == {"a": {"b": 1}}
    assert loaded.flag is True
    assert config.load(Outer, ["path=x", "ends=5"]).ends == 5
    assert config.load(Outer, ["path=x"]).maybe is None
    assert config.load(Outer, ["path=x", "maybe.size=5"]).maybe == Inner(size=5)


def test_defaults_of_a_stage_stay() -> None:
    """One key of a section does not bring back the class's values for the others."""
    assert config.load(Outer, ["path=x"]).tuned == Inner(size=30, limit=7)
    assert config.load(Outer, ["path=x", "tuned.rate=1"]).tuned == Inner(size=30, limit=7, rate=1.0)
    assert config.load(Outer, ["path=x", "tuned.size=1"]).tuned == Inner(size=1, limit=7)
    arguments = ["out=x", "model.path=y", 'train_data=["z"]', "loop.steps=1"]
    recipe = config.load(SFTConfig, [*arguments, "optim.weight_decay=0", "schedule.kind=linear"])
    assert recipe.optim == OptimConfig(lr=1e-5, weight_decay=0)
    assert recipe.schedule.warmup_steps == 100


# -------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inner.sise=1"], "unknown key 'inner.sise'; did you mean 'inner.size'?"),
        (["iner.size=1"], "unknown key 'iner'; did you mean 'inner'?"),
        (["size=1"], "unknown key 'size'; did you mean 'inner.size'?"),
        (["zzzzzz=1"], "unknown key 'zzzzzz'; known keys: path, mode, flag, pair, ends, extra, inner, tuned, maybe"),
        (["maybe.sise=1"], "unknown key 'maybe.sise'; did you mean 'maybe.size'?"),
        (["inner.size=x"], "inner.size: Input should be a valid integer"),
        (
            ["inner.size=1.5"],
            "inner.size: Input should be a valid integer, got a number with a fractional part (got 1.5)",
        ),
        (["mode=quick"], "mode: Input should be 'fast' or 'slow' (got 'quick')"),
        (["ends=x"], "ends: Input should be a valid integer"),
        (["pair=[0.9]"], "pair.1: Field required (got [0.9])"),
        (["path=7"], "path='\"7\"'"),
        (["inner=5"], "inner: "),
    ],
)
def test_messages(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        config.load(Outer, ["path=x", *arguments])
    assert message in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_missing_and_several() -> None:
    with pytest.raises(ValueError, match="key 'path' is required; give it in the recipe or as path=") as caught:
        config.load(Outer, ["mode=x", "inner.size=x"])
    assert len(str(caught.value).splitlines()) == 3, "all problems at once"


# --------------------------------------------------------------------------------------------------------- round trips
text = st.text(st.characters(blacklist_categories=["Cs"]), max_size=12)
plain = st.recursive(
    st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | text,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(text, children, max_size=3),
    max_leaves=8,
)
inners = st.builds(
    Inner,
    size=st.integers(-(2**40), 2**40),
    rate=st.floats(allow_nan=False),
    words=st.lists(text, max_size=4).map(tuple),
    limit=st.none() | st.integers(),
)
# A default that is set cannot be unset in TOML, which has no null: `tuned.limit` is always a number here.
outers = st.builds(
    Outer,
    path=text.filter(bool).map(Path),
    mode=st.sampled_from(["fast", "slow"]),
    flag=st.booleans(),
    pair=st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False)),
    ends=st.none() | st.integers() | st.lists(st.integers(), max_size=3).map(tuple),
    extra=st.dictionaries(text, plain, max_size=3),
    inner=inners,
    tuned=inners.filter(lambda inner: inner.limit is not None),
    maybe=st.none() | inners,
)


@settings(max_examples=200, deadline=None)
@given(value=outers)
def test_dump_and_load(value: Outer) -> None:
    text = config.dump(value)
    assert config.from_dict(Outer, tomllib.loads(text)) == value


@settings(max_examples=100, deadline=None)
@given(key=text.filter(lambda key: key.isidentifier()), value=text)
def test_any_text_as_an_override(key: str, value: str) -> None:
    """A quoted value arrives as it is, and so does what is no TOML value."""
    assert config.parse_override(f"{key}={config._toml_value(value)}") == {key: value}
    try:
        tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        if value.strip():
            assert config.parse_override(f"{key}={value}") == {key: value}


def test_real_recipes_survive(pretrain_arguments, sft_arguments, tmp_path: Path) -> None:
    for schema, arguments in ((PretrainConfig, pretrain_arguments), (SFTConfig, sft_arguments)):
        recipe = config.load(schema, arguments(tmp_path))
        (tmp_path / "again.toml").write_text(config.dump(recipe), encoding="utf-8")
        assert config.load(schema, [tmp_path / "again.toml"]) == recipe


# ---------------------------------------------------------------------------------------------------------- inspection
@pytest.mark.parametrize("stage", SCHEMAS)
def test_described_defaults(stage: str) -> None:
    """What `config show` prints is TOML, names every key, and its values are those of an empty recipe."""
    schema: Any = load_function(SCHEMAS[stage])
    described = config.describe(schema)
    shown = tomllib.loads(described)
    section = ""
    named = set()
    for line in described.splitlines():
        bare = line.removeprefix("# ")
        if bare.startswith("["):
            section = bare[1 : bare.index("]")] + "."
            named.add(section.removesuffix("."))
        elif " = " in bare:
            named.add(section + bare.partition(" = ")[0])
    assert {key for key, _ in config._keys(schema)} <= named
    leaves = dict(flat(shown))
    assert leaves
    for key, value in leaves.items():
        default: Any = default_of(schema, key.split("."))
        assert config.to_dict(default) == value, key


def flat(table: dict[str, Any], prefix: str = ""):
    for key, value in table.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def default_of(schema: Any, parts: list[str]) -> Any:
    """The default by Python's own means: the field of the class, or of the instance that a stage gives."""
    fields = {field.name: field for field in dataclasses.fields(schema)}
    field = fields[parts[0]]
    value = field.default if field.default is not dataclasses.MISSING else None
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if len(parts) == 1:
        return value
    if dataclasses.is_dataclass(value):
        for part in parts[1:]:
            value = value[part] if isinstance(value, dict) else getattr(value, part)
        return value
    inner = config._config_class(typing.get_type_hints(schema)[parts[0]])
    return default_of(inner, parts[1:])


def test_sft_shows_its_own_defaults() -> None:
    shown = tomllib.loads(config.describe(SFTConfig))
    assert shown["optim"]["lr"] == 1e-5
    assert shown["schedule"]["warmup_steps"] == 100


def test_shown_recipe_runs(tmp_path: Path) -> None:
    """The printed page is a recipe once its required keys are given."""
    (tmp_path / "shown.toml").write_text(config.describe(Outer))
    assert config.load(Outer, [tmp_path / "shown.toml", "path=x"]) == Outer(path=Path("x"))
    (tmp_path / "sft.toml").write_text(config.describe(SFTConfig))
    needed = ["out=x", "model.path=y", 'train_data=["z"]', "loop.steps=1"]
    assert config.load(SFTConfig, [tmp_path / "sft.toml", *needed]) == config.load(SFTConfig, needed)


def test_docs() -> None:
    assert config.field_docs(Inner) == {"size": "How many."}
    assert "# How many.\nsize = 3" in config.describe(Inner)
