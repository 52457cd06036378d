"""Tasks by name: lm-eval's own and ours, with data from local files where the hub is out of reach.

A task whose `dataset_path` has a local layout reads files where a data directory is given; all others ask the hub.
Members of a group whose files are missing are left out and reported, as long as one is there.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import functools
import importlib.metadata
import json
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import jinja2
import lm_eval.tasks
import pyarrow as pa
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.config.group import AggMetricConfig
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind, TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml
from yaml.parser import ParserError
from yaml.scanner import ScannerError

from qwench.evals.local_data import layouts
from qwench.evals.local_files import Files, MissingDataError
from qwench.run import console, write_atomically

log = logging.getLogger("qwench.evals")

TASKS = Path(__file__).parent / "tasks"
NLTK_DATA = Path(__file__).parent / "nltk_data"
"""Abbreviations of English in the form that nltk's sentence splitter reads."""
PROBE_SECONDS = 5


@functools.cache
def hub_answers() -> bool:
    """Whether the Hugging Face hub, or the mirror that HF_ENDPOINT names, can be reached from here."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return True  # it has answered
    except (TimeoutError, OSError, ValueError):
        return False
    return True


@dataclass
class Source:
    """Where a task's data came from."""

    path: str
    name: str | None
    hub: bool
    files: dict[str, str] = field(default_factory=dict)
    """Local files with their SHA-256."""
    notes: list[str] = field(default_factory=list)


@dataclass
class Loaded:
    """Tasks ready to run, as `TaskManager.load` gives them, and what was left out."""

    tasks: dict[str, Task]
    groups: dict[str, Group]
    group_map: dict[str, list[str]]
    sources: dict[str, Source]
    missing: dict[str, str]
    """Members of groups that cannot run here -> why."""


