"""`qwench eval MODEL --tasks ...`: reads the command line, runs the harness, and prints a table.

The engine comes from the caller (`qwench.evaluate`), as evaluation and engine do not import each other. Nothing heavy
is imported before there is something to run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwench.evals.ask import Scoring
    from qwench.evals.harness import About, Item
    from qwench.evals.presets import Preset

DATA_VARIABLE = "QWENCH_EVAL_DATA"
OpenEngine = Callable[[argparse.Namespace], AbstractContextManager[tuple["Scoring", "About"]]]
"""Gives the engine that the arguments describe, and what is to be recorded of it."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="qwench eval",
        description="Measure a model on tasks of lm-eval and of qwench, with the setting printed beside the score.",
        epilog="docs/evaluation.md describes tasks, local files and presets.",
    )
    made.add_argument(
        "model", metavar="MODEL", nargs="?", help="Hugging Face directory or hub id, GGUF file, or qwench run"
    )
    made.add_argument(
        "settings", metavar="key=value", nargs="*", help="settings of the engine, for example max_seqs=64"
    )
    what = made.add_argument_group("what to run")
    what.add_argument("--tasks", metavar="A,B", default="", help="tasks, groups, tags, patterns with *, YAML files")
    what.add_argument(
        "--preset", metavar="NAME", help="settings of published scores; alone: all its tasks; none: the tasks' own"
    )
    what.add_argument(
        "--compare",
        metavar="MODEL",
        nargs="?",
        const="",
        help="print the published figure beside ours; MODEL: whose (default: told by the model's name)",
    )
    what.add_argument(
        "--limit", type=float, metavar="N", help="documents of each task at most; below 1: a share of them"
    )
    what.add_argument("--num-fewshot", type=int, metavar="N", help="worked examples before each question")
    what.add_argument("--repeats", type=int, metavar="N", help="answers to each question, for pass@k of sampled ones")
    what.add_argument(
        "--metadata", metavar="JSON", help='settings of tasks that are made to measure, e.g. {"lengths": [4096]}'
    )
    what.add_argument(
        "--baseline", type=Path, metavar="DIR", help="an earlier run to compare with, question by question"
    )
    what.add_argument("--subtasks", action="store_true", help="show the members of groups in the table, too")
    what.add_argument("--list-tasks", metavar="PATTERN", nargs="?", const="", help="show names of tasks and stop")
    what.add_argument("--list-presets", action="store_true", help="show presets with their tasks and stop")
    data = made.add_argument_group("data and results")
    data.add_argument(
        "--data-dir",
        type=Path,
        action="append",
        metavar="DIR",
        help=f"local files that go before the hub's data sets; may be given several times (default: ${DATA_VARIABLE})",
    )
    data.add_argument(
        "--include-path", type=Path, action="append", default=[], metavar="DIR", help="further YAML tasks"
    )
    data.add_argument(
        "--out", type=Path, metavar="DIR", help="results; an interrupted run there goes on (default: eval-runs/...)"
    )
    prompt = made.add_argument_group("prompts and answers")
    prompt.add_argument(
        "--apply-chat-template",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="ask through the chat template (default: where the task or preset says so)",
    )
    prompt.add_argument(
        "--chat-format", metavar="NAME", help="chat template by name, for a model without one, e.g. qwen2.5"
    )
    prompt.add_argument(
        "--system", metavar="TEXT", help="system message, or a text before everything without a template"
    )
    prompt.add_argument(
        "--fewshot-as-multiturn",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="worked examples as turns of the conversation (default) or in one question",
    )
    prompt.add_argument(
        "--gen",
        metavar="k=v",
        action="append",
        default=[],
        help="generation settings over the tasks', e.g. max_gen_toks=512,temperature=0.7",
    )
    prompt.add_argument("--seed", type=int, default=1234, help="of examples and sampling (default 1234)")
    prompt.add_argument(
        "--max-length", type=int, metavar="N", help="tokens of a prompt with its continuation (default: the context)"
    )
    model = made.add_argument_group("model")
    model.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    model.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="numbers of the weights (default: bfloat16 on a GPU, float32 on a CPU)",
    )
    model.add_argument("--tokenizer", help="tokenizer to use instead of the model's own")
    model.add_argument("--batch", type=int, metavar="N", help="answers in the making at once, the same as max_seqs=N")
    model.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes that run programs (default: one a core)"
    )
    return made


