"""One worker of the sandbox: a process that starts confined programs one after another, watches and ends them.

Two processes, in fact. The outer one, the guard, does nothing but wait for the inner one and then kill whatever is
left below it and remove the worker's directory, so that nothing outlives a worker that died. The inner one drops its
privileges, puts itself and its children under the system-call filter, and serves requests (marshal, with a length in
front: unlike pickle it cannot run anything at the reader's). It is no part of the confinement that a program could
talk to: the program inherits three pipes and nothing else.

This module imports the standard library, its neighbours and, when that is the confinement, sandlock.
"""

from __future__ import annotations

import contextlib
import ctypes
import marshal
import math
import os
import selectors
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from qwench.tools import seccomp
from qwench.tools.leftovers import cpu_of_the_dead, descendants, disk_use, hidden_files, remove_tree, sweep, usage

TICK_S = 0.02  # how often a running program's processor time, memory, files and processes are looked at
THREADS_PER_PROCESS = 16
OPEN_FILES = 128
_MEMORY_SIGNS = (b"MemoryError", b"heap out of memory", b"Cannot allocate memory", b"Out of memory!")


def send(stream: BinaryIO, message: Any) -> None:
    data = marshal.dumps(message)
    stream.write(struct.pack("<Q", len(data)) + data)
    stream.flush()


def receive(stream: BinaryIO) -> Any:
    """The next message. Raises EOFError when the other side is gone."""
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError
    (size,) = struct.unpack("<Q", head)
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return marshal.loads(data)


# ---------------------------------------------------------------------------------------------- confinements


class Confined(Protocol):
    """A started program, its pipes and how to wait for it once it is dead."""

    pid: int
    stdin: Any
    stdout: Any
    stderr: Any

    def wait(self) -> int:
        """Its exit code; minus the signal that ended it."""
        ...


class _Sandlocked:
    def __init__(self, request: dict[str, Any]):
        import sandlock

        piped, null = sandlock.StdioMode.PIPED, sandlock.StdioMode.NULL
        self._sandbox = sandlock.Sandbox(
            fs_readable=request["readable"],
            fs_writable=[request["scratch"], "/dev/null"],
            cwd=request["scratch"],
            clean_env=True,
            env=request["env"],
            max_processes=request["processes"],
            no_coredump=True,
        )
        stdin = piped if request["stdin"] else null
        self._process = self._sandbox.popen(request["argv"], stdin=stdin, stdout=piped, stderr=piped)
        self.stdin, self.stdout, self.stderr = self._process.stdin, self._process.stdout, self._process.stderr
        self.pid = self._process.pid or -1

    def wait(self) -> int:
        result = self._process.wait(timeout=5)
        if result.exit_code == -1 and result.signal <= 0:  # sandlock has no number for SIGKILL
            return -signal.SIGKILL
        return -result.signal if result.signal > 0 else result.exit_code


class _Bubblewrapped:
    """Namespaces instead of Landlock: the program sees a file system of its own with these paths in it."""

    def __init__(self, request: dict[str, Any]):
        scratch = request["scratch"]
        argv = [shutil.which("bwrap") or "bwrap", "--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc"]
        argv += ["--unshare-uts", "--unshare-cgroup-try", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
        argv += ["--clearenv", *(word for pair in request["env"].items() for word in ("--setenv", *pair))]
        for path in request["readable"]:
            device = stat.S_ISCHR(os.stat(path).st_mode)  # a device may be written, everything else is read-only
            argv += ["--dev-bind" if device else "--ro-bind", path, path]
        argv += ["--dev-bind", "/dev/null", "/dev/null", "--bind", scratch, scratch, "--chdir", scratch]
        argv += ["--remount-ro", "/"]
        reading, writing = os.pipe()
        os.write(writing, seccomp.program_filter(supervised=False))
        os.close(writing)
        argv += ["--seccomp", str(reading), "--", *request["argv"]]
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE if request["stdin"] else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(reading,),
            bufsize=0,
        )
        os.close(reading)
        self.stdin, self.stdout, self.stderr = self._process.stdin, self._process.stdout, self._process.stderr
        self.pid = self._process.pid

    def wait(self) -> int:
        code = self._process.wait(timeout=5)
        return 128 - code if code > 128 else code  # a signal inside, as bwrap reports it


CONFINEMENTS: dict[str, Callable[[dict[str, Any]], Confined]] = {"sandlock": _Sandlocked, "bubblewrap": _Bubblewrapped}


def limited(argv: list[str], cpu_s: float, memory_mb: int, file_mb: int) -> list[str]:
    """`argv` behind the limits that the kernel keeps for each process, set by the shell that becomes the program."""
    limits = {
        "t": math.ceil(cpu_s) + 1,
        "d": memory_mb * 1024,
        "f": file_mb * 2048,
        "n": OPEN_FILES,
        "c": 0,
    }
    script = "; ".join(f"ulimit -{letter} {value}" for letter, value in limits.items())
    return ["/bin/sh", "-c", f'{script}; exec "$@"', "sh", *argv]


