"""Write a file or a directory completely or not at all.

The content is written under a temporary name beside the target, synced to disk, and renamed. A crash, kill -9, a full
disk or Ctrl-C leaves whatever stood at the target before. What a killed process left behind is removed by the next one.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def atomic_directory(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty directory that becomes `target` when the block ends without an exception.

    A non-empty target is replaced whole if `overwrite`, else refused with ValueError before anything is written.
    """
    target = Path(os.path.abspath(target))
    refuse_existing(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    temporary = Path(tempfile.mkdtemp(prefix=f"{_prefix(target)}{os.getpid()}-", dir=target.parent))
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        _sync_tree(temporary)
        if target.exists():
            # After an exchange the temporary name holds the old content, which the cleanup below removes.
            _exchange(temporary, target)
        else:
            temporary.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_file(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a path to write to, which becomes the file `target` when the block ends without an exception."""
    target = Path(os.path.abspath(target))
    refuse_existing(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    temporary = target.parent / f"{_prefix(target)}{os.getpid()}"
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(target)
        _sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def refuse_existing(target: Path, overwrite: bool) -> None:
    """ValueError if writing `target` would destroy something that nobody allowed to destroy."""
    if not target.exists() or overwrite:
        return
    if target.is_dir() and not any(target.iterdir()):
        return
    raise ValueError(f"{target} exists and is not empty; choose another place or allow overwriting (--force)")


def _prefix(target: Path) -> str:
    return f".{target.name}.saving-{socket.gethostname()}-"


def _remove_leftovers(target: Path) -> None:
    for path in target.parent.glob(f"{_prefix(target).replace('[', '[[]')}*"):
        pid = path.name.removeprefix(_prefix(target)).partition("-")[0]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_directory(directory: Path) -> None:
    """Flush the files that lie directly in a directory, and its list of names, to disk."""
    for path in directory.iterdir():
        if path.is_file():
            _sync(path)
    _sync(directory)


def _sync_tree(directory: Path) -> None:
    for root, _, files in os.walk(directory):
        for name in files:
            _sync(Path(root) / name)
        _sync(Path(root))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(first: Path, second: Path) -> None:
    """Swap two directories in one step where the system can, else in three."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    names = os.fsencode(first), os.fsencode(second)
    if rename is not None and rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return
    # No such call (not Linux) or no such file system: a kill between these renames leaves the old one at `aside`.
    aside = second.with_name(f"{second.name}.old-{os.getpid()}")
    second.rename(aside)
    first.rename(second)
    aside.rename(first)
