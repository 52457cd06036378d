"""Memory of every stage of `qwench data`, as the input grows four times: the whole recipe on JSONL.

    python benchmarks/data_memory.py DATA TOKENIZER --folder SCRATCH [--sizes 500 2000] [--workers 2]

The input is the real text of DATA/pretrain, repeated: in every copy paragraphs stand in another order and a seventh of
the words (of the characters, in Chinese) are others of the same file, so that hardly anything is a near duplicate and
sizes grow with the input everywhere. The recipe has every stage: rules, exact and near duplicates, a classifier that
scores, decontamination against DATA/eval, mixture, shards.

A figure is the largest sum of resident sets over the command and all processes below it, looked at five times a second
and booked to the stage that was at work. "resident" counts pages of mapped files, which the system may drop at any time
and which several processes share; "own" is without these.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from results import write_result

from qwench.data.classifier import ClassifierSettings, train_classifier

_KINDS = {
    "books": ("en_novels", "en_misc", "zh_modern", "zh_classical"),
    "docs": ("en_docs", "zh_docs"),
    "poetry": ("zh_poetry",),
    "dictionary": ("en_dictionary",),
    "math": ("math_latex",),
    "code": ("code_*",),
}
_OTHER_SHARE = 1 / 7
_HAN = re.compile("[\u4e00-\u9fff]")


# ---------------------------------------------------------------------------------------------------------------- input
def write_copies(pretrain: Path, folder: Path, num_bytes: float) -> list[Path]:
    """folder/NAME-NNN.jsonl until there are so many bytes: these files. Those of an earlier call are taken as they are,
    so that a smaller input is the beginning of a larger one."""
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    total, copy = 0, 0
    while total < num_bytes:
        for path in sorted(pretrain.glob("*.jsonl")):
            target = folder / f"{path.stem}-{copy:03d}.jsonl"
            if not target.exists():
                partial = target.with_suffix(".partial")
                with open(partial, "w", encoding="utf-8") as file:
                    file.writelines(_varied(path, random.Random(f"{path.stem} {copy}")))
                partial.rename(target)
            files.append(target)
            total += target.stat().st_size
            if total >= num_bytes:
                break
        copy += 1
    return files


def _varied(path: Path, draw: random.Random) -> Iterator[str]:
    texts = [json.loads(line)["text"] for line in open(path, encoding="utf-8")]  # noqa: SIM115
    others = {True: _HAN.findall("".join(texts[::20])), False: " ".join(texts[::20]).split()}
    for text in texts:
        chinese = len(_HAN.findall(text[:500])) > 100
        units: list[str] = list(text) if chinese else text.split(" ")
        pool = others[chinese] or ["x"]
        for _ in range(round(len(units) * _OTHER_SHARE)):
            place = int(draw.random() * len(units))
            unit = units[place]
            if unit.isalnum() and (not chinese or unit >= "\u4e00"):
                units[place] = pool[int(draw.random() * len(pool))]
        paragraphs = ("" if chinese else " ").join(units).split("\n\n")
        draw.shuffle(paragraphs)
        yield json.dumps({"text": "\n\n".join(paragraphs)}, ensure_ascii=False) + "\n"


def recipe(files: list[Path], out: Path, tokenizer: Path, data: Path, workers: int) -> list[str]:
    found = {
        kind: [str(path) for name in names for path in files if path.match(f"{name}-*.jsonl")]
        for kind, names in _KINDS.items()
    }
    return [
        f"out={out}", f"tokenizer={tokenizer}", f"workers={workers}", "mixture.by=[\"kind\"]",
        *(f"sources.{kind}={{paths={json.dumps(paths)}, kind=\"{kind}\"}}" for kind, paths in found.items()),
        f'models.quality={{path="{out.parent}/classifier"}}', f'decontaminate.against=["{data}/eval"]',
        "shards.val_fraction=0.002",
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- memory
def family(pid: int) -> list[int]:
    """The process and all below it."""
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError):
                stat = Path(f"/proc/{entry}/stat").read_text()
                parents.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry))
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found


def resident(pids: list[int]) -> tuple[float, float]:
    """MB of all resident pages, and of those that are no mapped file's, added over processes."""
    total = own = 0
    for pid in pids:
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("VmRSS:"):
                    total += int(line.split()[1])
                elif line.startswith(("RssAnon:", "RssShmem:")):
                    own += int(line.split()[1])
    return total / 1e3, own / 1e3


def stage_at_work(work: Path) -> str:
    """The stage whose directory changed last."""
    stages = []
    with suppress(OSError):
        stages = [(path.stat().st_mtime_ns, path.name) for path in work.iterdir()]
    return max(stages)[1] if stages else "plan"


def measure(out: Path, arguments: list[str]) -> dict[str, Any]:
    code = "import sys; from qwench import cli; sys.exit(cli.main(['data', *sys.argv[1:]]))"
    shutil.rmtree(out, ignore_errors=True)
    stages: dict[str, dict[str, float]] = {}
    begin = time.perf_counter()
    command = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL)
    while command.poll() is None:
        stage = stage_at_work(out / "work")
        both = resident(family(command.pid))
        entry = stages.setdefault(stage, {"resident_mb": 0.0, "own_mb": 0.0})
        for name, value in zip(entry, both, strict=True):
            entry[name] = max(entry[name], round(value, 1))
        time.sleep(0.2)
    seconds = time.perf_counter() - begin
    if command.returncode:
        raise SystemExit(f"the run failed with code {command.returncode}")
    summary = json.loads((out / "summary.json").read_text())
    kept = [summary[name] for name in ("prepare", "documents", "tokens")]
    return {
        "seconds": round(seconds, 1),
        "documents": kept[0]["documents"],
        "kept": kept[1]["documents"],
        "tokens": kept[2]["tokens"],
        "largest_resident_mb": max(entry["resident_mb"] for entry in stages.values()),
        "largest_own_mb": max(entry["own_mb"] for entry in stages.values()),
        "stage_seconds": {entry["stage"]: entry["seconds"] for entry in summary["stages"]},
        "stages": stages,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--folder", type=Path, required=True, help="for input and output: five times the largest size")
    parser.add_argument("--sizes", type=float, nargs="+", default=[500, 2000], help="MB, smallest first")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {"workers": arguments.workers, "runs": {}}
    tweets = [json.loads(line) for line in open(arguments.data / "pipeline/hate_en.jsonl", encoding="utf-8")]  # noqa: SIM115
    labels = ["good" if row["label"] == 2 else "bad" for row in tweets]
    train_classifier([row["text"] for row in tweets], labels, ClassifierSettings(), ("bad", "good")).save(
        folder / "classifier"
    )
    for size in sorted(arguments.sizes):
        files = write_copies(arguments.data / "pretrain", folder / "in", size * 1e6)
        out = folder / "out"
        num_bytes = sum(path.stat().st_size for path in files)
        given = recipe(files, out, arguments.tokenizer.absolute(), arguments.data.absolute(), arguments.workers)
        run = measure(out, given)
        figures["runs"][f"{num_bytes / 1e6:.0f} MB"] = {"input_mb": num_bytes / 1e6, **run}
        print(f"{num_bytes / 1e6:.0f} MB in {run['seconds']:.0f} s, {run['kept']:,} of {run['documents']:,} documents")
        for stage, entry in run["stages"].items():
            print(f"  {stage:22} {entry['resident_mb']:7.0f} MB resident, {entry['own_mb']:7.0f} own", flush=True)
        shutil.rmtree(out)
    write_result("data_memory", figures)


if __name__ == "__main__":
    main()
