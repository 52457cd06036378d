"""Jobs for the tests of stages; other processes import them by name."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path
from typing import Any

from qwench.data.pipeline.work import Item


def square(item: Item, directory: Path) -> dict[str, Any]:
    (directory / "square.txt").write_text(str(item["number"] ** 2))
    return {"number": item["number"], "pid": os.getpid()}


def double_file(item: Item, directory: Path) -> dict[str, Any]:
    text = Path(item["file"]).read_text()
    (directory / "double.txt").write_text(text * 2)
    return {"chars": 2 * len(text)}


def fussy(item: Item, directory: Path) -> dict[str, Any]:
    (directory / "half.txt").write_text("half")
    if item["number"] in item.get("bad", []):
        raise RuntimeError(f"no {item['number']} please")
    return {"number": item["number"]}


def mortal(item: Item, directory: Path) -> dict[str, Any]:
    """Kills its process, the first time only if it says so."""
    marker = Path(item["marker"])
    if item["number"] == item["deadly"] and not (item["once"] and marker.exists()):
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"number": item["number"]}


def full_disk(item: Item, directory: Path) -> dict[str, Any]:
    (directory / "half.txt").write_text("half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory / "half.txt"))


def sleepy(item: Item, directory: Path) -> dict[str, Any]:
    Path(item["marker"]).write_text(str(os.getpid()))
    time.sleep(item["seconds"])
    return {}