def main(argv: Sequence[str], open_engine: OpenEngine) -> int:
    args = parser().parse_intermixed_args(list(argv))
    if args.list_presets:
        return list_presets()
    if args.list_tasks is not None:
        return list_tasks(args.list_tasks, args.include_path)
    if args.model is None:
        raise ValueError("which model? qwench eval MODEL --tasks A,B; qwench eval --help tells more")
    if "=" in args.model and not Path(args.model).exists():
        raise ValueError(
            f"{args.model!r} looks like a setting; the model comes first: qwench eval MODEL --tasks A,B key=value"
        )
    _check(args)
    if args.metadata is not None:
        _metadata(args.metadata)
    if args.baseline is not None and not (args.baseline / "results.json").is_file():
        raise ValueError(f"--baseline {args.baseline} is no run: it has no results.json")
    from qwench.evals import presets
    from qwench.evals.harness import Plan, evaluate, quiet
    from qwench.evals.local_files import MissingDataError, data_roots

    preset = presets.load(args.preset) if args.preset not in (None, "none") else None
    generation = generation_settings(args.gen)
    data_dirs = tuple(args.data_dir or [Path(p) for p in os.environ.get(DATA_VARIABLE, "").split(os.pathsep) if p])
    quiet()
    catalogue = _catalogue(args.include_path)
    name = model_name(args.model)
    items = _items(args.tasks, preset, catalogue)
    as_published: list[str] = []
    if all(option is None for option in (args.preset, args.apply_chat_template, args.system, args.num_fewshot)):
        items, as_published = code_as_published(items, name, catalogue)
    items = [
        _with_figure(_changed(item, args), preset, name, args.compare, item.label in as_published) for item in items
    ]
    out = args.out or Path("eval-runs") / default_out(name, args.preset, args.tasks)
    plan = Plan(
        items=items,
        limit=args.limit if args.limit is None or args.limit < 1 else int(args.limit),
        seed=args.seed,
        data_dirs=data_dirs,
        include=tuple(args.include_path),
        generation=generation,
        max_length=args.max_length,
        workers=args.workers,
    )
    from qwench.run import console

    def report(label: str, found: Mapping[str, Any]) -> None:
        entry = found[label]
        metric = entry["metrics"].get(entry["primary"] or "")
        shown = "no metric" if metric is None else f"{entry['primary']} {number(metric['value'])}"
        console.print(f"{label}: {shown} after {entry['seconds']:.1f} s", highlight=False)

    if as_published:
        console.print(
            f"note: {', '.join(as_published)} as published for this model; --preset none: without its chat template",
            highlight=False,
        )
    if args.preset is None and (hint := preset_hint([item for item in items if not item.label], name)):
        console.print(hint, highlight=False)
    roots = data_roots(data_dirs)
    for item in items:
        with contextlib.suppress(MissingDataError) if item.optional else contextlib.nullcontext():
            catalogue.try_files(item.task, roots)
    with open_engine(args) as (engine, about):
        refuse_other_model(out, about.model)
        results = evaluate(engine, plan, out, about, report, catalogue)
    print_table(results, compare=args.compare is not None, subtasks=args.subtasks)
    if args.baseline is not None:
        _print_comparison(out, args.baseline)
    for note in notes_of(results):
        print(note)
    print(f"results, settings and samples: {out}")
    return 0


