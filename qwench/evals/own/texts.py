"""Plain texts from local files, for measures of language modelling: .txt as it stands, .jsonl by its field `text`.

Bits per byte weighs what a model pays for a text by the text's bytes, so that vocabularies do not matter; xz is given
the same pieces and stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qwench.evals import context
from qwench.evals.local_files import Files
from qwench.evals.own.lengths import dataset, refuse_unknown

PIECE = 1 << 15
"""Characters of a text that is scored on its own, about; longer files are cut at line ends."""
FIELDS = ("text", "content")


def docs(**options: Any) -> Any:
    """A document a text. Option: files (a name or pattern; default wikitext2_valid.txt)."""
    refuse_unknown(options)
    files = Files(context.current().data_dirs)
    found = documents(files, str(options.get("files", "wikitext2_valid.txt")))
    (path, sha256), *_ = files.read.items()
    return dataset({"text": text, "file": path.name, "sha256": sha256} for text in found)


def score(doc: Mapping[str, Any], results: Sequence[float]) -> dict[str, tuple[float, int]]:
    """(log-likelihood, units) of each metric, as lm-eval's aggregations of weighted perplexities take them."""
    from qwench.evals.compression import compressor_bits

    text, value = doc["text"], results[0]
    size = len(text.encode("utf-8", "replace"))
    xz = -compressor_bits([text])["xz -9e"] * math.log(2)
    by_byte = dict.fromkeys(("bits_per_byte", "byte_perplexity"), (value, size))
    return {**by_byte, "word_perplexity": (value, max(1, len(text.split()))), "xz_bits_per_byte": (xz, size)}


def documents(files: Files, pattern: str, *, split: bool = True) -> list[str]:
    """Texts of the first file that fits the pattern. With `split`, a long plain text is cut into pieces at line ends;
    joined, they give the file back. Raises MissingDataError and ValueError."""
    path = files.find(pattern)
    if path.name.removesuffix(".gz").endswith((".jsonl", ".json")):
        found: list[str] = []
        for number, row in enumerate(files.jsonl(pattern), 1):
            name = next((field for field in FIELDS if isinstance(row.get(field), str)), None)
            if name is None:
                raise ValueError(f"{path} row {number} has neither text nor content (its fields: {', '.join(row)})")
            found.append(row[name])
    else:
        text = files.text(pattern)
        found = pieces(text) if split else [text]
    found = [text for text in found if text.strip()]
    if not found:
        raise ValueError(f"{path} holds no text")
    return found


def pieces(text: str, size: int = PIECE) -> list[str]:
    """Cuts behind the last line end before `size` characters, or there if a line is longer."""
    found: list[str] = []
    start = 0
    while start < len(text):
        end = min(start + size, len(text))
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        found.append(text[start:end])
        start = end
    return found
