r"""Final answers of mathematical solutions: finding them, bringing them to one form, and comparing.

The rules are those of the harness that Qwen2.5-Math was measured with: the last \boxed{...}, else what follows "the
answer is", else the last number; two answers are equal as text, as numbers (a percentage counts as its fraction),
element by element, or symbolically. [Qwen2.5-Math evaluation] Symbolic comparison is math-verify's, with a time limit.
"""

from __future__ import annotations

import re

INVALID = ""
NUMBER = re.compile(r"-?\d*\.?\d+")
GROUPED = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
RELATIVE = 1e-4
WORDS = {
    "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10", "eleven": "11", "twelve": "12",
}  # fmt: skip
UNITS = (
    "degrees", "degree", "dollars", "dollar", "cents", "cent", "meters", "meter", "feet", "foot", "inches", "inch",
    "hours", "hour", "minutes", "minute", "seconds", "second", "days", "day", "weeks", "week", "months", "years",
    "miles", "mile", "mph", "units", "unit", "points", "square", "cubic", "percent", "kg", "km", "cm", "mm", "gm",
    "ft", "lbs", "pounds", "people", "students", "ways", "integers", "miles per hour",
)  # fmt: skip
_UNIT = re.compile(rf"(?<![a-zA-Z\\])(?:{'|'.join(sorted(UNITS, key=len, reverse=True))})\b(?:\^\{{?[23]\}}?)?")


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} with its braces matched; None without one."""
    start = text.rfind("boxed")
    if start < 0:
        return None
    rest = text[start + len("boxed") :].lstrip()
    if not rest.startswith("{"):
        return rest.split("$")[0].strip() or None
    depth = 0
    for place, sign in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(sign, 0)
        if depth == 0:
            return rest[1:place]
    return rest[1:]


def extract(text: str) -> str:
    """The final answer of a solution in words, normalised; empty where there is none."""
    if "final answer is $" in text and "$. I hope" in text:
        found = text.split("final answer is $", 1)[1].split("$. I hope", 1)[0]
    elif (inside := boxed(text)) is not None:
        found = inside
    elif "he answer is" in text:
        found = text.split("he answer is")[-1]
    elif "final answer is" in text:
        found = text.split("final answer is")[-1]
    elif "答案是" in text:
        found = text.split("答案是")[1].strip().split("\n\n")[0]
    else:
        return normalise(last_number(text))
    found = re.sub(r"\n\s*", "", found.strip().split("\n\n")[0]).removeprefix(":").strip()
    return normalise(found.rstrip(".").rstrip("/"))


def last_number(text: str) -> str:
    numbers = NUMBER.findall(text.replace(",", ""))
    return numbers[-1] if numbers else INVALID


def normalise(text: str) -> str:
    """One spelling for answers that mean the same."""
    text = text.strip().replace("\n", "").rstrip(".").replace("\\!", "")
    text = re.sub(r"\\begin\{(?:array|bmatrix)\}(?:\{[lcr|]*\})?", r"\\begin{pmatrix}", text)
    text = re.sub(r"\\end\{(?:array|bmatrix)\}", r"\\end{pmatrix}", text)
    for old, new in (
        ("tfrac", "frac"), ("dfrac", "frac"), ("\\neq", "\\ne"), ("\\leq", "\\le"), ("\\geq", "\\ge"), ("\\left", ""),
        ("\\right", ""), ("\\{", "{"), ("\\}", "}"), ("^{\\circ}", ""), ("^\\circ", ""), ("\\$", ""), ("$", ""),
        ("\\(", ""),
        ("\\)", ""), ("\\%", ""), ("%", ""), ("\\mathbf", ""), ("\\,", ""), ("\\;", ""), ("\\ ", " "),
    ):  # fmt: skip
        text = text.replace(old, new)
    without = re.sub(r"\\text\{[^{}]*\}$", "", text).strip()
    text = without or text
    text = _UNIT.sub("", text).strip()
    text = re.sub(r"\\(?:text|mbox)\{([^{}]*)\}", r"\1", text)
    text = WORDS.get(text.strip().lower(), text)
    text = re.sub(r"^[a-zA-Z]\s*(?:=|\\in)\s*", "", text)
    text = text.replace("infinity", "\\infty").replace("+\\infty", "\\infty").replace("\\inf ", "\\infty ")
    text = re.sub(r"\band\b", "", text).replace("\\mbox{}", "")
    text = GROUPED.sub("", text)
    text = re.sub(r"(\d+)\.0+(?!\d)", r"\1", text)
    text = re.sub(r"(?<!\d)\.(?=\d)", "0.", text)
    head, equals, tail = text.partition("=")
    if equals and len(head.strip()) <= 2 and "=" not in tail:
        text = tail
    text = re.sub(r"\\sqrt\s*([^\s{\\])", r"\\sqrt{\1}", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{", text)
    text = re.sub(r"^(-?\d+)\s*/\s*(\d+)$", r"\\frac{\1}{\2}", text.strip())
    return text.replace(" ", "").rstrip(".")


def number(text: str) -> float | None:
    """The value of a plain number, a percentage (as its fraction) or a fraction of two whole numbers."""
    text = GROUPED.sub("", text.strip())
    if found := re.fullmatch(r"(-?)\\frac\{(-?\d+)\}\{(-?\d+)\}", text):
        bottom = float(found[3])
        return None if bottom == 0 else float(f"{found[1]}1") * float(found[2]) / bottom
    try:
        return float(text.removesuffix("%").removesuffix("\\")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None


def close(first: float, second: float) -> bool:
    return abs(first - second) <= RELATIVE * max(abs(second), 1e-12)


def equal(answer: str, reference: str, *, symbolic: bool = True) -> bool:
    """Whether two answers, both through `normalise`, mean the same."""
    if not answer.strip():
        return False
    if answer.strip().lower() == reference.strip().lower():
        return True
    left, right = number(answer), number(reference)
    if left is not None and right is not None:
        return any(close(left, wanted) for wanted in (right / 100, right, right * 100))
    strip = str.maketrans("", "", "()[]{} ")
    if answer.translate(strip) and answer.translate(strip).lower() == reference.translate(strip).lower():
        return True
    if answer[:1] in "([" and reference[:1] in "([" and answer[-1:] in ")]" and reference[-1:] in ")]":
        mine, theirs = split(answer[1:-1]), split(reference[1:-1])
        if len(mine) > 1 or len(theirs) > 1:
            return len(mine) == len(theirs) and all(
                equal(a, b, symbolic=symbolic) for a, b in zip(mine, theirs, strict=True)
            )
    return symbolic and symbolically_equal(answer, reference)


def split(text: str) -> list[str]:
    """Parts between commas that stand in no bracket."""
    parts, depth = [""], 0
    for sign in text:
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(sign, 0)
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return parts


def symbolically_equal(answer: str, reference: str) -> bool:
    """Equality by SymPy through math-verify; what it cannot read or decide in time is not equal."""
    from math_verify import parse, verify

    gold = parse(f"${reference}$", parsing_timeout=3)
    return bool(gold) and bool(verify(gold, parse(f"${answer}$", parsing_timeout=3), timeout_seconds=3))