# ---------------------------------------------------------------------------------------------- one program


class _Watch:
    """What is looked at while a program runs; `reason` says why it must end."""

    def __init__(self, request: dict[str, Any], program: Confined):
        self.request, self.program = request, program
        self.started, self.dead_before = time.monotonic(), cpu_of_the_dead()
        self.reason: tuple[str, str] | None = None
        self.cpu_s = 0.0  # when last looked at
        self.hidden: set[int] = set()  # the same

    def end(self, status: str, detail: str) -> None:
        self.reason = self.reason or (status, detail)

    def look(self) -> None:
        """Compare what the program uses with its limits."""
        limits = self.request
        wall = time.monotonic() - self.started
        if wall > limits["wall_s"]:
            return self.end("timeout", f"more than {limits['wall_s']:g} s of wall time")
        below = descendants(os.getpid())
        memory = threads = living = 0
        cpu = 0.0
        for process in below:
            used = usage(process)
            if used:
                cpu, memory, threads, living = (
                    cpu + used[0],
                    memory + used[1],
                    threads + used[2],
                    living + (used[2] > 0),
                )
        self._reap(below)
        cpu += cpu_of_the_dead() - self.dead_before
        self.cpu_s = max(self.cpu_s, cpu)
        if cpu > limits["cpu_s"]:
            self.end("timeout", f"more than {limits['cpu_s']:g} s of processor time")
        elif memory > limits["memory_mb"] << 20:
            self.end("memory", f"more than {limits['memory_mb']} MB of memory")
        elif living > limits["processes"] + 3:  # sandlock refuses the fork itself; bubblewrap has two of its own
            self.end("killed", f"more than {limits['processes']} processes")
        elif threads > THREADS_PER_PROCESS * limits["processes"]:
            self.end("killed", f"more than {THREADS_PER_PROCESS * limits['processes']} threads")
        else:
            _, wrong = disk_use(limits["scratch"], below, limits["file_mb"] << 20)
            before, self.hidden = self.hidden, hidden_files(below)
            if wrong:
                self.end("killed", wrong)
            elif before & self.hidden:  # twice: one look may fall between the closing of a file and its unmapping
                self.end("killed", "files that are neither named nor open")
        return None

    def _reap(self, below: list[int]) -> None:
        """Orphans come to this process when they end; unreaped they would fill the table of processes."""
        for process in below:
            if process != self.program.pid:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(process, os.WNOHANG)


def _drain(stream: Any, kept: bytearray, limit: int) -> str:
    """Read what is there into `kept`: "open" (nothing more now), "end" (closed) or "over" (more than `limit` bytes)."""
    while len(kept) <= limit:
        try:
            data = os.read(stream.fileno(), 1 << 16)
        except BlockingIOError:
            return "open"
        if not data:
            return "end"
        kept += data
    return "over"


def _feed(stream: Any, data: memoryview) -> memoryview:
    """Write what the pipe takes; the rest. Empty when all is written or the reader is gone."""
    try:
        return data[os.write(stream.fileno(), data) :]
    except BlockingIOError:
        return data
    except BrokenPipeError:
        return data[:0]


def _judge(exit_code: int, cpu_s: float, errors: bytes, request: dict[str, Any]) -> tuple[str, str]:
    """The status of a program that ended by itself or by a limit that the kernel keeps."""
    if exit_code == 0:
        return "ok", ""
    if exit_code in (-signal.SIGXCPU, -signal.SIGKILL) and cpu_s >= request["cpu_s"]:
        return "timeout", f"more than {request['cpu_s']:g} s of processor time"
    if any(sign in errors for sign in _MEMORY_SIGNS):
        return "memory", f"more than {request['memory_mb']} MB of memory"
    last = errors.decode("utf-8", "replace").strip().rpartition("\n")[2]
    how = f"exit code {exit_code}" if exit_code > 0 else f"ended by signal {-exit_code}"
    return "error", f"{how}: {last}" if last else how


