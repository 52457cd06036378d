"""Runs tasks on an engine through lm-eval and writes down what came out.

    OUT/results.json         scores with their settings; replaced after each task
    OUT/samples/TASK.jsonl   one line a document
    OUT/requests.jsonl       finished requests, by which an interrupted run goes on

Command-line reading, opening of models and tables are not here: see `command`.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import json
import logging
import os
import random
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwench import __version__
from qwench.evals.context import TaskContext, using
from qwench.evals.finished import Finished, digest
from qwench.run import git_commit, machine, write_atomically

if TYPE_CHECKING:
    from qwench.evals.ask import Scoring
    from qwench.evals.lm import EngineLM
    from qwench.evals.task_loading import Catalogue, Loaded

log = logging.getLogger("qwench.evals")

BOOTSTRAP = 1000
"""Resamples for the error of metrics that are no mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One task, group or tag to run, with what a preset or the command sets: `Item(task="gsm8k", num_fewshot=4)`."""

    task: str
    label: str = ""
    """Its name in the results; the task's own by default."""
    chat: bool | None = None
    """Whether prompts go through the chat template; None: where the task asks for it."""
    system: str | None = None
    multiturn: bool = True
    """Whether examples are turns of the conversation, or part of one question."""
    num_fewshot: int | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the task that are replaced, as in its YAML file."""
    metric: str = ""
    """The one that stands for the task."""
    published: Mapping[str, Any] | None = None
    optional: bool = False
    """Left out where its data are missing, as long as another item can run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to run: `Plan(items=[Item(task="mmlu")], limit=10, data_dirs=(Path("data/eval"),))`."""

    items: Sequence[Item]
    limit: int | float | None = None
    """Documents of each task at most, or a share of them below 1."""
    seed: int = 1234
    """Of the choice of examples and of sampling."""
    data_dirs: tuple[Path, ...] = ()
    include: tuple[Path, ...] = ()
    """Directories with further YAML tasks."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """Generation settings that go before those of all tasks."""
    max_length: int | None = None
    workers: int = 0
    """Processes that run model-written programs; 0: one for each core."""


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What is recorded of model and engine."""

    model: Mapping[str, Any] = field(default_factory=dict)
    """At least "name"; "hash" keeps requests of different models apart."""
    engine: Mapping[str, Any] = field(default_factory=dict)
    preset: str | None = None
    chat_error: str = ""
    """Why this model has no chat template, where it has none."""


