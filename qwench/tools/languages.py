"""The languages that the sandbox runs: which interpreter, how it is started, which files of the system it may read."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Language:
    """One row of the table.

    `find` gives the interpreter's path or None, `arguments(memory_mb)` what stands between it and the program's file,
    `readable(interpreter)` what it reads besides the C library's directories. `place(interpreter, directory)` makes
    what it needs in a directory of the sandbox and gives the command to start.
    """

    name: str
    file: str
    find: Callable[[], str | None]
    arguments: Callable[[int], tuple[str, ...]]
    readable: Callable[[str], tuple[str, ...]]
    install: str
    place: Callable[[str, Path], str] = lambda interpreter, directory: interpreter


def _python_readable(interpreter: str) -> tuple[str, ...]:
    library = Path(os.__file__).parent
    shared = sysconfig.get_config_var("LDLIBRARY") or ""
    directory = sysconfig.get_config_var("LIBDIR") or ""
    return (interpreter, str(library), *((str(Path(directory) / shared),) if ".so" in shared else ()))


def _python_place(interpreter: str, directory: Path) -> str:
    """An empty virtual environment: no package of this machine is seen, and its start-up files do not run."""
    home = directory / "python"
    (home / "bin").mkdir(parents=True, mode=0o700)
    version = ".".join(map(str, sys.version_info[:3]))
    place = Path(interpreter).parent
    (home / "pyvenv.cfg").write_text(f"home = {place}\ninclude-system-site-packages = false\nversion = {version}\n")
    (home / "bin" / "python3").symlink_to(interpreter)
    return str(home / "bin" / "python3")


def _beside(*names: str) -> Callable[[str], tuple[str, ...]]:
    return lambda interpreter: (interpreter, *names)


LANGUAGES: dict[str, Language] = {
    language.name: language
    for language in (
        Language(
            "python",
            "main.py",
            lambda: os.path.realpath(sys.executable) if sys.executable else None,
            lambda memory_mb: ("-s", "-B"),
            _python_readable,
            "",
            _python_place,
        ),
        Language(
            "javascript",
            "main.js",
            lambda: shutil.which("node"),
            # The compiler's threads count as CPU of the program; two are enough. Half the memory is for the heap.
            lambda memory_mb: (f"--max-old-space-size={max(64, memory_mb // 2)}", "--v8-pool-size=2"),
            _beside("/usr/share/nodejs", "/usr/share/node"),
            "install Node.js (node)",
        ),
        Language(
            "bash",
            "main.sh",
            lambda: shutil.which("bash"),
            lambda memory_mb: (),
            _beside("/usr/bin", "/bin"),  # a shell without its commands is no shell; they are confined with it
            "install bash",
        ),
        Language(
            "perl",
            "main.pl",
            lambda: shutil.which("perl"),
            lambda memory_mb: (),
            _beside("/usr/share/perl", "/usr/share/perl5", "/etc/perl"),
            "install perl",
        ),
    )
}


def language(name: str) -> tuple[Language, str]:
    """The row of `name` and its interpreter's path. ValueError for an unknown language or a missing interpreter."""
    row = LANGUAGES.get(name)
    if row is None:
        raise ValueError(f"the sandbox runs {', '.join(LANGUAGES)}, not {name!r}")
    interpreter = row.find()
    if interpreter is None:
        raise ValueError(f"{name} programs need an interpreter that is not on this machine: {row.install}")
    return row, os.path.realpath(interpreter)


def system_readable() -> tuple[str, ...]:
    """What every program may read: the C library's directories and its loader's cache, time zones, four devices."""
    triple = sysconfig.get_config_var("MULTIARCH") or ""
    libraries = [f"{root}/{triple}" for root in ("/lib", "/usr/lib") if triple and Path(f"{root}/{triple}").is_dir()]
    libraries += [path for path in ("/lib64", "/usr/lib64") if Path(path).is_dir()]
    if not any(Path(path).glob("libc.so*") for path in libraries):
        libraries += ["/lib", "/usr/lib"]
    files = (
        "/bin/sh",
        "/etc/ld.so.cache",
        "/usr/share/zoneinfo",
        "/usr/lib/locale",
        "/dev/zero",
        "/dev/urandom",
        "/dev/random",
    )
    return tuple(dict.fromkeys(path for path in (*libraries, *files) if Path(path).exists()))