def execute(request: dict[str, Any], confinement: str, requests: int) -> dict[str, Any]:
    """Run one program to its end or its limits. `requests` is watched: when it closes, nobody waits for the result."""
    limits = (request["cpu_s"], request["memory_mb"], request["file_mb"])
    program = CONFINEMENTS[confinement](request | {"argv": limited(request["argv"], *limits)})
    watch = _Watch(request, program)
    exited = os.pidfd_open(program.pid)
    streams = {"stdout": (program.stdout, bytearray()), "stderr": (program.stderr, bytearray())}
    unwritten = memoryview(request["stdin"])
    ended: set[str] = set()
    most = request["output_bytes"]
    with selectors.DefaultSelector() as selector:
        for name, (stream, _) in streams.items():
            os.set_blocking(stream.fileno(), False)
            selector.register(stream, selectors.EVENT_READ, name)
        if program.stdin is not None:
            os.set_blocking(program.stdin.fileno(), False)
            selector.register(program.stdin, selectors.EVENT_WRITE, "stdin")
        selector.register(exited, selectors.EVENT_READ, "exited")
        selector.register(requests, selectors.EVENT_READ, "requests")
        running, next_look = True, watch.started + TICK_S
        while running and watch.reason is None:
            for key, _ in selector.select(max(0.0, next_look - time.monotonic())):
                if key.data == "exited":
                    running = False
                elif key.data == "requests":  # nothing is asked while a program runs: the other side is gone
                    watch.end("killed", "nobody waits for the result")
                elif key.data == "stdin" and program.stdin is not None:
                    unwritten = _feed(program.stdin, unwritten)
                    if not unwritten:
                        selector.unregister(program.stdin)
                        program.stdin.close()
                else:
                    state = _drain(*streams[key.data], most)
                    if state == "over":
                        watch.end("output", f"more than {most} bytes on {key.data}")
                    elif state == "end":
                        ended.add(key.data)
                        selector.unregister(key.fileobj)
            if running and time.monotonic() >= next_look:
                watch.look()
                next_look = time.monotonic() + TICK_S
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(exited, signal.SIGKILL)
    os.close(exited)
    exit_code = program.wait()
    if not sweep():
        raise RuntimeError("a process of the program could not be killed")
    for name, (stream, kept) in streams.items():  # what was still in the pipes; nobody writes any more
        if name not in ended and _drain(stream, kept, most) == "over":
            watch.end("output", f"more than {most} bytes on {name}")
    for stream in (program.stdin, program.stdout, program.stderr):
        if stream is not None:
            stream.close()
    stdout, stderr = (bytes(kept[:most]) for _, kept in streams.values())
    cpu_s = max(watch.cpu_s, cpu_of_the_dead() - watch.dead_before)  # a namespace's dead are not all accounted for
    status, detail = watch.reason or _judge(exit_code, cpu_s, stderr[-4096:], request)
    return {
        "status": status,
        "detail": detail,
        "stdout": stdout,
        "stderr": stderr,
        "exit_code": -signal.SIGKILL if watch.reason else exit_code,
        "cpu_s": cpu_s,
        "wall_s": time.monotonic() - watch.started,
    }


# ---------------------------------------------------------------------------------------------- the two processes


def _own_pipes() -> tuple[BinaryIO, BinaryIO]:
    """The pipes of requests and replies, moved out of the way of standard input and output."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1):
        os.dup2(null, number)
    os.close(null)
    return requests, replies


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl {option}")


def _serve(requests: BinaryIO, replies: BinaryIO, confinement: str, guard: int) -> None:
    set_death_signal, set_subreaper = 1, 36
    _prctl(set_death_signal, signal.SIGKILL)
    if os.getppid() != guard:
        return
    _prctl(set_subreaper, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ends when its requests do
    try:
        if confinement == "sandlock":
            import sandlock  # noqa: F401 - loaded once, before the filter

            seccomp.install(seccomp.program_filter(supervised=True))
            seccomp.drop_capabilities()  # bubblewrap needs root's own to map root's id, and drops them itself
    except (ImportError, OSError, ValueError) as error:
        send(replies, {"error": f"{type(error).__name__}: {error}"})
        return
    send(replies, {"worker": os.getpid()})
    while True:
        try:
            request = receive(requests)
        except EOFError:
            return
        try:
            reply = execute(request, confinement, requests.fileno())
        except Exception as error:  # the worker goes on; the caller learns why there is no result
            sweep()
            reply = {"error": f"{type(error).__name__}: {error}"}
        send(replies, reply)


def main(confinement: str, directory: str) -> None:
    """Serve requests on standard input until it closes. `directory` holds the scratch directories; removed at the end.

    The first message on standard output is {"worker": process id} or {"error": why it cannot confine anything}.
    """
    set_subreaper = 36
    _prctl(set_subreaper, 1)
    requests, replies = _own_pipes()
    asker, guard = os.getppid(), os.getpid()
    worker = os.fork()
    if not worker:
        code = 1
        try:
            _serve(requests, replies, confinement, guard)
            code = 0
        except BrokenPipeError:
            pass
        finally:
            os._exit(code)
    requests.close()
    replies.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(worker, signal.SIGKILL))
    with contextlib.suppress(ChildProcessError):
        os.waitpid(worker, 0)
    sweep()
    remove_tree(Path(directory))
    if os.getppid() != asker and not any(Path(directory).parent.glob("worker-*")):  # nobody else will do it
        with contextlib.suppress(OSError):
            remove_tree(Path(directory).parent)
    sys.exit(0)
