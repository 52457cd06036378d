"""Trackers follow metrics.jsonl, which stays the truth: TensorBoard, Weights & Biases, trackio.

    with Trackers(run.path, recipe.follow) as trackers:      # nothing for what the recipe does not name
        trackers.put({"step": 1, "loss": 2.3, ...})          # a record as metrics.jsonl has it

Each tracker has a thread that takes records from a queue, so a slow network or a missing login costs the run nothing;
the first error switches the tracker off with one warning. `qwench follow RUN` feeds them a finished run's records.

A resumed run repeats the steps after its checkpoint. TensorBoard is told to forget them (`purge_step`), as
metrics.jsonl does. The other two cannot forget: what they have been sent is kept by metric in RUN/follow/NAME.json, and
a value of a step that they have already is not sent again. On a GPU it may have differed in its last digits.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import netrc
import os
import queue
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from rich.markup import escape

from qwench import config
from qwench.run import console, read_metrics, write_atomically
from qwench.train.config import FollowConfig

log = logging.getLogger("qwench.train")

Record = Mapping[str, Any]
CLOSING_S = 60.0
"""Time for the trackers to send what is left when a run ends."""


class Writer(Protocol):
    """One tracker, used by one thread."""

    def write(self, step: int, values: dict[str, float], wall_time: float | None) -> None: ...
    def close(self) -> None: ...


# ------------------------------------------------------------------------------------------------------------ writers
class TensorBoard:
    """Event files in RUN/tensorboard; steps from `first_step` on that are there already disappear."""

    def __init__(self, run: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ImportError("follow.tensorboard needs the package tensorboard; pip install tensorboard") from None
        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=first_step)

    def write(self, step: int, values: dict[str, float], wall_time: float | None) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, walltime=wall_time)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run that keeps its id, so that a resumed one goes on in it; offline where no key is known."""

    def __init__(self, run: Path, project: str, name: str, recipe: dict[str, Any], identity: str) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ImportError("follow.wandb_project needs the package wandb; pip install wandb") from None
        mode = None if "WANDB_MODE" in os.environ or _wandb_key_known() else "offline"
        if mode:
            console.print(f"wandb: no key is known, the run is kept in {escape(str(run / 'wandb'))} for `wandb sync`")
        self._run = wandb.init(
            project=project,
            name=name,
            id=identity,
            resume="allow",
            dir=str(run),
            config=recipe,
            mode=mode,
            settings=wandb.Settings(console="off", silent=True),
        )

    def write(self, step: int, values: dict[str, float], wall_time: float | None) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


def _wandb_key_known() -> bool:
    """Whether wandb would log in without asking on the terminal."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").partition("://")[2].partition("/")[0]
    files = (
        [Path(os.environ["NETRC"])] if "NETRC" in os.environ else [Path.home() / name for name in (".netrc", "_netrc")]
    )
    for file in files:
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(file).authenticators(host):
                return True
    return False


class Trackio:
    """A run in trackio's local tables (TRACKIO_DIR), or where its own variables send it."""

    def __init__(self, project: str, name: str, recipe: dict[str, Any]) -> None:
        try:
            import trackio  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ImportError("follow.trackio_project needs the package trackio; pip install trackio") from None
        # Its own sampling of processors would go on in threads of its own.
        settings: dict[str, Any] = {"auto_log_gpu": False, "auto_log_cpu": False, "embed": False}
        self._run = trackio.init(project, name=name, resume="allow", config=recipe, **settings)

    def write(self, step: int, values: dict[str, float], wall_time: float | None) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


# ------------------------------------------------------------------------------------------------------------ threads
class _Following(threading.Thread):
    """Feeds one tracker from a queue. `begin` makes its writer, given the step of the first record."""

    def __init__(self, kind: str, begin: Callable[[int], Writer], sent: Path | None) -> None:
        super().__init__(name=f"qwench-follow-{kind}", daemon=True)
        self.kind, self.begin, self.sent_path = kind, begin, sent
        self.records: queue.SimpleQueue[Record | None] = queue.SimpleQueue()
        self.failed = False
        self.start()

    def run(self) -> None:
        writer: Writer | None = None
        try:
            before = _read_sent(self.sent_path)
            now = dict(before)
            while (record := self.records.get()) is not None:
                step = int(record.get("step", 0))
                values = {k: v for k, v in flat(record).items() if self.sent_path is None or step > before.get(k, -1)}
                if writer is None:
                    writer = self.begin(step)
                if values:
                    writer.write(step, values, record.get("time"))
                now |= dict.fromkeys(values, step)
                if self.sent_path is not None and self.records.empty():
                    _write_sent(self.sent_path, now)
            if writer is not None:
                writer.close()
            if self.sent_path is not None:
                _write_sent(self.sent_path, now)
        except BaseException as error:  # wandb ends threads with SystemExit-like errors too
            self.failed = True
            message = f"{self.kind} follows this run no longer: {type(error).__name__}: {error}"
            log.warning("%s", message, exc_info=error)
            console.print(f"[yellow]warning[/]: {escape(message.splitlines()[0])} (metrics.jsonl has everything)")
            with contextlib.suppress(BaseException):
                if writer is not None:
                    writer.close()


