"""Training documents that hold evaluation samples: the 13-gram rule of Qwen and the LCS rule of Qwen2 and Qwen2.5.

    index = build_index(read_samples(["eval"]), settings)
    finder = ContaminationFinder(index, settings)
    finder.find(texts)                        # for every text an Overlap or None

Texts are compared as tokens: words without symbols and punctuation, case folded, and single letters in scripts without
spaces, so that 13 tokens are 13 Chinese characters. The rules, by generation [Qwen TR 2.1; Qwen2 TR 4.4; Qwen2.5 TR 5;
Qwen2.5-Math TR 2]:

    qwen          a 13-gram of the document stands in a test sample
    qwen2         LCS >= 13 tokens and LCS >= 0.6 min(len document, len sample); LCS is the longest common subsequence
    qwen2.5-math  a 13-gram in common, and LCS > 0.6 min(...)

A subsequence of a long document holds anything: most of a 40-word question stands, in order, somewhere in a novel. So
the LCS is taken where the texts meet: around n-grams that both have, over as much text on each side as the shorter one
is long. For texts of like length, as of two questions, that is the whole of both, and the rule is the published one.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qwench.config import config
from qwench.data.minhash import MinHasher, mix, token_hashes
from qwench.data.opening import ReadLimits, decompressed

_STEP = np.uint64(0xD6E8FEB86659FD93)
_FILTER_BITS = 24
_MAX_MEETINGS = 16
"""Places of one document at which it is compared with one sample."""
_SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".txt", ".md")
_BLANK_LINE = re.compile(r"\n\s*\n")


@config
class DecontaminateSettings:
    """What is looked for, and when a document is dropped for it."""

    against: tuple[str, ...] = ()
    """Files and folders of evaluation sets: JSON, JSON lines, CSV, Parquet, text; compressed too. Every text in them
    of 13 tokens and more counts, whatever field it is in, and so does each record as a whole."""
    rule: Literal["qwen", "qwen2", "qwen2.5-math"] = "qwen2"
    """A shared 13-gram; the longest common subsequence; or both."""
    min_tokens: int = 13
    """Length of the n-gram, and least length of the subsequence."""
    min_share: float = 0.6
    """Of the shorter text, which the subsequence has to make up."""
    prefilter_tokens: int = 8
    """For rule qwen2: documents that share no n-gram of this length with a sample are not compared with it. Shorter
    finds more paraphrases and takes longer. The report's own length is unpublished."""
    common: int = 20
    """An n-gram in more samples than this is a benchmark's wording ("which of the following ...") and tells nothing;
    0: all count."""
    sample_tokens: int = 512
    """Longer texts of an evaluation set (whole chapters to read) count as several samples."""

    def __post_init__(self) -> None:
        if min(self.min_tokens, self.prefilter_tokens) < 2 or self.common < 0:
            raise ValueError("min_tokens and prefilter_tokens are at least 2, common at least 0")
        if not 0 < self.min_share <= 1:
            raise ValueError(f"min_share is {self.min_share}; give a number in (0, 1]")
        if self.sample_tokens < 4 * self.min_tokens:
            raise ValueError(f"sample_tokens is {self.sample_tokens}; give at least {4 * self.min_tokens}")

    @property
    def ngram(self) -> int:
        """Tokens that two texts must share in a row before they are compared."""
        return min(self.prefilter_tokens, self.min_tokens) if self.rule == "qwen2" else self.min_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Why a document is contaminated: `Overlap(sample="gsm8k.jsonl:12:question", tokens=41, share=0.98, ...)`."""

    sample: str
    tokens: int
    """Of the subsequence, or of the n-gram for rule qwen."""
    share: float
    """Of the shorter text; where the document is longer, that is the sample."""
    document_tokens: int
    sample_tokens: int
    excerpt: str
    """The document where they meet, as it is compared."""


# ------------------------------------------------------------------------------------------------------ test samples
@dataclass(frozen=True, slots=True)
class TestSample:
    """`TestSample("mmlu/anatomy.csv:3", "Which of the following ...")`: where it stands and its text."""

    __test__ = False  # not for pytest

    id: str
    text: str


def evaluation_files(paths: Sequence[str | Path]) -> list[tuple[str, Path]]:
    """Files of evaluation sets, with names below the given folders, sorted. Raises ValueError for what is not there or
    a folder without any."""
    found: list[tuple[str, Path]] = []
    for given in map(Path, paths):
        if given.is_file():
            found.append((given.name, given))
            continue
        if not given.is_dir():
            raise ValueError(f"there is no evaluation set at {given}; give files or folders in decontaminate.against")
        inside = sorted(path for path in given.rglob("*") if path.is_file() and _kind(path) in _SUFFIXES)
        if not inside:
            raise ValueError(f"{given} holds no evaluation set; known are {' '.join(_SUFFIXES)}")
        found += [(path.relative_to(given.parent).as_posix(), path) for path in inside]
    return found


def read_samples(files: Sequence[tuple[str, Path]]) -> Iterator[TestSample]:
    """Every text of evaluation files: single fields and whole records. What more than a tenth of a file's records have
    in common (and more than 20 of them) is a prompt and is left out. Raises ValueError for an unreadable file."""
    for name, path in files:
        try:
            records = _records(path)
        except (ValueError, OSError, KeyError) as error:
            raise ValueError(f"evaluation file {path} cannot be read ({error}); repair it or name others") from None
        texts = [dict(_texts(record)) for record in records]
        seen = Counter(text for fields in texts for text in set(fields.values()))
        limit = max(20, len(texts) // 10)
        for number, fields in enumerate(texts, 1):
            own = {field: text for field, text in fields.items() if seen[text] <= limit}
            for field, text in own.items():
                yield TestSample(f"{name}:{number}" + (f":{field}" if field else ""), text)
            if len(own) > 1:
                yield TestSample(f"{name}:{number}", "\n".join(own.values()))


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".zst", ".bz2", ".xz"):
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _records(path: Path) -> list[Any]:
    kind = _kind(path)
    if kind == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_table(path).to_pylist()
    with open(path, "rb") as raw, decompressed(raw, path.suffix.lower(), ReadLimits()) as stream:
        text = stream.read().decode("utf-8-sig", "replace")
    if kind in (".csv", ".tsv"):
        return list(csv.reader(io.StringIO(text, newline=""), delimiter="\t" if kind == ".tsv" else ","))
    if kind in (".txt", ".md"):
        return [part for part in _BLANK_LINE.split(text) if part.strip()]
    if kind == ".json":
        try:
            return _rows(json.loads(text))
        except json.JSONDecodeError:
            pass  # some call JSON lines so
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _rows(value: Any) -> list[Any]:
    """The records of a JSON document: its list, or the longest list in it."""
    if isinstance(value, list):
        return value
    lists = [entry for entry in value.values() if isinstance(entry, list)] if isinstance(value, dict) else []
    return max(lists, key=len, default=[value]) or [value]


def _texts(value: Any, field: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        if value.strip():
            yield field, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(inner, f"{field}.{key}" if field else str(key))
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            yield from _texts(inner, f"{field}.{number}" if field else str(number))


# ------------------------------------------------------------------------------------------------------------- tokens
class Tokens:
    """The tokens of D texts: `hashes` uint64 [T], `offsets` int64 [D + 1], `where` the code points they begin at."""

    def __init__(self, texts: Sequence[str], hasher: MinHasher) -> None:
        joined = b"\n".join(hasher.normalise(texts))  # a normalised text has no line breaks
        self.text = joined.decode("utf-8", "surrogatepass")
        codes = np.frombuffer(self.text.encode("utf-32-le", "surrogatepass"), "<u4")
        breaks = np.flatnonzero(codes == 10)
        self.hashes, _, self.where = token_hashes(joined)
        self.offsets = np.concatenate([[0], np.searchsorted(self.where, breaks), [len(self.where)]])

    def ngrams(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Hashes (uint64) of the n-grams inside texts, and the tokens that they begin at."""
        lengths = np.diff(self.offsets)
        counts = np.maximum(lengths - length + 1, 0)
        last = np.repeat(self.offsets[:-1] + counts, lengths)
        starts = np.flatnonzero(np.arange(len(self.hashes)) < last)
        if not len(starts):
            return np.zeros(0, np.uint64), starts
        total = np.zeros(len(self.hashes) - length + 1, np.uint64)
        for place in range(length - 1, -1, -1):
            total = total * _STEP + self.hashes[place : place + len(total)]
        return mix(total[starts]), starts

    def excerpt(self, first: int, last: int) -> str:
        """The normalised text from token `first` up to and with `last`."""
        begin = int(self.where[first])
        end = int(self.where[last + 1]) if last + 1 < len(self.where) else len(self.text)
        return self.text[begin:end].partition("\n")[0].strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class ContaminationIndex:
    """Test samples ready for comparison: G n-grams sorted by hash, S samples of T tokens."""

    grams: np.ndarray
    """uint64 [G]"""
    owners: np.ndarray
    """int32 [G], sample of each n-gram"""
    places: np.ndarray
    """int32 [G], token of the sample where it begins"""
    tokens: np.ndarray
    """uint64 [T]"""
    offsets: np.ndarray
    """int64 [S + 1]"""
    ids: list[str]

    def save(self, directory: Path) -> None:
        for name in _ARRAYS:
            np.save(directory / f"{name}.npy", getattr(self, name))
        (directory / "ids.json").write_text(json.dumps(self.ids, ensure_ascii=False), encoding="utf-8")

    @staticmethod
    def load(directory: Path) -> ContaminationIndex:
        """Its arrays stay on the disk and are shared by all processes that read them."""
        arrays = {name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
        return ContaminationIndex(ids=json.loads((directory / "ids.json").read_text(encoding="utf-8")), **arrays)


_ARRAYS = ("grams", "owners", "places", "tokens", "offsets")


def build_index(
    samples: Iterator[TestSample] | Sequence[TestSample], settings: DecontaminateSettings
) -> ContaminationIndex:
    """Equal samples count once, under the first one's id; those shorter than `min_tokens` no rule finds."""
    hasher, length = MinHasher(), settings.ngram
    ids: list[str] = []
    tokens: list[np.ndarray] = []
    seen: set[bytes] = set()
    waiting: list[TestSample] = []

    def take() -> None:
        batch = Tokens([sample.text for sample in waiting], hasher)
        for sample, begin, end in zip(waiting, batch.offsets, batch.offsets[1:], strict=False):
            whole = batch.hashes[begin:end]
            pieces = max(1, -(-len(whole) // settings.sample_tokens))
            for number, piece in enumerate(np.array_split(whole, pieces), 1):
                key = piece.tobytes()
                if len(piece) >= settings.min_tokens and key not in seen:
                    seen.add(key)
                    ids.append(sample.id if pieces == 1 else f"{sample.id} ({number}/{pieces})")
                    tokens.append(piece)
        waiting.clear()

    size = 0
    for sample in samples:
        waiting.append(sample)
        size += len(sample.text)
        if size > 1 << 20:
            take()
            size = 0
    if waiting:
        take()
    offsets = np.concatenate([[0], np.cumsum([len(piece) for piece in tokens])]).astype(np.int64)
    flat = np.concatenate(tokens) if tokens else np.zeros(0, np.uint64)
    counts = np.maximum(np.diff(offsets) - length + 1, 0)
    owners = np.repeat(np.arange(len(ids), dtype=np.int32), counts)
    places = (np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)).astype(np.int32)
    starts = offsets[owners] + places
    total = np.zeros(len(starts), np.uint64)
    for place in range(length - 1, -1, -1):
        total = total * _STEP + flat[starts + place]
    grams = mix(total)
    order = np.lexsort((places, owners, grams))
    grams, owners, places = grams[order], owners[order], places[order]
    if settings.common and len(grams):
        first = np.flatnonzero(np.concatenate([[True], grams[1:] != grams[:-1]]))
        new_owner = np.concatenate([[True], (grams[1:] != grams[:-1]) | (owners[1:] != owners[:-1])])
        rare = np.repeat(np.add.reduceat(new_owner, first, dtype=np.int64), np.diff(first, append=len(grams)))
        keep = rare <= settings.common
        grams, owners, places = grams[keep], owners[keep], places[keep]
    return ContaminationIndex(grams=grams, owners=owners, places=places, tokens=flat, offsets=offsets, ids=ids)


# ------------------------------------------------------------------------------------------------------------- finding
class ContaminationFinder:
    """Compares texts with an index."""

    def __init__(self, index: ContaminationIndex, settings: DecontaminateSettings) -> None:
        self.index, self.settings = index, settings
        self._hasher = MinHasher()
        # Nearly all n-grams of a corpus stand in no sample: one look at a table settles that.
        self._filter = np.zeros(1 << _FILTER_BITS, bool)
        self._filter[np.asarray(index.grams) >> np.uint64(64 - _FILTER_BITS)] = True

    def find(self, texts: Sequence[str]) -> list[Overlap | None]:
        """For each text the first sample that its most n-grams point to and that fulfils the rule, or None."""
        result: list[Overlap | None] = [None] * len(texts)
        if not texts or not len(self.index.grams):
            return result
        tokens = Tokens(texts, self._hasher)
        grams, starts = tokens.ngrams(self.settings.ngram)
        maybe = np.flatnonzero(self._filter[grams >> np.uint64(64 - _FILTER_BITS)])
        grams, starts = grams[maybe], starts[maybe]
        low = np.searchsorted(self.index.grams, grams, "left")
        high = np.searchsorted(self.index.grams, grams, "right")
        meetings: dict[int, dict[int, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
        texts_of = np.searchsorted(tokens.offsets, starts, "right") - 1
        for hit in np.flatnonzero(high > low):
            text, start = int(texts_of[hit]), int(starts[hit])
            for entry in range(low[hit], high[hit]):
                meetings[text][int(self.index.owners[entry])].append((start, int(self.index.places[entry])))
        for text, samples in meetings.items():
            begin, end = int(tokens.offsets[text]), int(tokens.offsets[text + 1])
            for sample, places in sorted(samples.items(), key=lambda entry: (-len(entry[1]), entry[0])):
                if (overlap := self._judge(tokens, begin, end, sample, places)) is not None:
                    result[text] = overlap
                    break
        return result

    def _judge(
        self, tokens: Tokens, begin: int, end: int, sample: int, places: list[tuple[int, int]]
    ) -> Overlap | None:
        settings, index = self.settings, self.index
        first, last = int(index.offsets[sample]), int(index.offsets[sample + 1])
        document_length, sample_length = end - begin, last - first
        shorter = min(document_length, sample_length)
        told: dict[str, Any] = {
            "sample": index.ids[sample], "document_tokens": document_length, "sample_tokens": sample_length
        }  # fmt: skip
        if settings.rule == "qwen":
            start = places[0][0]
            excerpt = tokens.excerpt(start, start + settings.ngram - 1)
            return Overlap(tokens=settings.ngram, share=settings.ngram / shorter, excerpt=excerpt, **told)
        needed = max(settings.min_tokens, settings.min_share * shorter)
        if shorter < settings.min_tokens:
            return None
        seen_until, looked = -1, 0
        for start, place in places:
            if start + settings.ngram <= seen_until:
                continue  # lies in a stretch that was compared
            if looked == _MAX_MEETINGS:
                break
            looked += 1
            low, high = max(begin, start - shorter), min(end, start + settings.ngram + shorter)
            seen_until = high
            ours = tokens.hashes[low:high]
            theirs = index.tokens[
                max(first, first + place - shorter) : min(last, first + place + settings.ngram + shorter)
            ]
            shared = np.isin(ours, theirs)
            if np.count_nonzero(shared) < needed:
                continue
            ours = ours[shared]  # others are in no common subsequence
            found = lcs_length(ours, theirs)
            strict = settings.rule == "qwen2.5-math"
            if found >= needed and (not strict or found > settings.min_share * shorter):
                at = np.flatnonzero(shared) + low
                excerpt = tokens.excerpt(int(at[0]), int(at[-1]))
                return Overlap(tokens=found, share=found / shorter, excerpt=excerpt, **told)
        return None


def lcs_length(left: np.ndarray, right: np.ndarray) -> int:
    """Length of the longest common subsequence of two sequences of integers, 64 and more cells a step [Hyyrö 2004].

    >>> lcs_length(np.array([1, 2, 3, 4]), np.array([2, 9, 4]))
    2
    """
    if len(left) > len(right):
        left, right = right, left
    masks: dict[int, int] = {}
    for place, token in enumerate(left.tolist()):
        masks[token] = masks.get(token, 0) | 1 << place
    full = (1 << len(left)) - 1
    row = full
    for token in right.tolist():
        mask = masks.get(token)
        if mask is not None:
            both = row & mask
            row = ((row + both) | (row - both)) & full
    return len(left) - row.bit_count()
