"""Compiles a C file of the package when it is first needed and keeps the library in the user's cache directory.

Not a build system: one source file, the system's compiler, a second or two. Where that cannot be, `build` says why and
the caller uses its slower path; nothing is compiled at installation.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

log = logging.getLogger("qwench.native")


def cache_directory() -> Path:
    """Where compiled libraries are kept: $XDG_CACHE_HOME/qwench, or ~/.cache/qwench."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwench"


def build(source: Path, name: str, flags: Sequence[str], directory: Path | None = None) -> Path:
    """The library `name` made of `source`, compiled if it is not in `directory`. Processes may do so at once.

    Raises RuntimeError where there is no compiler or it fails, OSError where the directory cannot be written.
    """
    directory = directory or cache_directory()
    compiler = shlex.split(os.environ.get("CC", "")) or [next(filter(shutil.which, ("cc", "gcc", "clang")), "cc")]
    flags = ("-std=c11", "-O3", "-fPIC", "-shared", *flags)
    key = hashlib.sha256("\0".join((source.read_text(encoding="utf-8"), *compiler, *flags)).encode()).hexdigest()
    library = directory / f"{name}_{key[:16]}.so"
    if library.exists():
        return library
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=directory, prefix="build-") as workplace:
        made = Path(workplace, library.name)
        command = [*compiler, *flags, str(source), "-o", str(made), "-lm"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        except FileNotFoundError:
            raise RuntimeError(f"no C compiler {compiler[0]!r}; install gcc or clang, or set CC") from None
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)} failed: {done.stderr.strip()[-500:]}")
        made.replace(library)  # at once, so that nobody loads half a file
    log.info("compiled %s", library)
    return library
