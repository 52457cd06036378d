"""The peers of `data_models.py`, run with a Python that has them: fastText and scikit-learn's logistic regression.

    pip install fasttext-community scikit-learn
    PYTHON benchmarks/data_models_peers.py INPUT OUT          (called by the benchmark itself)

INPUT: {"train": [[text, label], ...], "test": [text, ...], "unspaced": true for Chinese}; OUT: peer -> labels of the
test texts, seconds of CPU for training and for applying.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_HAN = re.compile("([\u3400-\u4dbf\u4e00-\u9fff])")


def line(text: str) -> str:
    """Words between blanks, every Chinese character one of them: the peers cut at blanks only."""
    return " ".join(_HAN.sub(r" \1 ", text.lower()).split())


def fasttext_peer(train: list[list[str]], test: list[str], unspaced: bool) -> dict[str, Any]:
    import fasttext  # pyright: ignore[reportMissingImports]

    names = sorted({label for _, label in train})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train.txt")
        path.write_text("".join(f"__label__{names.index(label)} {line(text)}\n" for text, label in train))
        started = time.process_time()
        epochs = max(10, min(300, 100_000 // len(train)))  # few texts need many
        model = fasttext.train_supervised(  # pyright: ignore[reportAttributeAccessIssue]
            str(path),
            lr=0.5,
            epoch=epochs,
            dim=64,
            wordNgrams=3 if unspaced else 2,
            bucket=1 << 20,
            thread=1,
            verbose=0,
        )
        trained = time.process_time()
    lines = [line(text) + "\n" for text in test]
    labels = [model.f.predict(text, 1, 0.0, "strict")[0][1] for text in lines]
    return {
        "labels": [names[int(label.removeprefix("__label__"))] for label in labels],
        "train_s": trained - started,
        "apply_s": time.process_time() - trained,
    }


def sklearn_peer(train: list[list[str]], test: list[str], unspaced: bool) -> dict[str, Any]:
    from sklearn.feature_extraction.text import TfidfVectorizer  # pyright: ignore[reportMissingImports]
    from sklearn.linear_model import LogisticRegression  # pyright: ignore[reportMissingImports]

    kind: Any = (
        {"analyzer": "char", "ngram_range": (1, 3)}
        if unspaced
        else {"ngram_range": (1, 2), "token_pattern": r"\b\w+\b"}
    )
    started = time.process_time()
    vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=2, **kind)
    model = LogisticRegression(C=8, max_iter=200)
    model.fit(vectorizer.fit_transform([line(text) for text, _ in train]), [label for _, label in train])
    trained = time.process_time()
    labels = model.predict(vectorizer.transform([line(text) for text in test])).tolist()
    return {"labels": labels, "train_s": trained - started, "apply_s": time.process_time() - trained}


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    results = {
        name: peer(given["train"], given["test"], given["unspaced"])
        for name, peer in (("fasttext", fasttext_peer), ("scikit-learn", sklearn_peer))
    }
    Path(sys.argv[2]).write_text(json.dumps(results), encoding="utf-8")