class LocalTaskFactory(TaskFactory):
    """Builds tasks with settings of a preset over their own, and with local data."""

    def __init__(
        self, roots: Sequence[Path], overrides: Mapping[str, Any], shots: int | None, meta: dict[str, Any] | None = None
    ) -> None:
        super().__init__(meta=meta)
        self.roots, self.overrides, self.shots = tuple(roots), dict(overrides), shots
        self.sources: dict[str, Source] = {}
        self.missing: dict[str, str] = {}

    def _load_full_config(self, entry: Entry, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        config = super()._load_full_config(entry, overrides)
        if entry.kind in (Kind.TASK, Kind.PY_TASK):
            for key, value in self.overrides.items():
                if isinstance(value, dict) and isinstance(config.get(key), dict):
                    config[key] = {**config[key], **value}
                else:
                    config[key] = value
        return config

    def _build_task(self, entry: Entry, overrides: dict[str, Any] | None) -> Task:
        if entry.yaml_path is not None and load_yaml(entry.yaml_path, resolve_func=False).get("unsafe_code"):
            raise ValueError(
                f"task {entry.name} would run model-written code unprotected; qwench runs code in its sandbox only. "
                "Tasks that do: humaneval, mbpp, multipl_e_js, humaneval_plus, mbpp_plus, each also as NAME_instruct"
            )
        if entry.yaml_path is not None and "ifeval" in entry.yaml_path.parts:
            sentence_data()
        config = self._load_full_config(entry, overrides)
        path, name = config.get("dataset_path"), config.get("dataset_name")
        own_data = callable(config.get("custom_dataset")) or "class" in config
        shots = config.get("num_fewshot") or 0
        if self.shots is not None and config.get("num_fewshot") != 0:
            shots = self.shots
        source = Source(str(path or ""), name, hub=not own_data)
        changes = dict(overrides or {})
        if path in layouts() and not own_data:
            splits, files = self._local(entry.name, str(path), name, shots)
            if splits is not None:
                source.hub = False
                source.files = {str(file): digest for file, digest in files.read.items()}
                source.notes = files.notes
                changes["custom_dataset"] = _always(splits)
                if files.no_shots:
                    changes["num_fewshot"] = 0
                if path == "google/IFEval":
                    _check_instructions(splits, files)
        if not path and not own_data:
            raise ValueError(f"task {entry.name} ({entry.yaml_path}) names no data; give it a dataset_path")
        if source.hub and path:
            self._refuse_without_hub(entry.name, str(path))
        self.sources[entry.name] = source
        try:
            return super()._build_task(entry, changes)
        except IndexError:  # lm-eval looks at the first question
            if not source.files:
                raise
            names = ", ".join(Path(file).name for file in source.files)
            raise MissingDataError(f"task {entry.name}: {names} has no questions of it") from None
        except jinja2.TemplateError as error:  # lm-eval fills in the first question
            raise ValueError(
                f"task {entry.name} ({entry.yaml_path}): a template does not fit the data: {error}"
            ) from None

    def _local(self, task: str, path: str, name: str | None, shots: int) -> tuple[datasets.DatasetDict | None, Files]:
        """The data set from local files; None where the hub has it and the files are not here."""
        files = Files(self.roots, shots)
        if not self.roots and hub_answers():
            return None, files
        try:
            splits = layouts()[path](files, name)
        except MissingDataError as error:
            if hub_answers() or in_cache(path):
                return None, files
            if not self.roots:
                raise MissingDataError(
                    f"task {task} needs {path} from the Hugging Face hub, which cannot be reached, or local files: "
                    "give their directory by --data-dir (docs/evaluation.md lists names)"
                ) from None
            raise MissingDataError(f"task {task}: {error}") from None
        for split, rows in splits.items():
            if not rows:
                raise ValueError(
                    f"task {task}: {', '.join(map(str, files.read))} leave no rows for its split {split!r}"
                )
        try:
            return datasets.DatasetDict(
                {split: datasets.Dataset.from_list(list(rows)) for split, rows in splits.items()}
            ), files
        except (pa.ArrowException, UnicodeEncodeError, OverflowError) as error:
            raise ValueError(
                f"task {task}: the rows of {', '.join(map(str, files.read))} do not fit into one table ({error}); a "
                "field should hold the same kind of value in every row"
            ) from None

    def _refuse_without_hub(self, task: str, path: str) -> None:
        """Say at once what would take half a minute of vain attempts; data that is in the hub's cache is used."""
        if hub_answers() or Path(path).exists() or path in ("json", "csv", "parquet", "text", "arrow"):
            return
        if in_cache(path):
            datasets.config.HF_HUB_OFFLINE = True
            return
        raise MissingDataError(
            f"task {task} needs the data set {path} from the Hugging Face hub, which cannot be reached; qwench has "
            "no local form for it. Run it where the hub answers, or fill the hub's cache there and copy it"
        )

    def _build_group_members(
        self,
        member_list: list[str | dict[str, Any]],
        group_name: str,
        overrides: dict[str, Any] | None,
        registry: dict[str, Entry],
    ) -> list[Task | Group]:
        expanded: list[str | dict[str, Any]] = []
        for item in member_list:
            entry = registry.get(item) if isinstance(item, str) else None
            expanded += sorted(entry.tags) if entry is not None and entry.kind is Kind.TAG else [item]
        children: list[Task | Group] = []
        for item in expanded:
            try:
                built = super()._build_group_members([item], group_name, overrides, registry)
            except MissingDataError as error:
                self.missing[str(item if isinstance(item, str) else item.get("task", item))] = str(error)
                continue
            children += [child for child in built if not isinstance(child, Group) or child.get_all_tasks()]
        return children

    def _build_tag(self, entry: Entry, overrides: dict[str, Any] | None, registry: Mapping[str, Entry]) -> list[Task]:
        tasks: list[Task] = []
        for name in sorted(entry.tags):
            try:
                tasks.append(self._build_task(registry[name], overrides))
            except MissingDataError as error:
                self.missing[name] = str(error)
        return tasks


def _check_instructions(splits: datasets.DatasetDict, files: Files) -> None:
    """Raise ValueError for instructions that IFEval's checker does not know: it would fail behind all answers."""
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    rows: list[dict[str, Any]] = [row for split in splits.values() for row in split.to_list()]
    for row in rows:
        given = row["instruction_id_list"]
        unknown = [name for name in given if name not in INSTRUCTION_DICT]
        if unknown or not given:
            what = f"the instruction {unknown[0]!r}, which IFEval does not know" if unknown else "no instructions"
            raise ValueError(f"{', '.join(map(str, files.read))}: the question with the key {row['key']} has {what}")


def _refuse_broken(path: Path) -> None:
    """Raise ValueError for a task file of one's own that is no YAML; lm-eval leaves it out without a word."""
    try:
        load_yaml(path, resolve_func=False)
    except (ScannerError, ParserError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML that can be read: {' '.join(str(error).split())}") from None


def in_cache(path: str) -> bool:
    """Whether a data set of the hub was loaded here before."""
    return (Path(datasets.config.HF_DATASETS_CACHE) / path.replace("/", "___")).exists()


def sentence_data() -> None:
    """Let nltk find what splits text into sentences, which it would fetch from the net otherwise.

    nltk's own data go first where they are installed or can be fetched.
    """
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        if hub_answers() and nltk.download("punkt_tab", quiet=True):
            return
        nltk.data.path.append(str(NLTK_DATA))


def _lm_eval_index() -> dict[str, Entry]:
    """lm-eval's tasks by name. Reading its fourteen thousand files takes many seconds, so what they say is kept."""
    root = Path(lm_eval.tasks.__file__).parent
    version = importlib.metadata.version("lm_eval")
    cache = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwench" / f"lm_eval-{version}-tasks.json"
    )
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(cache.read_text(encoding="utf-8"))
        if known["root"] == str(root):
            return {
                name: Entry(name, Kind[kind], None if path is None else root / path, tags=set(tags))
                for name, kind, path, tags in known["tasks"]
            }
    with console.status(f"reading the tasks of lm-eval {version} (once)"):
        index = TaskIndex.build([root])
    lines = [
        (
            name,
            entry.kind.name,
            None if entry.yaml_path is None else str(entry.yaml_path.relative_to(root)),
            sorted(entry.tags),
        )
        for name, entry in index.items()
    ]
    with contextlib.suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cache, json.dumps({"root": str(root), "tasks": lines}))
    return index