def _check(args: argparse.Namespace) -> None:
    if not args.tasks and args.preset in (None, "none"):
        raise ValueError("which tasks? give --tasks A,B or --preset NAME; qwench eval --list-tasks shows all")
    if args.limit is not None and not (0 < args.limit < 1 or (args.limit > 0 and args.limit.is_integer())):
        raise ValueError(f"--limit is {args.limit:g}; give a positive number of documents, or a share below 1")
    for name in ("num_fewshot", "workers"):
        if (getattr(args, name) or 0) < 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; give 0 or more")
    for name in ("batch", "repeats", "max_length"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; give at least 1")


def _catalogue(include: Sequence[Path]) -> Any:
    try:
        from qwench.evals.task_loading import Catalogue
    except ModuleNotFoundError as error:
        raise ValueError(
            f"evaluation needs the package {error.name}; install it with: pip install 'qwench[eval]'"
        ) from None
    return Catalogue(include)


def _items(tasks: str, preset: Preset | None, catalogue: Any) -> list[Item]:
    import dataclasses

    from qwench.evals.harness import Item

    if not tasks:
        assert preset is not None
        return [dataclasses.replace(preset.item(label), optional=True) for label in preset.tasks]
    items: list[Item] = []
    for name in filter(None, (part.strip() for part in tasks.split(","))):
        if preset is not None and name in preset.tasks:
            items.append(preset.item(name))
        elif preset is not None:
            raise ValueError(f"preset {preset.name} has no task {name!r}; it has {', '.join(preset.tasks)}")
        else:
            items += [Item(task=found) for found in catalogue.matching(name)]
    if not items:
        raise ValueError("--tasks names no task")
    return items


def _changed(item: Item, args: argparse.Namespace) -> Item:
    """The item with what the command line sets."""
    import dataclasses

    changes: dict[str, Any] = {}
    if args.apply_chat_template is not None:
        changes["chat"] = args.apply_chat_template
    if args.system is not None:
        changes["system"] = args.system
    if args.fewshot_as_multiturn is not None:
        changes["multiturn"] = args.fewshot_as_multiturn
    if args.num_fewshot is not None:
        changes["num_fewshot"] = args.num_fewshot
    overrides = dict(item.overrides)
    if args.repeats is not None:
        overrides["repeats"] = args.repeats
    if args.metadata is not None:
        overrides["metadata"] = {**overrides.get("metadata", {}), **_metadata(args.metadata)}
    if overrides != item.overrides:
        changes["overrides"] = overrides
    return dataclasses.replace(item, **changes) if changes else item


def _metadata(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"--metadata is no JSON ({error}); give an object, for example '{{\"lengths\": [4096]}}'"
        ) from None
    if not isinstance(value, dict):
        raise ValueError("--metadata should be a JSON object")
    return value


def code_as_published(items: Sequence[Item], model: str, catalogue: Any) -> tuple[list[Item], list[str]]:
    """Tasks of ours for code that a published chat model was asked in a conversation, asked in the same way, and their
    names. As text to be completed they say little of a chat model: 45.1 instead of 58.5 of HumanEval for
    Qwen2.5-Coder-0.5B-Instruct in 4 to 6 bits."""
    from qwench.evals import presets

    known = presets.of_model(model)
    found: list[Item] = []
    for item in items:
        asked = known.item(item.task) if known and item.task in known.tasks and catalogue.is_ours(item.task) else None
        in_chat = asked is not None and (asked.chat or asked.task.endswith(("_instruct", "_chat")))
        found.append(asked if asked is not None and in_chat else item)
    return found, [item.label for item in found if item.label]


def _with_figure(
    item: Item, preset: Preset | None, model: str, compare: str | None, as_published: bool = False
) -> Item:
    """The item with the published figure, if one is asked for and known."""
    if compare is None:
        return item
    import dataclasses

    from qwench.evals import presets

    source = preset or presets.of_model(compare or model)
    if source is None:
        raise ValueError(
            f"no published figures are known for {compare or model}; give --compare MODEL with a name from "
            "qwench eval --list-presets"
        )
    name = source.model_named(compare or model)
    if name is None:
        known = ", ".join(source.published)
        raise ValueError(
            f"preset {source.name} has no figures of {compare or model}; it has: {known}. Say --compare MODEL"
        )
    label = item.label or next((key for key, task in source.tasks.items() if task["task"] == item.task), item.task)
    figure = source.figure(label, name)
    if figure is None:
        return item
    return dataclasses.replace(item, published={**figure, "same_setting": preset is not None or as_published})


def preset_hint(items: Sequence[Item], model: str) -> str:
    """Which preset has the settings that a model's published scores were measured with, where they are not used."""
    from qwench.evals import presets

    known = presets.of_model(model)
    asked = {item.task for item in items}
    labels = [label for label, task in known.tasks.items() if asked & {label, task["task"]}] if known else []
    if known is None or not labels:
        return ""
    told = f"--preset {known.name} --tasks {','.join(labels)}"
    return f"note: settings of the tasks' own; those of the published scores of {known.model_named(model)}: {told}"


def generation_settings(given: Sequence[str]) -> dict[str, Any]:
    """`a=1,b=text` as values; lists and numbers are read as JSON."""
    settings: dict[str, Any] = {}
    for text in given:
        for part in re.split(r",(?=\w+=)", text):
            key, equals, value = part.partition("=")
            if not equals or not key.strip():
                raise ValueError(f"--gen {text!r} should be key=value, for example temperature=0.7,top_p=0.8")
            try:
                settings[key.strip()] = json.loads(value)
            except json.JSONDecodeError:
                settings[key.strip()] = {"True": True, "False": False}.get(value, value)
    return settings


def model_name(model: str) -> str:
    """What a model is called: a hub id as it is, else the name of its file or directory."""
    path = Path(model).expanduser()
    return (path.resolve().name.removesuffix(".gguf") or "model") if path.exists() else model


def default_out(name: str, preset: str | None, tasks: str) -> str:
    parts = [name, *([Path(preset).stem] if preset else []), tasks]
    return re.sub(r"[^\w.,+-]+", "_", "-".join(filter(None, parts)))[:120]


def refuse_other_model(out: Path, model: Mapping[str, Any]) -> None:
    """Raise ValueError where the directory has results of another model; finished requests would be mixed up."""
    path = out / "results.json"
    if not path.exists():
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["model"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is no results file of qwench; give another --out") from None
    if before.get("hash") != model.get("hash"):
        raise ValueError(
            f"{out} has results of {before.get('name')}, another model than {model.get('name')}; give another --out"
        )


# --------------------------------------------------------------------------------------------------------- showing
def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def notes_of(results: Mapping[str, Any]) -> list[str]:
    """What a reader of the scores must know: data that differ, settings that differ, members that are missing."""
    notes: dict[str, list[str]] = {}
    for name, entry in results["tasks"].items():
        setting = entry.get("setting")
        for note in setting["data"].get("notes", []) if setting else []:
            notes.setdefault(note, []).append(name)
        if note := (entry.get("published") or {}).get("note"):
            notes.setdefault(note, []).append(name)
        if cut := entry["tokens"]["cut_prompts"] if setting else 0:
            told = f"longer than the context: {cut} of {entry['tokens']['requests']} prompts lost their beginning"
            notes.setdefault(told, []).append(name)
        for note in _of_repeats(setting, entry["metrics"]) if setting else []:
            notes.setdefault(note, []).append(name)
    lines = [f"note on {shortened(names)}: {note}" for note, names in notes.items()]
    if skipped := results["skipped"]:
        first = next(iter(skipped.values()))
        lines.append(f"left out {len(skipped)} tasks ({shortened(list(skipped))}): {first}")
    return lines


def _of_repeats(setting: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[str]:
    """What several answers to each question were good for."""
    repeats, generation = setting.get("repeats") or 1, setting.get("generation")
    if repeats == 1 or generation is None:
        return []
    if not generation.get("temperature"):
        return [f"greedy: all {repeats} answers to a question are the same; sample them with --gen temperature=0.8"]
    if not any(name.startswith(("pass@", "base_pass@", "maj@")) for name in metrics):
        return [f"{repeats} answers to each question were made, but this task scores the first alone"]
    return []


def shortened(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def print_table(results: Mapping[str, Any], *, compare: bool = False, subtasks: bool = False) -> None:
    """Scores with their errors, one line a task and group; members of groups where `subtasks` are wanted."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{results['model'].get('name', 'model')}, {results['seconds']:.0f} s")
    for column in ("task", "metric"):
        table.add_column(column)
    for column in ("shots", "n", "value", "±"):
        table.add_column(column, justify="right")
    if compare:
        table.add_column("published", justify="right")
        table.add_column("difference", justify="right")
        table.add_column("published for")
    groups = [entry for entry in results["tasks"].values() if entry["metrics"]]  # some have none of their own
    members = {member for entry in groups for member in entry["subtasks"]}
    for name, entry in results["tasks"].items():
        if name in members and not subtasks:
            continue
        for place, (metric, told) in enumerate(_ordered(entry)):
            row = [
                name if place == 0 else "",
                metric,
                str(entry["setting"]["num_fewshot"]) if place == 0 and "setting" in entry else "",
                str(told["n"]) if place == 0 or told["n"] != entry["n"] else "",
                number(told["value"]),
                number(told["stderr"]) if told["stderr"] is not None else "",
            ]
            if compare:
                row += _comparison(entry.get("published") if metric == entry["primary"] else None, told["value"])
            table.add_row(*row, end_section=place == len(entry["metrics"]) - 1)
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table)


def _print_comparison(run: Path, baseline: Path) -> None:
    """The differences from an earlier run, with their errors."""
    from rich.console import Console

    from qwench.evals.compare import compare_runs, comparison_table

    comparison = compare_runs(run, baseline)
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(comparison_table(comparison))
    for warning in comparison.warnings:
        print(f"warning: {warning}")


def _ordered(entry: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return sorted(entry["metrics"].items(), key=lambda item: item[0] != entry["primary"])


def _comparison(published: Mapping[str, Any] | None, value: float | None) -> list[str]:
    if published is None or value is None:
        return ["", "", ""]
    marks = "" if published["same_setting"] else ", its setting"
    return [f"{published['value']:.1f}", f"{100 * value - published['value']:+.1f}", published["model"] + marks]


def list_tasks(pattern: str, include: Sequence[Path]) -> int:
    catalogue = _catalogue(include)
    names = catalogue.names(pattern)
    ours = [name for name in names if catalogue.is_ours(name)]
    for name in ours:
        print(f"{name}  (qwench)")
    for name in names:
        if name not in set(ours):
            print(name)
    return 0 if names else 1


def list_presets() -> int:
    from qwench.evals import presets

    for name in presets.names():
        preset = presets.load(name)
        print(f"{name}: {preset.about}")
        print(f"  tasks   {', '.join(preset.tasks)}")
        print(f"  figures {', '.join(preset.published)}")
    return 0