def flat(record: Record) -> dict[str, float]:
    """The numbers of a record: {"loss_by_source": {"web": 2.0}} becomes {"loss_by_source/web": 2.0}.

    A skipped step has skipped = 1; times and steps are no metrics.
    """
    values: dict[str, float] = {}
    for key, value in record.items():
        if key in ("time", "step"):
            continue
        if isinstance(value, Mapping):
            inner = flat(cast("Record", value))
            values |= {f"{key}/{name}": number for name, number in inner.items()}
        elif key == "skipped":
            values[key] = 1.0
        elif isinstance(value, int | float):
            values[key] = float(value)
    return values


def _read_sent(path: Path | None) -> dict[str, int]:
    """The last step of each metric that the tracker has."""
    if path is None or not path.exists():
        return {}
    return {name: int(step) for name, step in json.loads(path.read_text(encoding="utf-8"))["sent"].items()}


def _write_sent(path: Path, sent: Mapping[str, int]) -> None:
    write_atomically(path, json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"sent": dict(sent)}) + "\n")


def _identity(path: Path, project: str) -> str:
    """The id under which a tracker knows the run. Another project begins anew."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["project"] == project:
            return table["id"]
    path.parent.mkdir(parents=True, exist_ok=True)
    identity = uuid.uuid4().hex[:12]
    write_atomically(path, json.dumps({"project": project, "id": identity, "sent": {}}) + "\n")
    return identity


class Trackers:
    """The trackers that a recipe names."""

    def __init__(self, run: Path, cfg: FollowConfig) -> None:
        self.run, self.cfg = run, cfg
        self.threads: list[_Following] = []

    def __enter__(self) -> Trackers:
        cfg, run = self.cfg, self.run
        name = cfg.name or run.resolve().name
        recorded = run / "config.toml"
        recipe = config.read_toml(recorded) if recorded.exists() else {}
        if cfg.tensorboard:
            self.threads.append(_Following("TensorBoard", lambda first: TensorBoard(run, first), None))
        if (project := cfg.wandb_project) is not None:
            sent = run / "follow" / "wandb.json"
            identity = _identity(sent, project)
            self.threads.append(_Following("wandb", lambda _: WandB(run, project, name, recipe, identity), sent))
        if (table := cfg.trackio_project) is not None:
            sent = run / "follow" / "trackio.json"
            identity = _identity(sent, table)
            unique = name if cfg.name else f"{name}-{identity[:6]}"  # it knows runs by their names alone
            self.threads.append(_Following("trackio", lambda _: Trackio(table, unique, recipe), sent))
        return self

    def put(self, record: Record) -> None:
        """Never waits, never raises."""
        for thread in self.threads:
            thread.records.put(record)

    def close(self) -> None:
        for thread in self.threads:
            thread.records.put(None)
        for thread in self.threads:
            thread.join(CLOSING_S)
            if thread.is_alive():
                console.print(f"[yellow]warning[/]: {thread.kind} does not finish; it misses the last records")

    def __exit__(self, *exception: object) -> None:
        self.close()


def main(argv: list[str]) -> int:
    """`qwench follow RUN`: give a run's records to trackers after the fact."""
    parser = argparse.ArgumentParser(
        prog="qwench follow",
        description="Give the records of a run's metrics.jsonl to the trackers that its recipe, or the command, names.",
    )
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument(
        "overrides", nargs="*", help="tensorboard=true, wandb_project=NAME, trackio_project=NAME, name=NAME"
    )
    args = parser.parse_args(argv)
    logging.getLogger("qwench").addHandler(logging.NullHandler())  # a tracker that fails says so itself, in one line
    if not (args.run / "metrics.jsonl").is_file():
        raise ValueError(f"{args.run} has no metrics.jsonl; give the directory of a run (out=... of its recipe)")
    table: dict[str, Any] = {}
    if (args.run / "config.toml").exists():
        table = config.read_toml(args.run / "config.toml").get("follow", {})
    for override in args.overrides:
        if not config.is_override(override):
            raise ValueError(f"{override!r} is no key=value; give for example tensorboard=true")
        table = config.merge(table, config.parse_override(override))
    cfg = config.from_dict(FollowConfig, table)
    if cfg.wandb_project is None and cfg.trackio_project is None and not cfg.tensorboard:
        raise ValueError("no tracker is named; give tensorboard=true, wandb_project=NAME or trackio_project=NAME")
    records = read_metrics(args.run)
    with Trackers(args.run, cfg) as trackers:
        for record in records:
            trackers.put(record)
    failed = [thread.kind for thread in trackers.threads if thread.failed or thread.is_alive()]
    sent = [thread.kind for thread in trackers.threads if thread.kind not in failed]
    print(f"{len(records)} records of {args.run} sent to {', '.join(sent) or 'nobody'}")
    return 1 if failed else 0