def _always(splits: datasets.DatasetDict) -> Any:
    """A function for `custom_dataset`, which lm-eval calls with a task's metadata."""

    def local_data(**metadata: Any) -> datasets.DatasetDict:
        return splits

    return local_data


class Catalogue:
    """All tasks that there are, lm-eval's and ours; a name of ours goes before the same name of lm-eval."""

    def __init__(self, include: Sequence[Path] = (), families: Sequence[str] | None = None) -> None:
        """`include`: directories with further YAML tasks, whose names go before all others. `families`: folders of
        lm-eval's tasks to know of (all by default, which takes a moment)."""
        for directory in include:
            if not directory.is_dir():
                raise ValueError(f"--include-path {directory} is no directory; give one that holds YAML tasks")
        self.manager = TaskManager(include_defaults=False)
        index = self.manager._index
        if families is None:
            index.update(_lm_eval_index())
        else:
            index.update(TaskIndex.build([Path(lm_eval.tasks.__file__).parent / family for family in families]))
        for name, entry in TaskIndex.build([TASKS]).items():
            if entry.kind is Kind.TAG and name in index:
                index[name].tags |= entry.tags
            else:
                index[name] = entry
        for directory in include:
            for path in sorted(directory.rglob("*.yaml")):
                _refuse_broken(path)
        index.update(TaskIndex.build(list(include)))
        self.index: Mapping[str, Entry] = index

    def names(self, pattern: str = "") -> list[str]:
        """Tasks, groups and tags; `pattern` may have wildcards, else it is a part of the name."""
        names = sorted(self.index)
        if not pattern:
            return names
        if any(sign in pattern for sign in "*?["):
            return [name for name in names if fnmatch.fnmatch(name, pattern)]
        return [name for name in names if pattern in name]

    def is_ours(self, name: str) -> bool:
        path = self.index[name].yaml_path
        return path is not None and path.is_relative_to(TASKS)

    def matching(self, name: str) -> list[str]:
        """The tasks that a name on the command line means. Raises ValueError with a suggestion."""
        if name in self.index:
            return [name]
        if Path(name).suffix in (".yaml", ".yml"):
            if not Path(name).is_file():
                raise ValueError(f"there is no file {name}; give a YAML file of a task, or a name of --list-tasks")
            _refuse_broken(Path(name))
            return [name]
        if any(sign in name for sign in "*?[") and (found := self.names(name)):
            return found
        near = difflib.get_close_matches(name, self.index, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "qwench eval --list-tasks shows all"
        raise ValueError(f"there is no task {name!r}; {hint}")

    def try_files(self, name: str, roots: Sequence[Path]) -> None:
        """Read the local files of a single task, so that a mistake in them is told before a model is loaded.

        Raises ValueError. Groups and tasks without a local form are left to `load`.
        """
        entry = self.index.get(name)
        if entry is None or entry.kind is not Kind.TASK or entry.yaml_path is None:
            return
        config = load_yaml(entry.yaml_path, resolve_func=False)
        path = config.get("dataset_path")
        if path in layouts() and "custom_dataset" not in config:
            LocalTaskFactory(roots, {}, None)._local(name, path, config.get("dataset_name"), shots=0)

    def load(
        self,
        name: str,
        roots: Sequence[Path] = (),
        overrides: Mapping[str, Any] | None = None,
        shots: int | None = None,
    ) -> Loaded:
        """A task, group or tag with its data. Raises ValueError for what is missing or broken."""
        factory = LocalTaskFactory(roots, overrides or {}, shots)
        self.manager._factory = factory
        try:
            found = self.manager.load([name])
        except ModuleNotFoundError as error:
            raise ValueError(
                f"task {name} needs the package {error.name}; install it with: pip install 'qwench[eval]'"
            ) from None
        tasks = found["tasks"]
        if not tasks:
            why = next(iter(factory.missing.values()), "it has no members")
            raise MissingDataError(f"no part of {name} can run: {why}")
        for task_name, task in tasks.items():
            if isinstance(task, ConfigurableTask) and not len(task.eval_docs):
                raise ValueError(f"task {task_name} has no questions; check its data file")
        _average_what_is_there(found.get("groups", {}).values(), overrides or {})
        return Loaded(
            tasks=tasks,
            groups=found.get("groups", {}),
            group_map=found.get("group_map", {}),
            sources=factory.sources,
            missing=factory.missing,
        )


def _average_what_is_there(groups: Iterable[Group], overrides: Mapping[str, Any]) -> None:
    """Let groups average the metrics and readings that overrides gave their members, not those that were replaced."""
    for group in groups:
        if "metric_list" in overrides and group.aggregate_metric_list:
            group.aggregate_metric_list = [AggMetricConfig(one["metric"]) for one in overrides["metric_list"]]
        elif "filter_list" in overrides:
            for metric in group.aggregate_metric_list or ():
                metric.filter_list = None  # those that the members have
