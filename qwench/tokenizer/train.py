"""Train a byte-level BPE vocabulary of any size in Qwen's layout. [Qwen TR 2.2]

Counting and merging are the `tokenizers` library's; this file sees to it that the result is a Qwen vocabulary: NFC,
Qwen's pattern, the 256 bytes first, merges in order, control tokens last.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HuggingFaceTokenizer

from qwench.tokenizer import bpe
from qwench.tokenizer.backend import clean
from qwench.tokenizer.chat import FORMATS, find_format
from qwench.tokenizer.special import CONTROL_SETS, control_tokens
from qwench.tokenizer.tokenizer import Tokenizer
from qwench.tokenizer.vocabulary import Vocabulary

MAX_TOKEN_BYTES = 128
"""The longest token of the published vocabulary; also keeps one long run of a character from becoming a token."""


def train(
    texts: Iterable[str | Path],
    vocab_size: int,
    *,
    generation: str = "qwen2.5",
    chat_format: str | None = None,
    min_frequency: int = 2,
    progress: bool = False,
) -> Tokenizer:
    """Learn a vocabulary of `vocab_size` ids, control tokens included, from texts and files (`Path`).

    The same texts give the same vocabulary, in whatever order they come. `generation` names the control tokens
    ("qwen", "qwen2", "qwen2.5"), `chat_format` the way to write conversations (by default that of the generation).
    Raises ValueError where the corpus has too few pairs seen `min_frequency` times for the size asked.

    >>> train(["some text"] * 4, 285).vocab_size
    285
    """
    num_controls = len(control_tokens(generation, 0))
    chat_format = chat_format or (generation if generation in FORMATS else "qwen2.5")
    find_format(chat_format)
    smallest = 256 + num_controls
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size is {vocab_size}; 256 bytes and {num_controls} control tokens need at least {smallest}"
        )
    num_regular = vocab_size - num_controls
    trained = HuggingFaceTokenizer(models.BPE())
    trained.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    splitters = [
        pre_tokenizers.Split(Regex(bpe.PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    trained.pre_tokenizer = pre_tokenizers.Sequence(splitters)  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=num_regular,
        min_frequency=min_frequency,
        initial_alphabet=list(bpe.CHAR_TO_BYTE),
        max_token_length=MAX_TOKEN_BYTES,
        show_progress=progress,
    )
    trained.train_from_iterator(_texts(texts), trainer)
    learnt = trained.get_vocab()
    tokens = [bpe.unspell(text) for text in sorted(learnt, key=learnt.__getitem__)]
    if len(tokens) < num_regular:
        possible = len(tokens) + num_controls
        raise ValueError(
            f"the corpus supports a vocabulary of {possible} at most, not {vocab_size}: "
            f"no other pair of tokens occurs {min_frequency} times; give more text or ask for vocab_size={possible}"
        )
    # A pair that BPE learnt is always the one that its ranks lead back to; if not, this would raise.
    return Tokenizer(Vocabulary.from_tokens(tokens, generation), chat_format=chat_format)


def _texts(texts: Iterable[str | Path]) -> Iterator[str]:
    if isinstance(texts, (str, Path)):
        raise ValueError("texts is one string or path; give a list of them")
    for item in texts:
        if isinstance(item, Path):
            yield from read_blocks(item)
        else:
            yield clean(item)


def read_blocks(path: Path, num_chars: int = 1 << 20) -> Iterator[str]:
    """A text file in blocks of whole lines, so that a file of any size passes through a few megabytes of memory.

    Of a .jsonl file, the field "text" of every line. Single bytes that are no UTF-8 become U+FFFD; a file that is no
    text at all raises ValueError.
    """
    if not is_text(path):
        raise ValueError(f"{path} is no text file; give UTF-8 text or JSON lines with a field 'text'")
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        while block := file.readlines(num_chars):
            yield from _json_texts(block, path) if path.suffix == ".jsonl" else ["".join(block)]


def is_text(path: Path) -> bool:
    """Whether a file looks like text: no NUL byte near its start."""
    with path.open("rb") as file:
        return b"\0" not in file.read(8192)


def _json_texts(lines: Iterable[str], path: Path) -> Iterator[str]:
    for line in filter(str.strip, lines):
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} has a line that is no JSON object with a field 'text': {line[:80]!r}") from None
        yield clean(text)


assert set(CONTROL_SETS) <= set(FORMATS), "each generation of control tokens names a chat format"
