"""The stage of models: scores into every document's meta, documents beyond a threshold dropped with reason and value.

docs.parquet       documents with meta[field] = score, and perhaps another kind
dropped.parquet    the others, with stage "model", the model's name and direction as the reason, and the score

With `before_dedup` the same happens inside the prepare stage, document by document in batches (`Models.judge`).
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwench.config import from_dict, to_dict
from qwench.data.pipeline.parts import DOCS, DROPPED, DROPPED_SCHEMA, PartWriter, read_part
from qwench.data.pipeline.work import Item
from qwench.data.scoring import ModelConfig, Scorer, fingerprint, open_scorer
from qwench.data.text import Dropped
from qwench.types import Document, Verdict

VERSION = 1
BATCH_CHARS = 1 << 20
BATCH_DOCUMENTS = 4096
BINS = 20
"""Of the histograms, for every unit of score."""


@dataclass(frozen=True, slots=True)
class _Model:
    name: str
    config: ModelConfig
    scorer: Scorer
    column: int
    low: float | None
    high: float | None


def model_tables(models: Mapping[str, ModelConfig], before_dedup: bool) -> list[dict[str, Any]]:
    """What an item says of the models that score before or after the search for duplicates: their settings and what
    their files hold. Raises ValueError for a model that is not there or does not fit its settings."""
    chosen = {name: model for name, model in models.items() if model.before_dedup == before_dedup}
    tables = []
    for name, model in chosen.items():
        try:
            table = {
                "name": name,
                "config": {**to_dict(model), "path": str(model.path.absolute())},
                "fingerprint": fingerprint(model.path),
            }
            if model.scorer == "classifier":
                _opened(table)
        except ValueError as error:
            raise ValueError(f"models.{name}: {error}") from None
        tables.append(table)
    return tables


def _opened(table: Mapping[str, Any]) -> _Model:
    config = from_dict(ModelConfig, table["config"])
    scorer = open_scorer(config.scorer, config.path)
    if config.label and config.label not in scorer.labels:
        raise ValueError(f"label {config.label!r} is none of {', '.join(scorer.labels)}")
    column = scorer.labels.index(config.label) if config.label else len(scorer.labels) - 1
    if "trained" in (config.drop_below, config.drop_above) and (len(scorer.labels) != 2 or column != 1):
        raise ValueError('"trained" thresholds are those of the second of two classes; give a number')

    def limit(given: float | str | None) -> float | None:
        return scorer.threshold if isinstance(given, str) else given

    return _Model(table["name"], config, scorer, column, limit(config.drop_below), limit(config.drop_above))


class Models:
    """Opened models that judge batches of documents one after the other; the first that drops a document is named."""

    def __init__(self, tables: Sequence[Mapping[str, Any]]) -> None:
        self._models = [_opened(table) for table in tables]
        self.histograms: dict[str, Counter[str]] = defaultdict(Counter)
        """Field -> lower edge of a bin of scores -> documents, dropped ones included."""
        self.kinds: Counter[str] = Counter()
        """Documents that got this kind."""

    def __bool__(self) -> bool:
        return bool(self._models)

    def stream(self, results: Iterable[Document | Dropped]) -> Iterator[Document | Dropped]:
        """What `judge` makes of documents, in order; what was dropped before passes through."""
        waiting: list[Document | Dropped] = []
        size = 0
        for result in results:
            waiting.append(result)
            size += len(result.text) if isinstance(result, Document) else 0
            if size >= BATCH_CHARS or len(waiting) >= BATCH_DOCUMENTS:
                yield from self._judge_waiting(waiting)
                waiting, size = [], 0
        yield from self._judge_waiting(waiting)

    def _judge_waiting(self, waiting: Sequence[Document | Dropped]) -> Iterator[Document | Dropped]:
        judged = iter(self.judge([result for result in waiting if isinstance(result, Document)]))
        for result in waiting:
            yield next(judged) if isinstance(result, Document) else result

    def judge(self, documents: Sequence[Document]) -> list[Document | Dropped]:
        results: list[Document | Dropped] = list(documents)
        for model in self._models:
            wanted = [
                place
                for place, document in enumerate(results)
                if isinstance(document, Document)
                and (not model.config.kinds or document.kind in model.config.kinds)
                and (not model.config.langs or document.lang in model.config.langs)
            ]
            chosen = [document for place in wanted if isinstance(document := results[place], Document)]
            if not chosen:
                continue
            scores = model.scorer.score([document.text for document in chosen])
            for place, document, row in zip(wanted, chosen, scores, strict=True):
                results[place] = self._apply(model, document, row)
        return results

    def _apply(self, model: _Model, document: Document, row: np.ndarray) -> Document | Dropped:
        config = model.config
        score = round(float(row[model.column]), 6)
        field = config.field or model.name
        self.histograms[field][f"{np.floor(score * BINS) / BINS:.2f}"] += 1
        kind, meta = document.kind, {**document.meta, field: score}
        best = int(row.argmax())
        if config.set_kind and row[best] >= config.min_share:
            kind = model.scorer.labels[best]
            self.kinds[kind] += 1
            meta |= {"given_kind": document.kind, f"{field}_share": round(float(row[best]), 6)}
        scored = dataclasses.replace(document, kind=kind, meta=meta)
        direction = (
            "low" if model.low is not None and not score >= model.low
            else "high" if model.high is not None and score >= model.high
            else ""
        )  # fmt: skip
        if not direction:
            return scored
        verdict = Verdict(keep=False, reason=f"{model.name}_{direction}", value=score)
        return Dropped(id=document.id, verdict=verdict, stage="model", document=scored)

    def counts(self) -> dict[str, Any]:
        histograms = {field: dict(sorted(bins.items(), key=_edge)) for field, bins in sorted(self.histograms.items())}
        return {"scores": histograms, "kinds": dict(sorted(self.kinds.items()))}


def _edge(entry: tuple[str, int]) -> float:
    return float(entry[0])


def score_part(item: Item, directory: Path) -> dict[str, Any]:
    """Counts: documents and bytes kept and dropped, drops by reason, histograms of scores, documents by new kind."""
    models = Models(item["models"])
    reasons: Counter[str] = Counter()
    with PartWriter(directory / DOCS) as kept, PartWriter(directory / DROPPED, DROPPED_SCHEMA) as dropped:
        for result in models.stream(read_part(Path(item["docs"]))):
            if isinstance(result, Document):
                kept.add(result)
                continue
            assert result.document is not None
            reasons[f"{result.stage}: {result.verdict.reason}"] += 1
            dropped.add(result.document, result.stage, result.verdict.reason, result.verdict.value)
    return {
        "documents": kept.num_documents,
        "text_bytes": kept.num_bytes,
        "dropped": dropped.num_documents,
        "dropped_bytes": dropped.num_bytes,
        "reasons": dict(sorted(reasons.items())),
        **models.counts(),
    }
