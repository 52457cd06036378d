"""The sandbox: programs that a model wrote, each in a process of its own that can reach nothing but its scratch.

No network, no files but its scratch (interpreter and standard library are readable), no secrets in its environment,
and limits on processor seconds, wall time, memory, processes, output and files. The confinement is sandlock (Landlock
and seccomp, no root needed), else bubblewrap (namespaces); where neither works there is no sandbox and the constructor
says what to do. Nothing here runs a program without one. docs/sandbox.md has the design and what it does not promise.

    with Sandbox() as sandbox:
        result = sandbox.run("print(6 * 7)")
        results = sandbox.run_many(["print(1)", Program("console.log(2)", language="javascript")])
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import queue
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, cast

from qwench.tools.languages import LANGUAGES, language, system_readable
from qwench.tools.leftovers import remove_tree
from qwench.tools.sandbox_worker import receive, send

Status = Literal["ok", "error", "timeout", "memory", "output", "killed"]
Confinement = Literal["auto", "sandlock", "bubblewrap"]
_REPLY_GRACE_S = 30.0  # a worker that has not answered this long after the wall limit is replaced
_ATTEMPTS = 2
_MB = 1 << 20


class SandboxUnavailable(ValueError):
    """No confinement works on this machine."""


@dataclass(frozen=True)
class SandboxLimits:
    """What one program may use, its child processes included.

    `cpu_s` is processor time and the limit that counts: a busy machine does not make a program fail. `wall_s` ends
    those that sleep. `file_mb` holds for each file and for all together, `output_bytes` for stdout and stderr each.
    """

    cpu_s: float = 5.0
    wall_s: float = 60.0
    memory_mb: int = 1024
    processes: int = 16
    output_bytes: int = 1 << 20
    file_mb: int = 64

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} of the sandbox's limits must be more than 0, not {getattr(self, name)}")


@dataclass(frozen=True)
class Program:
    """One program of `Sandbox.run_many`. `files` lie beside it: relative paths and contents."""

    source: str
    language: str = "python"
    stdin: str | bytes = ""
    files: Mapping[str, bytes | str] = field(default_factory=dict)
    limits: SandboxLimits | None = None


@dataclass(frozen=True)
class SandboxResult:
    """How a program ended. `exit_code` is minus the signal's number where one ended it.

    `status`: ok (exit code 0), error (any other end of its own), timeout (processor or wall time), memory, output
    (wrote too much; what is here is cut), killed (too many files, processes or threads, or the worker was lost).
    `detail` says it in words. `files` are the regular files it left that are new or changed.
    """

    status: Status
    stdout: str
    stderr: str
    exit_code: int
    cpu_s: float
    wall_s: float
    files: dict[str, bytes]
    detail: str = ""


class _WorkerLost(Exception):
    pass


class _Worker:
    """A worker process and the pipes to it."""

    def __init__(self, confinement: str, directory: Path):
        directory.mkdir(mode=0o700)
        self.directory = directory
        places = [str(Path(__file__).resolve().parents[2])]
        spec = importlib.util.find_spec("sandlock") if confinement == "sandlock" else None
        if spec is not None and spec.origin:
            places.append(str(Path(spec.origin).parents[1]))  # wherever this process would import it from
        code = (
            f"import sys; sys.path += {places!r}; from qwench.tools.sandbox_worker import main; "
            f"main({confinement!r}, {str(directory)!r})"
        )
        self._guard = subprocess.Popen(
            [sys.executable, "-s", "-B", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8"},  # no secrets, for itself neither
            start_new_session=True,
        )
        self._requests = cast(BinaryIO, self._guard.stdin)
        self._replies = cast(BinaryIO, self._guard.stdout)
        self.process = 0
        hello = self.reply(_REPLY_GRACE_S)
        if "error" in hello:
            self.close()
            raise SandboxUnavailable(str(hello["error"]))
        self.process = int(hello["worker"])

    def reply(self, timeout_s: float) -> dict[str, Any]:
        end = time.monotonic() + timeout_s
        poll = select.poll()
        poll.register(self._replies, select.POLLIN)
        while not poll.poll(max(0.0, 1000 * (end - time.monotonic()))):
            if time.monotonic() >= end:
                raise _WorkerLost("it did not answer")
        try:
            return cast(dict[str, Any], receive(self._replies))
        except (EOFError, OSError, ValueError) as error:
            raise _WorkerLost("it ended") from error

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            send(self._requests, request)
        except OSError as error:
            raise _WorkerLost("it ended") from error
        return self.reply(request["wall_s"] + _REPLY_GRACE_S)

    def close(self, at_once: bool = False) -> None:
        """End it; its guard kills what it started and removes its directory."""
        if at_once and self.process:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process, signal.SIGKILL)
        for stream in (self._requests, self._replies):
            with contextlib.suppress(OSError):
                stream.close()
        self._guard.wait()


@functools.cache
def _confinement(wanted: Confinement) -> Literal["sandlock", "bubblewrap"]:
    """The confinement that holds here: each is tried with a program that tries to get out."""
    reasons: dict[str, str] = {}
    for name in ("sandlock", "bubblewrap") if wanted == "auto" else (wanted,):
        reasons[name] = _why_not(name)
        if not reasons[name]:
            return cast(Literal["sandlock", "bubblewrap"], name)
    why = "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())
    raise SandboxUnavailable(
        "programs written by a model run only in a sandbox, and none works on this machine:\n"
        f"{why}\n"
        "sandlock: pip install 'qwench[eval]', Linux 6.12 or newer with landlock among its security modules "
        "(CONFIG_LSM or lsm= at boot). bubblewrap: install the package bubblewrap (bwrap) and allow user namespaces "
        "(Ubuntu: sysctl kernel.apparmor_restrict_unprivileged_userns=0; in a container: --security-opt "
        "seccomp=unconfined)."
    )


_ESCAPES = """
import os, sys
found = []
def attempt(name, action):
    try:
        action()
    except OSError:
        return
    found.append(name)
