"""Encoding speed of the real vocabulary on the standard library's sources: ours, `tokenizers`, tiktoken; one thread.

    python benchmarks/tokenizer_encode.py QWEN_TIKTOKEN

Bytes of text over seconds, the median of five passes; the first, which fills caches, is given apart. All must give the
same number of tokens.
"""

from __future__ import annotations

import base64
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import tiktoken
from results import write_result
from tokenizers import Tokenizer as HuggingFaceTokenizer

from qwench.tokenizer import Tokenizer, bpe


def passes(encode: Callable[[str], list[int]], texts: list[str]) -> tuple[list[float], int]:
    """Seconds of each pass, and the number of tokens."""
    seconds, count = [], 0
    for _ in range(6):
        started = time.perf_counter()
        count = sum(len(encode(text)) for text in texts)
        seconds.append(time.perf_counter() - started)
    return seconds, count


def main(vocabulary: Path) -> None:
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_text(encoding="utf-8") for path in sorted(library.glob("*.py"))]
    num_bytes = sum(len(text.encode()) for text in texts)
    ours = Tokenizer.load(vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        ours.save(folder)
        theirs = HuggingFaceTokenizer.from_file(f"{folder}/tokenizer.json")
    ranks = {
        base64.b64decode(token): int(rank)
        for token, rank in (line.split() for line in vocabulary.read_text().splitlines())
    }
    openai = tiktoken.Encoding("qwen", pat_str=bpe.PATTERN, mergeable_ranks=ranks, special_tokens={})
    encoders: dict[str, Callable[[str], list[int]]] = {
        f"qwench ({ours.backend})": ours.encode,
        "tokenizers": lambda text: theirs.encode(text, add_special_tokens=False).ids,
        "tiktoken": lambda text: openai.encode_ordinary(text),
    }
    figures: dict[str, dict[str, float]] = {}
    counts = set()
    for name, encode in encoders.items():
        seconds, count = passes(encode, texts)
        counts.add(count)
        first, rest = seconds[0], statistics.median(seconds[1:])
        figures[name] = {"mb_per_s": num_bytes / rest / 1e6, "first_pass_mb_per_s": num_bytes / first / 1e6}
        print(f"{name:20} {num_bytes / rest / 1e6:8.1f} MB/s   first pass {num_bytes / first / 1e6:8.1f} MB/s")
    assert len(counts) == 1, f"different numbers of tokens: {counts}"
    write_result("tokenizer_encode", {"text_mb": num_bytes / 1e6, "encoders": figures})


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
