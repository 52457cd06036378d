"""One small linear scorer for quality, safety and domains: hashed n-grams, logistic regression or softmax, numpy alone.

    model = train_classifier(texts, labels, ClassifierSettings(), classes=("bad", "good"))
    model.save(directory)                    # model.json, model.safetensors
    Classifier.load(directory).score(texts)  # probabilities [N, classes]

Features are n-grams of words, of letters in scripts without spaces and of characters inside spaced text, hashed into
buckets, present or counted by logarithm, weighed by rarity and brought to unit length. Training is deterministic
(L-BFGS over all documents), so the same files give the same bytes. Thresholds and figures are `data.scoring`'s.

Shape suffixes: N texts, B buckets (one more for the bias), C classes; features are stored row after row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qwench.config import config, from_dict
from qwench.data.minhash import MinHasher, mix, token_hashes
from qwench.run import write_atomically

FORMAT = "qwench-classifier"
VERSION = 1
MODEL_JSON, MODEL_WEIGHTS = "model.json", "model.safetensors"
DOMAINS = (
    "technology", "science", "academic", "maths", "code", "encyclopedia", "news", "books", "poetry", "forum",
    "social_media", "e-commerce", "entertainment", "legal", "health", "finance", "sports", "travel", "religion",
    "education", "reference", "instructions", "other",
)  # fmt: skip
"""The taxonomy of domains. Which of them a classifier tells apart is what its training data had."""
_STEP = np.uint64(0xD6E8FEB86659FD93)
_BATCH_CHARS = 1 << 20


@config
class ClassifierSettings:
    """What a classifier looks at, and how it is trained."""

    word_ngrams: int = 2
    """Longest n-gram of words."""
    letter_ngrams: int = 3
    """Longest n-gram of letters in scripts without spaces."""
    char_ngrams: tuple[int, ...] = ()
    """Lengths of n-grams of characters of spaced text, blanks included: [3, 4, 5] finds misspellings and parts of
    words, and takes several times as long."""
    bucket_bits: int = 20
    """2 to this power features."""
    max_chars: int = 10_000
    """Longer texts are judged by their beginning, middle and end, of so many characters together."""
    min_documents: int = 2
    """Features in fewer training documents are not used."""
    strength: float = 8.0
    """Inverse of the L2 penalty: larger follows the training data more closely (scikit-learn's C)."""
    iterations: int = 120

    def __post_init__(self) -> None:
        if min(self.word_ngrams, self.letter_ngrams, *self.char_ngrams, 8) < 1:
            raise ValueError("word_ngrams, letter_ngrams and char_ngrams are lengths of at least 1")
        if not 8 <= self.bucket_bits <= 24:
            raise ValueError(f"bucket_bits is {self.bucket_bits}; give 8 to 24")
        if self.strength <= 0 or self.iterations < 1 or self.min_documents < 1 or self.max_chars < 100:
            raise ValueError("strength, iterations and min_documents are positive, max_chars at least 100")


# ------------------------------------------------------------------------------------------------------------ features
@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """Of N texts: those of text i are `buckets[bounds[i]:bounds[i + 1]]` (int32, ascending), with float32 `values`."""

    buckets: np.ndarray
    values: np.ndarray
    bounds: np.ndarray


def hash_features(texts: Sequence[str], settings: ClassifierSettings) -> Features:
    """1 + ln(count) for every n-gram in a text."""
    hasher = MinHasher()
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    first, size = 0, 0
    cut = [_shorten(text, settings.max_chars) for text in texts]
    for place, text in enumerate(cut):
        size += len(text)
        if size >= _BATCH_CHARS or place == len(cut) - 1:
            parts.append(_hash_batch(cut[first : place + 1], settings, hasher))
            first, size = place + 1, 0
    counts = np.concatenate([part[2] for part in parts]) if parts else np.zeros(0, np.int64)
    return Features(
        buckets=np.concatenate([part[0] for part in parts]) if parts else np.zeros(0, np.int32),
        values=np.concatenate([part[1] for part in parts]) if parts else np.zeros(0, np.float32),
        bounds=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
    )


def _shorten(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    third = most // 3
    middle = (len(text) - third) // 2
    return "\n".join((text[:third], text[middle : middle + third], text[-third:]))


def _hash_batch(
    texts: Sequence[str], settings: ClassifierSettings, hasher: MinHasher
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Buckets, values, and the number of both for every text."""
    joined = b"\n".join(hasher.normalise(texts))
    codes = np.frombuffer(joined.decode("utf-8", "surrogatepass").encode("utf-32-le", "surrogatepass"), "<u4")
    breaks = np.flatnonzero(codes == 10)
    tokens, kinds, where = token_hashes(joined)
    text_of = np.searchsorted(breaks, where).astype(np.uint64)
    shift = np.uint64(64 - settings.bucket_bits)
    bits = np.uint64(settings.bucket_bits)
    keys = []  # text and bucket in one number
    for length in range(1, max(settings.word_ngrams, settings.letter_ngrams) + 1):
        count = len(tokens) - length + 1
        if count < 1:
            break
        longest = np.where(kinds[:count] == 2, settings.letter_ngrams, settings.word_ngrams)
        starts = np.flatnonzero((longest >= length) & (text_of[:count] == text_of[length - 1 :]))
        total = np.full(len(starts), length, np.uint64)
        for place in range(length):
            total = total * _STEP + tokens[starts + place]
        keys.append(text_of[starts] << bits | mix(total) >> shift)
    spaced = np.ones(len(codes), bool)
    spaced[where[kinds == 2]] = False
    spaced &= codes != 10
    runs = np.cumsum(~spaced)
    for length in settings.char_ngrams:
        count = len(codes) - length + 1
        if count < 1:
            continue
        starts = np.flatnonzero(spaced[:count] & (runs[:count] == runs[length - 1 :]))
        total = np.full(len(starts), 1000 + length, np.uint64)
        for place in range(length):
            total = total * _STEP + codes[starts + place]
        keys.append(np.searchsorted(breaks, starts).astype(np.uint64) << bits | mix(total) >> shift)
    if not (whole := np.sort(np.concatenate(keys)) if keys else np.zeros(0, np.uint64)).size:
        return np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(len(texts), np.int64)
    first = np.flatnonzero(np.concatenate([[True], whole[1:] != whole[:-1]]))
    counts = np.diff(first, append=len(whole))
    distinct = whole[first]
    per_text = np.bincount((distinct >> bits).astype(np.int64), minlength=len(texts))
    buckets = (distinct & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int32)
    return buckets, (1 + np.log(counts)).astype(np.float32), per_text


# --------------------------------------------------------------------------------------------------------------- model
@dataclass(frozen=True, slots=True, kw_only=True)
class Classifier:
    """Probabilities of classes from a text's n-grams."""

    settings: ClassifierSettings
    labels: tuple[str, ...]
    """Of the columns of `score`; of two classes the second is the positive one."""
    rarity: np.ndarray
    """float32 [B], factor on each feature; 0 for those that are not used."""
    weights: np.ndarray
    """float32 [C, B + 1], the last column the bias; one row for two classes."""
    threshold: float = 0.5
    """Chosen on held-out documents; for two classes."""
    figures: dict[str, Any] = field(default_factory=dict)
    """What was measured on held-out documents when it was trained."""

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [N, classes]; each row adds up to 1."""
        if not len(texts):
            return np.zeros((0, len(self.labels)), np.float32)
        return _probabilities(self.logits(hash_features(texts, self.settings)))

    def logits(self, features: Features) -> np.ndarray:
        """float64 [N, rows of weights]"""
        values = features.values * self.rarity[features.buckets]
        norms = np.sqrt(_row_sums(values * values, features.bounds))
        scale = 1 / np.maximum(norms, 1e-12)
        columns = [
            _row_sums(values * row[features.buckets], features.bounds) * scale + float(row[-1]) for row in self.weights
        ]
        return np.stack(columns, axis=1)

    def save(self, directory: Path) -> None:
        from safetensors.numpy import save

        directory.mkdir(parents=True, exist_ok=True)
        used = np.flatnonzero(self.rarity)
        kept = np.append(used, len(self.rarity))  # and the bias
        tensors = {
            "used": used.astype(np.int32),
            "rarity": self.rarity[used].astype(np.float16),
            "weights": np.ascontiguousarray(self.weights[:, kept], np.float32),
        }
        data = save(tensors)
        table = {
            "format": FORMAT,
            "version": VERSION,
            "labels": list(self.labels),
            "threshold": self.threshold,
            "settings": asdict(self.settings),
            "figures": self.figures,
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        (directory / MODEL_WEIGHTS).write_bytes(data)
        write_atomically(directory / MODEL_JSON, json.dumps(table, indent=1, ensure_ascii=False) + "\n")

    @staticmethod
    def load(directory: Path) -> Classifier:
        """Raises ValueError for what is no classifier or is damaged."""
        from safetensors.numpy import load

        try:
            table = json.loads((directory / MODEL_JSON).read_text(encoding="utf-8"))
            data = (directory / MODEL_WEIGHTS).read_bytes()
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{directory} holds no classifier ({error}); make one with qwench classifier train"
            ) from None
        if table.get("format") != FORMAT or table.get("version") != VERSION:
            raise ValueError(f"{directory}: {MODEL_JSON} is not of format {FORMAT} {VERSION}; train it again")
        if hashlib.sha256(data).hexdigest() != table["sha256"]:
            raise ValueError(f"{directory}: {MODEL_WEIGHTS} is damaged; train it again")
        tensors = load(data)
        settings = from_dict(ClassifierSettings, table["settings"])
        num_buckets = 1 << settings.bucket_bits
        rarity = np.zeros(num_buckets, np.float32)
        rarity[tensors["used"]] = tensors["rarity"]
        weights = np.zeros((len(tensors["weights"]), num_buckets + 1), np.float32)
        weights[:, np.append(tensors["used"], num_buckets)] = tensors["weights"]
        return Classifier(
            settings=settings,
            labels=tuple(table["labels"]),
            rarity=rarity,
            weights=weights,
            threshold=table["threshold"],
            figures=table["figures"],
        )


def open_scorer(path: Path) -> Classifier:
    """What `data.scoring` calls by name."""
    return Classifier.load(path)


def _probabilities(logits: np.ndarray) -> np.ndarray:
    if logits.shape[1] == 1:
        positive = 0.5 * (1 + np.tanh(0.5 * logits[:, 0]))
        return np.stack([1 - positive, positive], axis=1).astype(np.float32)
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (raised / raised.sum(axis=1, keepdims=True)).astype(np.float32)


def _row_sums(values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """float64 [N]: the sum of every row; 0 for an empty one."""
    counts = np.diff(bounds)
    sums = np.zeros(len(counts))
    filled = counts > 0
    if filled.any():
        sums[filled] = np.add.reduceat(values, bounds[:-1][filled], dtype=np.float64)
    return sums


# ------------------------------------------------------------------------------------------------------------ training
def train_classifier(
    texts: Sequence[str], truth: Sequence[str], settings: ClassifierSettings, classes: Sequence[str] = ()
) -> Classifier:
    """Fit a classifier to labelled texts; `classes` gives the order of the labels (of two, the second is positive).

    Raises ValueError for fewer than two classes or a label that is not among them. Memory: about 50 bytes for every
    distinct n-gram of every text, and 150 for every used feature of every class.
    """
    labels = tuple(classes) or tuple(sorted(set(truth)))
    if len(labels) < 2:
        raise ValueError(f"there is one class only ({', '.join(labels) or 'none'}); give texts of two and more")
    if missing := [label for label in labels if label not in set(truth)]:
        raise ValueError(f"there is no text of class {missing[0]!r}")
    if unknown := sorted(set(truth) - set(labels)):
        raise ValueError(f"label {unknown[0]!r} is none of {', '.join(labels)}")
    found = hash_features(texts, settings)
    num_buckets = 1 << settings.bucket_bits
    documents_with = np.bincount(found.buckets, minlength=num_buckets)
    rarity = np.where(
        documents_with >= settings.min_documents, np.log((1 + len(texts)) / (1 + documents_with)) + 1, 0
    ).astype(np.float16)  # as saved
    # Only used features, numbered anew, row by row.
    used = np.flatnonzero(rarity)
    number = np.full(num_buckets, -1, np.int32)
    number[used] = np.arange(len(used), dtype=np.int32)
    keep = number[found.buckets] >= 0
    rows = np.repeat(np.arange(len(texts)), np.diff(found.bounds))[keep]
    columns = number[found.buckets[keep]].astype(np.int64)
    values = found.values[keep] * rarity.astype(np.float32)[found.buckets[keep]]
    bounds = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(texts)))])
    values /= np.sqrt(np.maximum(_row_sums(values * values, bounds), 1e-12)).astype(np.float32)[rows]

    positions = {label: place for place, label in enumerate(labels)}
    target = np.array([positions[label] for label in truth])
    num_rows = 1 if len(labels) == 2 else len(labels)
    penalty = 1 / (settings.strength * len(texts))

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        """Mean cross-entropy and penalty, and the gradient."""
        weights = flat.reshape(num_rows, len(used) + 1)
        logits = np.stack([_row_sums(values * row[columns], bounds) + row[-1] for row in weights], axis=1)
        if num_rows == 1:
            signs = 2.0 * target - 1
            value = float(np.logaddexp(0, -signs * logits[:, 0]).mean())
            error = (-signs / (1 + np.exp(np.clip(signs * logits[:, 0], -50, 50))))[:, None]
        else:
            top = logits.max(axis=1, keepdims=True)
            log_sum = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1))
            value = float((log_sum - logits[np.arange(len(target)), target]).mean())
            error = np.exp(logits - log_sum[:, None])
            error[np.arange(len(target)), target] -= 1
        error /= len(target)
        gradient = np.empty_like(weights)
        for row in range(num_rows):
            gradient[row, :-1] = np.bincount(columns, values * error[rows, row], minlength=len(used))
            gradient[row, -1] = error[:, row].sum()
        value += 0.5 * penalty * float((weights[:, :-1] ** 2).sum())
        gradient[:, :-1] += penalty * weights[:, :-1]
        return value, gradient.ravel()

    best = minimise(loss, np.zeros(num_rows * (len(used) + 1)), settings.iterations)
    weights = np.zeros((num_rows, num_buckets + 1), np.float32)
    solved = best.reshape(num_rows, -1)
    weights[:, used] = solved[:, :-1]
    weights[:, -1] = solved[:, -1]
    return Classifier(settings=settings, labels=labels, rarity=rarity.astype(np.float32), weights=weights)


def minimise(
    loss: Callable[[np.ndarray], tuple[float, np.ndarray]],
    start: np.ndarray,
    iterations: int,
    memory: int = 8,
    tolerance: float = 3e-3,
) -> np.ndarray:
    """The minimum of a smooth convex function by L-BFGS with backtracking [Nocedal 1980]; `loss` returns value and
    gradient. Ends when no component of the gradient is above `tolerance` times the largest at the start."""
    x = start
    value, gradient = loss(x)
    enough = tolerance * float(np.abs(gradient).max())
    steps: list[tuple[np.ndarray, np.ndarray, float]] = []
    for _ in range(iterations):
        if np.abs(gradient).max() <= enough:
            break
        direction = gradient.copy()
        factors = []
        for step, change, curvature in reversed(steps):
            factors.append(float(step @ direction) / curvature)
            direction -= factors[-1] * change
        if steps:
            step, change, curvature = steps[-1]
            direction *= curvature / float(change @ change)
        else:
            direction /= max(1e-12, float(np.linalg.norm(gradient)))
        for (step, change, curvature), factor in zip(steps, reversed(factors), strict=True):
            direction += (factor - float(change @ direction) / curvature) * step
        slope = -float(gradient @ direction)
        length = 1.0
        while True:
            moved = x - length * direction
            new_value, new_gradient = loss(moved)
            if new_value <= value + 1e-4 * length * slope:
                break
            length /= 2
            if length < 1e-10:
                return x
        step, change = moved - x, new_gradient - gradient
        if (curvature := float(step @ change)) > 1e-12:
            steps = [*steps[1 - memory :], (step, change, curvature)]
        x, value, gradient = moved, new_value, new_gradient
    return x
