"""The linear scorer: features, training, files, thresholds and its commands."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest

from qwench.data.classifier import Classifier, ClassifierSettings, hash_features, minimise, train_classifier
from qwench.data.classifier_command import main
from qwench.data.scoring import class_figures, held_out, ranking, read_labelled, threshold_for_recall

SETTINGS = ClassifierSettings(bucket_bits=14)
TOPICS = {
    "maths": ["theorem", "proof", "integral", "lemma", "matrix", "equation", "vector", "algebra"],
    "sports": ["match", "goal", "player", "season", "coach", "league", "stadium", "referee"],
    "科学": ["物理学", "实验室", "量子力学", "分子结构", "基因", "化学反应"],
}
FILLER = ["the", "of", "and", "to", "in", "that", "was", "with", "from", "this"]


def make_texts(num: int, seed: int = 0) -> tuple[list[str], list[str]]:
    draw = random.Random(seed)
    texts, labels = [], []
    for number in range(num):
        label = list(TOPICS)[number % len(TOPICS)]
        words = draw.choices(TOPICS[label], k=3) + (draw.choices(FILLER, k=12) if label != "科学" else ["的", "是"])
        draw.shuffle(words)
        texts.append(("" if label == "科学" else " ").join(words))
        labels.append(label)
    return texts, labels


@pytest.fixture(scope="module")
def model() -> Classifier:
    return train_classifier(*make_texts(300), SETTINGS)


def test_features_of_a_text_are_its_own():
    texts = [*make_texts(20)[0], "", "!!! ...", "naïve CAFÉ 数学 mixed"]
    settings = dataclasses.replace(SETTINGS, char_ngrams=(3, 4))
    together = hash_features(texts, settings)
    for place, text in enumerate(texts):
        alone = hash_features([text], settings)
        begin, end = together.bounds[place], together.bounds[place + 1]
        assert np.array_equal(together.buckets[begin:end], alone.buckets)
        assert np.array_equal(together.values[begin:end], alone.values)


def test_the_number_of_features_is_that_of_distinct_ngrams():
    # a b a b: words a, b; pairs ab, ba. 甲乙丙: 3 letters, 2 pairs, 1 triple.
    found = hash_features(["a b a b", "甲乙丙"], ClassifierSettings(bucket_bits=24))
    assert np.diff(found.bounds).tolist() == [4, 6]
    assert sorted(found.values[:4].tolist()) == pytest.approx([1.0, 1.693147, 1.693147, 1.693147])


def test_it_learns_topics_of_both_scripts(model: Classifier):
    texts, labels = make_texts(90, seed=1)
    guesses = [model.labels[place] for place in model.score(texts).argmax(axis=1)]
    assert np.mean([g == t for g, t in zip(guesses, labels, strict=True)]) > 0.98
    assert np.allclose(model.score(texts).sum(axis=1), 1, atol=1e-6)


def test_random_labels_are_not_learnt():
    texts, labels = make_texts(300)
    random.Random(5).shuffle(labels)
    wrong = train_classifier(texts, labels, SETTINGS)
    fresh, truth = make_texts(300, seed=2)
    guesses = [wrong.labels[place] for place in wrong.score(fresh).argmax(axis=1)]
    assert np.mean([g == t for g, t in zip(guesses, truth, strict=True)]) < 0.6


def test_training_finds_the_minimum_of_its_loss():
    # Against the closed form of a quadratic.
    draw = np.random.default_rng(0)
    factor = draw.normal(size=(30, 12))
    matrix, right = factor.T @ factor + np.eye(12), draw.normal(size=12)
    found = minimise(
        lambda x: (float(0.5 * x @ matrix @ x - right @ x), matrix @ x - right), np.zeros(12), 200, tolerance=1e-9
    )
    assert np.allclose(found, np.linalg.solve(matrix, right), atol=1e-6)


def test_a_saved_model_is_the_same(model: Classifier, tmp_path: Path):
    model.save(tmp_path / "a")
    model.save(tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    texts, _ = make_texts(30, seed=3)
    assert np.array_equal(Classifier.load(tmp_path / "a").score(texts), model.score(texts))
    damaged = bytearray((tmp_path / "a/model.safetensors").read_bytes())
    damaged[-5] ^= 1
    (tmp_path / "a/model.safetensors").write_bytes(damaged)
    with pytest.raises(ValueError, match="damaged"):
        Classifier.load(tmp_path / "a")
    with pytest.raises(ValueError, match="qwench classifier train"):
        Classifier.load(tmp_path / "nowhere")


def test_scores_do_not_depend_on_company(model: Classifier):
    texts, _ = make_texts(40, seed=4)
    together = model.score(texts)
    alone = np.concatenate([model.score([text]) for text in texts])
    assert np.array_equal(together, alone)


@pytest.mark.parametrize(
    ("texts", "labels", "classes", "message"),
    [
        (["a"], ["x"], (), "one class only"),
        (["a", "b"], ["x", "y"], ("x", "y", "z"), "no text of class 'z'"),
        (["a", "b", "c"], ["x", "y", "z"], ("x", "y"), "label 'z' is none of"),
    ],
)
def test_bad_labels_are_named(texts: list[str], labels: list[str], classes: tuple[str, ...], message: str):
    with pytest.raises(ValueError, match=message):
        train_classifier(texts, labels, SETTINGS, classes)


def test_figures_are_those_of_the_definition():
    truth, guesses = list("aaabbbbc"), list("aabbbbac")
    a, b, c = class_figures(truth, guesses, "abc")
    assert (a.precision, a.recall) == (2 / 3, 2 / 3)
    assert (b.precision, b.recall) == (3 / 4, 3 / 4)
    assert c.f1 == 1
    assert [a.documents, b.documents, c.documents] == [3, 4, 1]


@pytest.mark.parametrize("recall", [0.25, 0.5, 0.9, 1.0])
def test_the_threshold_reaches_the_recall_and_is_the_highest(recall: float):
    draw = np.random.default_rng(1)
    scores, positive = draw.random(200), draw.random(200) < 0.4
    threshold = threshold_for_recall(scores, positive, recall)
    assert (scores[positive] >= threshold).mean() >= recall
    assert (scores[positive] > threshold).mean() < recall


def test_ranking_counts_pairs():
    scores, positive = np.array([0.1, 0.4, 0.4, 0.8]), np.array([False, True, False, True])
    assert ranking(scores, positive) == (2 + 1.5) / 4


def test_equal_texts_are_held_out_together():
    texts = [f"text number {n}" for n in range(2000)]
    share = np.mean([held_out(text, 0.2) for text in texts])
    assert 0.16 < share < 0.24
    assert all(held_out(text, 0.2) == held_out(f"  {text.upper()}\n", 0.2) for text in texts[:50])


def test_train_measure_and_apply_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    texts, labels = make_texts(600)
    rows = [(text, label) for text, label in zip(texts, labels, strict=True) if label != "科学"]
    table = tmp_path / "rows.csv"
    table.write_text("body,what\n" + "".join(f'"{text}",{label}\n' for text, label in rows), encoding="utf-8")
    out = tmp_path / "model"
    fields = ["--text-field", "body", "--label-field", "what"]
    arguments = [str(out), str(table), *fields, "--positive", "maths", "--recall", "0.9", "--set", "bucket_bits=12"]
    assert main(["train", *arguments]) == 0
    saved = Classifier.load(out)
    assert saved.labels == ("sports", "maths")
    assert saved.figures["classes"]["maths"][1] >= 0.9
    assert "precision" in capsys.readouterr().out
    assert main(["measure", str(out), str(table), *fields]) == 0
    assert "accuracy" in capsys.readouterr().out
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text, _ in rows[:10]))
    assert main(["apply", str(out), str(tmp_path / "docs.jsonl"), "--out", str(tmp_path / "scored.jsonl")]) == 0
    scored = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    assert [entry["meta"]["label"] for entry in scored] == [label for _, label in rows[:10]]
    assert list(read_labelled(tmp_path / "scored.jsonl", "text", "meta.label")) == rows[:10]
    with pytest.raises(ValueError, match=r"record 1 has no text in 'body'"):
        main(["measure", str(out), str(tmp_path / "docs.jsonl"), *fields])


def test_classes_from_folders(tmp_path: Path):
    texts, labels = make_texts(300)
    for name in ("maths", "sports"):
        (tmp_path / name).mkdir()
        rows = [json.dumps({"text": t}) for t, label in zip(texts, labels, strict=True) if label == name]
        (tmp_path / name / "docs.jsonl").write_text("\n".join(rows))
    classes = ["--class", f"maths={tmp_path}/maths", "--class", f"sports={tmp_path}/sports"]
    assert main(["train", str(tmp_path / "model"), *classes, "--held-out", "0.3", "--set", "bucket_bits=12"]) == 0
    saved = Classifier.load(tmp_path / "model")
    assert saved.labels == ("maths", "sports")
    assert saved.figures["accuracy"] > 0.98
