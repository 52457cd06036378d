"""Runs inside the sandbox, never outside: one EvalPlus problem's solution on all inputs of the problem.

The sandbox puts `solution.py` and `task.json` beside it, and for a check `expected.pickle`, which the reference
solution's run made in a sandbox of its own. Standard library only: there are no packages where this runs.

The rules of comparison are those of evalplus 0.3.1: equal, or close where the problem gives a tolerance or the expected
value is a float or a list of floats (then 1e-6), with rtol 1e-7; and the problems that have a rule of their own.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import signal
import time
from copy import deepcopy
from typing import Any

RTOL = 1e-7
FLOAT_ATOL = 1e-6
LEAST_S, REFERENCE_FACTOR = 4.0, 4.0  # a call may take 4 s, or four times what the reference took

# MBPP problems judged by "a result or none", and those whose result is a set of values in no order
NOT_NONE = {"check_str", "text_match_three", "text_starta_endb"}
AS_SETS = {
    "similar_elements",
    "find_char_long",
    "common_in_nested_lists",
    "extract_singly",
    "larg_nnum",
    "intersection_array",
    "find_dissimilar",
    "Diff",
}


class OutOfTime(BaseException):
    """A call used up its processor time. Not an Exception: a solution that catches everything does not stop it."""


def out_of_time(*_: object) -> None:
    raise OutOfTime


def all_floats(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(item, float) for item in value)
    return isinstance(value, float)


def shape(value: Any) -> tuple[int, ...] | None:
    """The lengths of nested lists of numbers, outermost first; None for ragged ones and for anything else."""
    if isinstance(value, (int, float, complex)):
        return ()
    if not isinstance(value, (list, tuple)):
        return None
    inner = [shape(item) for item in value] or [()]
    return None if inner[0] is None or any(one != inner[0] for one in inner) else (len(value), *inner[0])


def close(out: Any, expected: Any, atol: float) -> bool:
    """Element-wise nearness of numbers and nested lists of them, as numpy.allclose has it, broadcasting included;
    False for anything else."""
    ours, theirs = shape(out), shape(expected)
    if ours is None or theirs is None:
        return False
    for _ in range(len(theirs) - len(ours)):
        out = [out]
    for _ in range(len(ours) - len(theirs)):
        expected = [expected]
    return _close(out, expected, atol)


def _close(out: Any, expected: Any, atol: float) -> bool:
    if isinstance(out, (list, tuple)):
        if len(out) != len(expected) and 1 not in (len(out), len(expected)):
            return False
        most = 0 if 0 in (len(out), len(expected)) else max(len(out), len(expected))
        return all(_close(out[i % len(out)], expected[i % len(expected)], atol) for i in range(most))
    if expected in (math.inf, -math.inf):
        return out == expected
    return out == expected or abs(out - expected) <= atol + RTOL * abs(expected)


def pyramid_surface(base: float, height: float) -> int:
    """Surface of a square pyramid whose height is the perpendicular one (MBPP 581 does not say which)."""
    slant = math.sqrt((base / 2) ** 2 + height**2)
    return round(base**2 + 2 * base * slant)


def digit_distance(first: int, second: int) -> int:
    """Sum of the differences of digits in the same place (MBPP 558)."""
    width = max(len(str(first)), len(str(second)))
    pairs = zip(str(first).zfill(width), str(second).zfill(width), strict=True)
    return sum(abs(int(a) - int(b)) for a, b in pairs)


def matches(dataset: str, name: str, given: list[Any], out: Any, expected: Any) -> bool:
    """Equality, or the problem's own rule."""
    equal = out == expected
    if dataset != "mbpp":
        return equal
    if name == "are_equivalent":  # Mbpp/164: its statement does not determine the answer
        return True
    if name == "sum_div":
        return equal or out == 0
    if name == "digit_distance_nums":
        return equal or out == digit_distance(*given)
    if name in AS_SETS:
        return set(out) == set(expected)
    if name in NOT_NONE:
        return out == expected if isinstance(out, bool) else expected == (out is not None)
    return equal


def accepts(dataset: str, name: str, given: list[Any], out: Any, expected: Any, atol: float) -> bool:
    if dataset == "humaneval" and name == "find_zero":  # any root is right
        coefficients = given[0]
        return abs(sum(c * math.pow(out, i) for i, c in enumerate(coefficients))) <= atol
    if matches(dataset, name, given, out, expected):
        return True
    if dataset == "mbpp" and name == "surface_Area" and abs(out - pyramid_surface(*given)) <= atol:
        return True
    if isinstance(expected, (list, tuple)) and isinstance(out, (list, tuple)) and len(out) != len(expected):
        return False
    return atol != 0 and type(out) is type(expected) and close(out, expected, atol)


def load(source: str, name: str) -> Any:
    names: dict[str, Any] = {}  # without a name of its own, as evalplus runs it: `__name__` is that of the builtins
    code = compile(source, "solution.py", "exec", dont_inherit=True)  # nor with this file's `from __future__`
    exec(code, names)  # in the sandbox, which is what this file is for
    return names[name]


def reference(source: str, task: dict[str, Any]) -> dict[str, Any]:
    """Expected outputs and processor seconds of the reference solution, a part at a time."""
    expected: dict[str, Any] = {}
    function = load(source, task["entry_point"])
    for part, inputs in task["inputs"].items():
        outputs, seconds = [], []
        for given in decoded(task, inputs):
            given = deepcopy(given)
            started = time.process_time()
            outputs.append(function(*given))
            seconds.append(time.process_time() - started)
        if task["dataset"] == "mbpp" and task["entry_point"] in NOT_NONE:
            outputs = [output is not None for output in outputs]
        expected[part] = (outputs, seconds)
    return expected