def evaluate(
    engine: Scoring,
    plan: Plan,
    out: Path | None = None,
    about: About | None = None,
    report: Callable[[str, Mapping[str, Any]], None] | None = None,
    catalogue: Catalogue | None = None,
) -> dict[str, Any]:
    """Run every item and give the results object; with `out` it is written too, and finished requests are reused.

    `report` hears of each finished item: its label and its results. Raises ValueError for what cannot be run, before
    anything is computed.
    """
    quiet()
    try:
        from qwench.evals.lm import EngineLM
        from qwench.evals.local_files import data_roots
        from qwench.evals.task_loading import Catalogue
    except ModuleNotFoundError as error:
        raise ValueError(
            f"evaluation needs the package {error.name}; install it with: pip install 'qwench[eval]'"
        ) from None
    _compile_templates_once()
    about = about or About()
    catalogue = catalogue or Catalogue(plan.include)
    roots = data_roots(plan.data_dirs)
    context = TaskContext(
        tokenizer=engine.tokenizer, max_len=engine.max_len, data_dirs=roots, seed=plan.seed, workers=plan.workers
    )
    started = time.time()
    if out is not None:
        (out / "samples").mkdir(parents=True, exist_ok=True)
    with Finished(None if out is None else out / "requests.jsonl") as finished, using(context):
        prepared, missing = _prepare_all(catalogue, plan.items, roots)
        _refuse_twice(prepared)
        _refuse_without_template(prepared, about.chat_error)
        _try_sandbox(prepared)
        lm = EngineLM(
            engine,
            finished,
            model_key=digest(about.model.get("hash", about.model.get("name", "")), about.engine.get("dtype", "")),
            seed=plan.seed,
            max_length=plan.max_length,
            overrides=plan.generation,
            chat_error=about.chat_error,
        )
        results: dict[str, Any] = {
            "model": dict(about.model),
            "engine": {**about.engine, "qwench": __version__, "lm_eval": _version("lm_eval")},
            "machine": machine(),
            "tasks": {},
            "preset": about.preset,
            "command": shlex.join(sys.argv),
            "commit": git_commit(),
            "started": datetime.datetime.fromtimestamp(started, datetime.UTC).isoformat(timespec="seconds"),
            "seconds": 0.0,
            "limit": plan.limit,
            "seed": plan.seed,
            "skipped": missing | {name: why for _, loaded in prepared for name, why in loaded.missing.items()},
            "complete": False,
        }
        for item, loaded in prepared:
            found, samples = _run(lm, item, loaded, plan)
            results["tasks"] |= found
            results["seconds"] = round(time.time() - started, 3)
            results["complete"] = item is prepared[-1][0]
            if out is not None:
                for name, records in samples.items():
                    _write_samples(out / "samples" / f"{_file_name(name)}.jsonl", records)
                write_atomically(out / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
            if report is not None:
                report(item.label or item.task, found)
    return results


def _compile_templates_once() -> None:
    """lm-eval compiles a task's template anew for each question and each worked example: most of the time of MMLU."""
    from lm_eval.utils import env

    if not hasattr(env.from_string, "cache_info"):
        env.from_string = functools.lru_cache(maxsize=1024)(env.from_string)  # pyright: ignore[reportAttributeAccessIssue]


def quiet() -> None:
    """Let lm-eval and datasets speak of errors only; they report on every step otherwise."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # lm-eval's resampling would fork a process that has threads
    if not os.environ.get("QWENCH_DEBUG"):
        for name in ("lm_eval", "datasets", "huggingface_hub"):
            logging.getLogger(name).setLevel(logging.ERROR)


def _prepare_all(
    catalogue: Catalogue, items: Sequence[Item], roots: Sequence[Path]
) -> tuple[list[tuple[Item, Loaded]], dict[str, str]]:
    """The items that can run, and why optional ones cannot. Raises ValueError where none is left."""
    from qwench.evals.local_files import MissingDataError

    prepared: list[tuple[Item, Loaded]] = []
    missing: dict[str, str] = {}
    for item in items:
        try:
            prepared.append((item, _prepare(catalogue, item, roots)))
        except MissingDataError as error:
            if not item.optional:
                raise
            missing[item.label or item.task] = str(error)
    if missing and not prepared:
        raise MissingDataError(f"no task has its data here: {next(iter(missing.values()))}")
    return prepared, missing


def _prepare(catalogue: Catalogue, item: Item, roots: Sequence[Path]) -> Loaded:
    import datasets

    datasets.disable_progress_bars()
    loaded = catalogue.load(item.task, roots, item.overrides, item.num_fewshot)
    for task in loaded.tasks.values():
        if item.num_fewshot is not None and task.config.num_fewshot != 0:
            task.set_config("num_fewshot", item.num_fewshot)
        elif task.config.num_fewshot is None:
            task.set_config("num_fewshot", 0)
        shots: int = task.config.num_fewshot or 0
        if (there := sum(1 for _ in itertools.islice(task.fewshot_docs(), shots))) < shots:
            name = task.config.task
            raise ValueError(
                f"task {name}: {shots} worked examples are asked for, there are {there}; use --num-fewshot"
            )
    return loaded


def _refuse_twice(prepared: Sequence[tuple[Item, Loaded]]) -> None:
    seen: dict[str, str] = {}
    for item, loaded in prepared:
        label = item.label or item.task
        for name in {label, *(loaded.tasks if len(loaded.tasks) > 1 else ())}:
            if name in seen:
                raise ValueError(f"{name} would run twice, in {seen[name]} and in {label}; leave one of them out")
            seen[name] = label


def _refuse_without_template(prepared: Sequence[tuple[Item, Loaded]], why: str) -> None:
    """Raise ValueError where the model has no chat template and a task renders its conversations itself."""
    for _, loaded in prepared:
        for task in loaded.tasks.values():
            if why and (task.config.metadata or {}).get("chat") == "rendered":
                raise ValueError(why)


def _try_sandbox(prepared: Sequence[tuple[Item, Loaded]]) -> None:
    """Find out whether programs can be run here before answers are computed for hours. Raises ValueError."""
    tasks = [task for _, loaded in prepared for task in loaded.tasks.values()]
    languages = {language for task in tasks if (language := (task.config.metadata or {}).get("runs_code"))}
    if not languages:
        return
    from qwench.tools.sandbox import Sandbox

    with Sandbox(workers=1) as sandbox:
        for language in sorted(languages):
            result = sandbox.run("", language=language)
            if result.status != "ok":
                why = result.detail or result.stderr
                raise ValueError(f"an empty {language} program does not run in the sandbox: {why}")


def _run(
    lm: EngineLM, item: Item, loaded: Loaded, plan: Plan
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """The results of one item's tasks and groups, and the samples of its tasks."""
    import numpy as np
    from lm_eval.evaluator import evaluate as lm_evaluate

    from qwench.evals.score import metrics_of, samples_of, scored_documents, setting_of

    wishes = {(task.config.metadata or {}).get("chat") for task in loaded.tasks.values()}
    chat = item.chat if item.chat is not None else "required" in wishes
    if wishes & {"own", "rendered"}:  # these ask raw text always, or render their conversations themselves
        chat = False
    random.seed(0)  # as lm-eval does
    np.random.seed(plan.seed)  # noqa: NPY002 - what its tasks draw from
    for task in loaded.tasks.values():
        task.set_fewshot_seed(plan.seed)
    started = time.perf_counter()
    raw: Any = lm_evaluate(
        lm,
        {"tasks": loaded.tasks, "groups": loaded.groups, "group_map": loaded.group_map},
        limit=plan.limit,  # pyright: ignore[reportArgumentType] - it takes shares as well
        bootstrap_iters=BOOTSTRAP,
        log_samples=True,
        system_instruction=item.system,
        apply_chat_template=chat,
        fewshot_as_multiturn=item.multiturn and chat,
    )
    seconds = time.perf_counter() - started
    found: dict[str, Any] = {}
    samples: dict[str, list[dict[str, Any]]] = {}
    top = item.task if item.task in raw["results"] else next(iter(raw["results"]))
    template = lm.chat_template(chat)
    for name, values in raw["results"].items():
        label = (item.label or item.task) if name == top else name
        members = _leaves(name, raw.get("group_subtasks", {}), loaded.tasks)
        count = sum(raw["n-samples"][leaf]["effective"] for leaf in members)
        entry: dict[str, Any] = {
            "alias": str(values.get("alias", name)).strip(" -"),
            "group": name not in loaded.tasks,
            "subtasks": members if name not in loaded.tasks else [],
            "metrics": metrics_of(
                values, raw["higher_is_better"].get(name, {}), count, scored_documents(raw["samples"].get(name, ()))
            ),
            "n": count,
            "tokens": _tokens(lm, members),
        }
        if name in loaded.tasks:
            task, source = loaded.tasks[name], loaded.sources.get(name)
            entry["setting"] = setting_of(
                task,
                task.instances,
                chat=chat,
                system=item.system,
                multiturn=item.multiturn,
                template=template,
                generation=lm.generation.get(name),
                seed=plan.seed,
                source={} if source is None else _source(source, raw["n-samples"][name]),
            )
            samples[label] = samples_of(raw["samples"][name])
        if name == top:
            entry["seconds"] = round(seconds, 3)
            new = entry["tokens"]["prompt"] + entry["tokens"]["generated"]
            entry["tokens_per_second"] = round(new / seconds, 2) if seconds > 0 else None
            if item.published:
                entry["published"] = dict(item.published)
        wanted = item.metric or (loaded.tasks[members[0]].config.metadata or {}).get("primary", "")
        entry["primary"] = primary(entry["metrics"], wanted)
        found[label] = entry
    return found, samples


def primary(metrics: Mapping[str, Any], wanted: str = "") -> str | None:
    """The metric that stands for a task: the one wanted, else the first."""
    if wanted:
        matching = [name for name in metrics if name == wanted or name.startswith(f"{wanted},")]
        if matching:
            return matching[0]
    return next(iter(metrics), None)


def _leaves(name: str, members: Mapping[str, Sequence[str]], tasks: Mapping[str, Any]) -> list[str]:
    if name in tasks:
        return [name]
    return [leaf for member in members.get(name, ()) for leaf in _leaves(member, members, tasks)]


def _tokens(lm: EngineLM, tasks: Sequence[str]) -> dict[str, int]:
    used = [lm.usage[task] for task in tasks]
    return {
        "requests": sum(u.requests for u in used),
        "resumed": sum(u.resumed for u in used),
        "prompt": sum(u.prompt_tokens for u in used),
        "cached": sum(u.cached_tokens for u in used),
        "generated": sum(u.generated_tokens for u in used),
        "cut_prompts": sum(u.cut_prompts for u in used),
        "cut_answers": sum(u.cut_answers for u in used),
    }


def _source(source: Any, counts: Mapping[str, int]) -> dict[str, Any]:
    return {
        "path": source.path,
        "name": source.name,
        "from": "hub" if source.hub else "files" if source.files else "made",
        "files": source.files,
        "notes": source.notes,
        "documents": counts["original"],
    }


def _write_samples(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _file_name(task: str) -> str:
    return "".join(c if c.isalnum() or c in "-_.+" else "_" for c in task)


def _version(package: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