secret, parent = sys.stdin.read().split("\\n")
attempt("a file outside is readable", lambda: open(secret).read())
attempt("a file outside is writable", lambda: open(secret, "a").close())
attempt("a directory outside is writable", lambda: open(os.path.join(os.path.dirname(secret), "new"), "w").close())
attempt("a process outside can be signalled", lambda: os.kill(int(parent), 0))
import _socket
attempt("sockets can be made", lambda: _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM))
open("inside", "w").write("fine")
os.chmod(secret, 0o777)
print(found or "confined")
"""


def _why_not(name: Literal["sandlock", "bubblewrap"]) -> str:
    """Why this confinement cannot be used here; empty if it can."""
    if not sys.platform.startswith("linux"):
        return "needs Linux"
    if name == "bubblewrap" and shutil.which("bwrap") is None:
        return "bwrap is not installed"
    if name == "sandlock":
        try:
            import sandlock
        except (ImportError, OSError) as error:
            return f"not installed ({error})"
        have, need = sandlock.landlock_abi_version(), sandlock.min_landlock_abi()
        if have < need:
            return f"needs Landlock ABI {need}; this kernel has {have if have > 0 else 'none'}"
    with tempfile.TemporaryDirectory(prefix="qwench-sandbox-test-") as directory:
        secret = Path(directory) / "secret"
        secret.write_text("outside")
        secret.chmod(0o600)
        try:
            with Sandbox(workers=1, confinement=name, _trusted=True) as sandbox:
                result = sandbox.run(_ESCAPES, stdin=f"{secret}\n{os.getpid()}")
        except (SandboxUnavailable, OSError) as error:
            return str(error)
        if result.stdout.strip() != "confined" or secret.stat().st_mode & 0o777 != 0o600:
            return f"does not hold here: {result.stdout.strip() or result.stderr.strip() or result.detail}"
    return ""


class Sandbox:
    """A pool of workers that run programs one at a time each; safe to call from several threads.

    `limits` hold where a program brings none of its own. `workers` 0: one for each processor that this process may
    use. `readable` adds paths that programs may read (a package directory, data). `scratch`: where the scratch
    directories lie (default: /dev/shm where it has room, else the system's temporary directory). Raises
    SandboxUnavailable, with what to do, where programs cannot be confined.
    """

    def __init__(
        self,
        limits: SandboxLimits | None = None,
        workers: int = 0,
        *,
        readable: Sequence[str | Path] = (),
        scratch: Path | None = None,
        confinement: Confinement = "auto",
        _trusted: bool = False,
    ):
        if workers < 0:
            raise ValueError(f"workers must be 0 (one for each processor) or more, not {workers}")
        self.limits = limits or SandboxLimits()
        self.confinement = confinement if _trusted else _confinement(confinement)
        self.workers = workers or len(os.sched_getaffinity(0))
        self._readable = tuple(str(Path(path).resolve(strict=True)) for path in readable)
        self._root = Path(tempfile.mkdtemp(prefix="qwench-sandbox-", dir=scratch or self._place()))
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(self.workers):
            self._idle.put(None)  # started when it is first needed
        self._lock = threading.Lock()
        self._commands: dict[str, tuple[str, tuple[str, ...]]] = {}
        self._numbers = 0
        self._closed = False
        self._started: set[_Worker] = set()
        self._finalizer = weakref.finalize(self, _close, self._started, self._root)

    def _place(self) -> Path | None:
        """Memory rather than a disk if there is plenty: scratch is small and short-lived. None: the usual place."""
        memory = Path("/dev/shm")
        with contextlib.suppress(OSError):
            if (
                os.access(memory, os.W_OK)
                and shutil.disk_usage(memory).free > 4 * self.workers * _MB * self.limits.file_mb
            ):
                return memory
        return None

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers and remove everything. Later calls of `run` raise ValueError."""
        self._closed = True
        self._finalizer()

    def run(
        self,
        program: str,
        *,
        language: str = "python",
        stdin: str | bytes = "",
        files: Mapping[str, bytes | str] | None = None,
        limits: SandboxLimits | None = None,
    ) -> SandboxResult:
        """Run one program. ValueError for an unknown language, a missing interpreter or a bad file name."""
        return self._run(Program(program, language, stdin, files or {}, limits))

    def run_many(self, programs: Sequence[str | Program]) -> list[SandboxResult]:
        """Run all on the pool; results in the order of `programs`."""
        whole = [Program(program) if isinstance(program, str) else program for program in programs]
        for program in whole:
            self._check(program)  # a bad one is told before anything runs
        with ThreadPoolExecutor(self.workers, thread_name_prefix="sandbox") as pool:
            return list(pool.map(self._run, whole))

    def _check(self, program: Program) -> tuple[str, tuple[str, ...]]:
        """The command of a program's language and what it may read; ValueError for what cannot run."""
        for name in program.files:
            path = PurePosixPath(name)
            if not name or path.is_absolute() or ".." in path.parts or "\0" in name or path == PurePosixPath("."):
                raise ValueError(f"a file beside a program needs a relative path without '..', not {name!r}")
        with self._lock:
            if program.language not in self._commands:
                row, interpreter = language(program.language)
                command = row.place(interpreter, self._root)
                home = (str(self._root / row.name),) if command != interpreter else ()
                paths = (*system_readable(), *row.readable(interpreter), *home)
                readable = tuple(dict.fromkeys(path for path in paths if Path(path).exists()))
                self._commands[program.language] = command, readable
        main = LANGUAGES[program.language].file
        if main in program.files:
            raise ValueError(f"{main} is the program itself; give its file another name")
        return self._commands[program.language]

    def _number(self) -> int:
        with self._lock:
            self._numbers += 1
            return self._numbers

    def _worker(self, old: _Worker | None) -> _Worker:
        if old is not None:
            return old
        worker = _Worker(self.confinement, self._root / f"worker-{self._number()}")
        self._started.add(worker)
        return worker

    def _run(self, program: Program) -> SandboxResult:
        if self._closed:
            raise ValueError("this sandbox is closed")
        limits = program.limits or self.limits
        command, readable = self._check(program)
        row = LANGUAGES[program.language]
        lost = ""
        for _ in range(_ATTEMPTS):
            worker = self._idle.get()
            try:
                worker = self._worker(worker)
                scratch = worker.directory / str(self._number())
                _write_files(scratch, program)
                request = {
                    "argv": [command, *row.arguments(limits.memory_mb), row.file],
                    "env": _environment(scratch),
                    "scratch": str(scratch),
                    "readable": [*readable, *self._readable],
                    "stdin": program.stdin.encode() if isinstance(program.stdin, str) else program.stdin,
                    "cpu_s": limits.cpu_s,
                    "wall_s": limits.wall_s,
                    "memory_mb": limits.memory_mb,
                    "processes": limits.processes,
                    "output_bytes": limits.output_bytes,
                    "file_mb": limits.file_mb,
                }
                reply = worker.ask(request)
                if "error" in reply:
                    raise _WorkerLost(str(reply["error"]))
                files = _read_files(scratch, program, limits.file_mb * _MB) if reply["status"] == "ok" else {}
                remove_tree(scratch)
                text = {name: reply.pop(name).decode("utf-8", "replace") for name in ("stdout", "stderr")}
                return SandboxResult(**reply, **text, files=files)
            except _WorkerLost as error:
                lost = str(error)
                if worker is not None:
                    worker.close(at_once=True)
                    self._started.discard(worker)
                    worker = None
            finally:
                self._idle.put(worker)
        return SandboxResult("killed", "", "", -signal.SIGKILL, 0.0, 0.0, {}, f"the sandbox's worker was lost: {lost}")


def _environment(scratch: Path) -> dict[str, str]:
    return {
        "HOME": str(scratch),
        "TMPDIR": str(scratch),
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "TZ": "UTC",
        "OPENSSL_CONF": "/dev/null",  # node reads it at its start
        "PYTHONHASHSEED": "0",  # the same order of sets every time
        "OMP_NUM_THREADS": "1",
    }


def _write_files(scratch: Path, program: Program) -> None:
    scratch.mkdir(mode=0o700)
    given = {**program.files, LANGUAGES[program.language].file: program.source}
    for name, content in given.items():
        path = scratch / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)


def _read_files(scratch: Path, program: Program, most: int) -> dict[str, bytes]:
    """The regular files that a dead program left, without those it was given; links are not followed."""
    given = {**program.files, LANGUAGES[program.language].file: program.source}
    found: dict[str, bytes] = {}
    left = most
    todo = [scratch]
    while todo:
        with contextlib.suppress(OSError), os.scandir(todo.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    todo.append(Path(entry.path))
                    continue
                if not entry.is_file(follow_symlinks=False):
                    continue
                with contextlib.suppress(OSError):
                    if entry.stat(follow_symlinks=False).st_size > left:  # not read: thousands may be all holes
                        continue
                    descriptor = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                    with os.fdopen(descriptor, "rb") as file:
                        data = file.read(left + 1)
                    name = os.path.relpath(entry.path, scratch)
                    before = given.get(name)
                    same = data == (before.encode("utf-8", "surrogatepass") if isinstance(before, str) else before)
                    if same or len(data) > left:
                        continue
                    left -= len(data)
                    found[name] = data
    return dict(sorted(found.items()))


def _close(workers: set[_Worker], root: Path) -> None:
    while workers:
        workers.pop().close()
    remove_tree(root)