def check(source: str, task: dict[str, Any], part: str, expected: list[Any], seconds: list[float]) -> str:
    """What is wrong with the solution on this part; empty if nothing."""
    name, dataset, atol = task["entry_point"], task["dataset"], task["atol"]
    try:
        signal.setitimer(signal.ITIMER_PROF, LEAST_S)
        function = load(source, name)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for number, given in enumerate(decoded(task, task["inputs"][part])):
            signal.setitimer(signal.ITIMER_PROF, max(LEAST_S, REFERENCE_FACTOR * seconds[number]))
            out = function(*given)
            signal.setitimer(signal.ITIMER_PROF, 0)
            ok = accepts(dataset, name, given, out, expected[number], atol)
            if not atol and all_floats(expected[number]):
                atol = FLOAT_ATOL
                ok = ok or accepts(dataset, name, given, out, expected[number], atol)
            # (the tolerance stays for the inputs that follow, as it does in evalplus: its scores depend on it)
            if not ok:
                return f"{part} input {number}: {shown(out)} where {shown(expected[number])} is expected"
    except BaseException as error:  # whatever it raises, SystemExit too, is a failure of the solution
        signal.setitimer(signal.ITIMER_PROF, 0)
        return f"{part}: {type(error).__name__}: {shown(error)}"
    return ""


def shown(value: object) -> str:
    try:
        text = repr(value)
    except Exception as error:
        text = f"<{type(value).__name__} that cannot be printed: {type(error).__name__}>"
    return text if len(text) <= 200 else text[:200] + "..."


# ---------------------------------------------------------------------------------------------- MBPP's inputs


def tuples(value: Any, depth: int) -> Any:
    """Lists `depth` levels down as tuples: JSON knows no tuples."""
    if depth == 0:
        return tuple(value)
    return [tuples(item, depth - 1) for item in value]


def tuples_throughout(value: Any) -> Any:
    return tuple(tuples_throughout(item) for item in value) if isinstance(value, list) else value


_EACH = {2, 116, 132, 143, 222, 261, 273, 394, 399, 421, 424, 429, 470, 560, 579, 596, 616, 630, 726, 740, 744, 809}
_ITEMS = {63, 64, 70, 94, 120, 237, 272, 299, 400, 409, 417, 438, 473, 614, 780}
_ITEMS_OF_FIRST = {75, 413, 444, 753}
_FIRST = {250, 405, 446, 617, 720, 763, 808}
_ITEMS_AND_EACH = {259, 401, 445}
_THROUGHOUT = {580, 615, 791}


def decode_mbpp(number: int, given: list[Any]) -> Any:
    """One call's arguments of problem Mbpp/`number` with the types that the problem means."""
    first: Any = given[0] if given else None
    rest = given[1:]
    if number in _EACH:
        return [tuple(item) for item in given]
    if number in _ITEMS:
        return [tuples(item, 1) for item in given]
    if number in _ITEMS_OF_FIRST:
        return [tuples(first, 1), rest[0]]
    if number in (106, 750):
        return [first, tuple(rest[0])]
    if number == 115:
        return [[set(item) if isinstance(item, list) and item else {} for item in first]]
    if number == 124:
        return [float(first), complex(rest[0])]
    if number in _FIRST:
        return [tuple(first), rest[0]]
    if number in _ITEMS_AND_EACH:
        return [tuple(tuple(inner) for inner in item) for item in given]
    if number == 278:
        return [tuple(tuple(item) if isinstance(item, list) else item for item in first)]
    if number == 307:
        return [tuple(first), rest[0], rest[1]]
    if number == 722:
        return [{key: tuple(value) for key, value in first.items()}, *rest]
    if number == 252:
        return [complex(first)]
    if number in _THROUGHOUT:
        return [tuples_throughout(item) for item in given]
    return given


def decoded(task: dict[str, Any], inputs: list[list[Any]]) -> list[Any]:
    if task["dataset"] != "mbpp":
        return inputs
    return [decode_mbpp(task["number"], given) for given in inputs]


def main() -> None:
    with open("task.json", encoding="utf-8") as file:
        task = json.load(file)
    with open("solution.py", encoding="utf-8") as file:
        source = file.read()
    output = os.dup(1)
    nowhere = open(os.devnull, "w")  # noqa: SIM115 - open to the end: whatever a solution prints goes there
    os.dup2(nowhere.fileno(), 1)
    if task["mode"] == "check":
        os.dup2(nowhere.fileno(), 2)
    else:
        expected = reference(source, task)
        with open("expected.pickle", "wb") as file:
            pickle.dump(expected, file)
        return
    with open("expected.pickle", "rb") as file:
        expected = pickle.load(file)
    for name in ("task.json", "expected.pickle"):
        os.unlink(name)  # the solution finds no answers beside it
    signal.signal(signal.SIGPROF, out_of_time)
    for part, (outputs, seconds) in expected.items():
        wrong = check(source, task, part, outputs, seconds)
        os.write(output, f"\n{task['token']} {json.dumps([part, wrong])}\n".encode())
        if wrong:
            break


if __name__ == "__main__":
    main()
