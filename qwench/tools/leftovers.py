"""What a confined program leaves behind, its processes and its files: looked at and removed, however hostile."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import stat
import time
from pathlib import Path

MAX_FILES = 2000
_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")


def remove_tree(path: Path) -> None:
    """Remove a directory that a hostile program filled: any depth, any modes, links not followed.

    Directories are emptied by moving what they hold one level up, so that no path grows too long and nothing recurses.
    """
    with contextlib.suppress(FileNotFoundError):
        path.chmod(0o700)
    number, unknown = 0, os.urandom(8).hex()
    while True:
        try:
            entries = list(os.scandir(path))
        except FileNotFoundError:
            return
        if not entries:
            break
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            os.chmod(entry.path, 0o700)
            for inner in os.scandir(entry.path):
                number += 1
                if inner.is_dir(follow_symlinks=False):
                    os.chmod(inner.path, 0o700)  # a directory's ".." is rewritten as it moves
                os.rename(inner.path, path / f"{unknown}-{number}")  # a name that it cannot have given itself
            os.rmdir(entry.path)
    path.rmdir()


# ---------------------------------------------------------------------------------------------- processes


def _parents() -> dict[int, list[int]]:
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError):
                fields = Path(f"/proc/{name}/stat").read_bytes().rsplit(b")", 1)[1].split()
                children.setdefault(int(fields[1]), []).append(int(name))
    return children


def _children(process: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{process}/task"):
            with contextlib.suppress(OSError):
                found += map(int, Path(f"/proc/{process}/task/{task}/children").read_bytes().split())
    return found


_HAS_CHILDREN = Path("/proc/thread-self/children").exists()


def descendants(process: int) -> list[int]:
    """Every living or unreaped process below `process`, parents first."""
    table = None if _HAS_CHILDREN else _parents()
    found: list[int] = []
    open_ = [process]
    while open_:
        parent = open_.pop()
        children = _children(parent) if table is None else table.get(parent, [])
        found += children
        open_ += children
    return found


def sweep(deadline_s: float = 10.0) -> bool:
    """Kill and reap all descendants of this process (a subreaper: orphans come to it). False if some would not die."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        below = descendants(os.getpid())
        for process in below:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            time.sleep(0.0005)
            continue
        return True  # no child left
    return False


def _stat(place: str) -> list[bytes]:
    """What follows the name in a `stat` of /proc: state, ...; empty if the process or thread is gone."""
    try:
        return Path(f"{place}/stat").read_bytes().rsplit(b")", 1)[1].split()
    except (OSError, IndexError):
        return []


def _living_thread(process: int) -> str:
    """Where /proc tells of the memory and the files of a process whose first thread has ended; "" if all have."""
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{process}/task"):
            place = f"/proc/{process}/task/{task}"
            if (fields := _stat(place)) and fields[0] not in (b"Z", b"X"):
                return place
    return ""


def usage(process: int) -> tuple[float, int, int] | None:
    """Processor seconds (with those of children that it waited for), resident bytes, threads (0: it is dead and
    waits to be reaped); None if it is gone."""
    if not (fields := _stat(f"/proc/{process}")):
        return None
    seconds, resident, threads = sum(map(int, fields[11:15])) / _TICKS, int(fields[21]) * _PAGE, int(fields[17])
    if fields[0] == b"Z":  # dead, or its first thread alone is: then another one tells what it holds
        other = _stat(place) if threads > 1 and (place := _living_thread(process)) else []
        resident, threads = (int(other[21]) * _PAGE, threads) if other else (0, 0)
    return seconds, resident, threads


def cpu_of_the_dead() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# ---------------------------------------------------------------------------------------------- disk


def disk_use(scratch: str, processes: list[int], limit: int) -> tuple[int, str]:
    """Bytes under `scratch` or held open without a name, and what is wrong ("" if nothing)."""
    total = count = 0
    todo = [scratch]
    device = os.stat(scratch).st_dev
    while todo:
        try:
            with os.scandir(todo.pop()) as entries:
                for entry in entries:
                    count += 1
                    if count > MAX_FILES:
                        return total, f"more than {MAX_FILES} files"
                    if entry.is_dir(follow_symlinks=False):
                        todo.append(entry.path)
                    else:
                        with contextlib.suppress(FileNotFoundError):
                            total += entry.stat(follow_symlinks=False).st_blocks * 512
        except FileNotFoundError:
            continue
        except OSError:
            return total, "a directory that cannot be read"
    nameless: set[int] = set()
    for process in processes:
        for held in _open_files(process):
            if held.st_dev == device and held.st_ino not in nameless:
                total += held.st_blocks * 512
                nameless.add(held.st_ino)
    return total, f"more than {limit >> 20} MB of files" if total > limit else ""


def _descriptors(process: int) -> tuple[str, list[str]] | None:
    """Where /proc tells of the open files of a process, and their numbers; None if it lives and hides them."""
    place, names, refused = f"/proc/{process}", [], False
    for _ in range(2):
        try:
            names = os.listdir(f"{place}/fd")
        except OSError as error:
            refused = isinstance(error, PermissionError)
        if names:
            return place, names
        place = _living_thread(process)  # its first may have ended
    fields = _stat(place) if place and refused else []
    return None if fields and int(fields[20]) else (place, [])  # without memory it is about to end


def _open_files(process: int) -> list[os.stat_result]:
    """The regular files without a name that a process holds open."""
    place, names = _descriptors(process) or ("", [])
    found: list[os.stat_result] = []
    for name in names:
        with contextlib.suppress(OSError):
            held = os.stat(f"{place}/fd/{name}")
            if stat.S_ISREG(held.st_mode) and not held.st_nlink:
                found.append(held)
    return found


def hidden_files(processes: list[int]) -> set[int]:
    """Files that are mapped into memory, but have no name and are not open: what they hold cannot be told, however
    little of it is mapped. Their inodes; a process that hides its open files counts as one (minus its number)."""
    found = {-process for process in processes if _descriptors(process) is None}
    mapped: set[int] = set()
    for process in processes:
        with contextlib.suppress(OSError):
            data = Path(f"/proc/{process}/maps").read_bytes()
            if not data and (place := _living_thread(process)):
                data = Path(f"{place}/maps").read_bytes()
            if b" (deleted)\n" in data:
                mapped |= {int(line.split()[4]) for line in data.splitlines() if line.endswith(b" (deleted)")}
    if mapped:
        mapped -= {held.st_ino for process in processes for held in _open_files(process)}
    return found | mapped
