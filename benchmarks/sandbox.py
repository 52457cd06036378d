"""Programs a second in the sandbox, and what the confinement costs beside a bare interpreter.

    python benchmarks/sandbox.py [--workers 2] [--programs 200]

Three rounds of each; the figures are of the best one, all rounds are kept. The bare interpreter runs the same harmless
program (`print(1)`) by itself: that is what a fresh process costs without a sandbox. Processor milliseconds are the
program's own, its children's included. The load before each round says what else the machine did.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from results import write_result

from qwench.tools.languages import LANGUAGES, language
from qwench.tools.sandbox import Confinement, Program, Sandbox, SandboxUnavailable

ROUNDS = 3
SOLUTION = """
from typing import List
def has_close_elements(numbers: List[float], threshold: float) -> bool:
    ordered = sorted(numbers)
    return any(b - a < threshold for a, b in zip(ordered, ordered[1:]))
def check(candidate):
    assert candidate([1.0, 2.0, 3.9, 4.0, 5.0, 2.2], 0.3) == True
    assert candidate([1.0, 2.0, 3.9, 4.0, 5.0, 2.2], 0.05) == False
check(has_close_elements)
"""
PROGRAMS = {
    "python_print": Program("print(1)"),
    "python_humaneval": Program(SOLUTION),
    "javascript_print": Program("console.log(1)", "javascript"),
}


def rounds(count: int, run: Any) -> dict[str, Any]:
    each: list[dict[str, float]] = []
    for _ in range(ROUNDS):
        load = os.getloadavg()[0]
        started = time.perf_counter()
        more = run()
        seconds = time.perf_counter() - started
        each.append({"programs_per_s": round(count / seconds, 1), "load_before": round(load, 2), **more})
    best = max(each, key=lambda one: one["programs_per_s"])
    return best | {"rounds": each}


def bare(count: int, workers: int) -> dict[str, Any]:
    _, interpreter = language("python")
    with TemporaryDirectory() as directory, ThreadPoolExecutor(workers) as threads:
        path = Path(directory) / "main.py"
        path.write_text("print(1)")
        command = [interpreter, "-s", "-S", "-B", str(path)]  # no packages' start-up files, as in the sandbox

        def run() -> dict[str, float]:
            list(threads.map(lambda _: subprocess.run(command, capture_output=True, check=True), range(count)))
            return {}

        return rounds(count, run)


def confined(program: Program, count: int, workers: int, confinement: Confinement) -> dict[str, Any]:
    with Sandbox(workers=workers, confinement=confinement) as sandbox:
        sandbox.run_many([program] * workers)  # the workers start

        def run() -> dict[str, float]:
            done = sandbox.run_many([program] * count)
            if any(result.status != "ok" for result in done):
                raise RuntimeError(f"a harmless program did not run: {next(r for r in done if r.status != 'ok')}")
            return {
                "cpu_ms_median": round(1e3 * statistics.median(result.cpu_s for result in done), 2),
                "wall_ms_median": round(1e3 * statistics.median(result.wall_s for result in done), 2),
            }

        return rounds(count, run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--programs", type=int, default=200)
    arguments = parser.parse_args()
    count, workers = arguments.programs, arguments.workers
    figures: dict[str, Any] = {"workers": workers, "programs": count, "bare_interpreter": bare(count, workers)}
    names: list[Confinement] = ["sandlock", "bubblewrap"]
    for confinement in names:
        figures[confinement] = {}
        for name, program in PROGRAMS.items():
            if LANGUAGES[program.language].find() is None:
                continue
            try:
                figures[confinement][name] = confined(program, count, workers, confinement)
            except SandboxUnavailable as error:
                figures[confinement] = {"unavailable": str(error).splitlines()[1].strip()}
                break
    for name, one in [("bare", figures["bare_interpreter"]), *figures["sandlock"].items()]:
        print(name, {key: value for key, value in one.items() if key != "rounds"} if isinstance(one, dict) else one)
    write_result("sandbox", figures)


if __name__ == "__main__":
    main()
