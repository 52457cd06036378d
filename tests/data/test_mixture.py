"""The mixture: shares asked and had, limits of repetition, phases, and rows in those shares."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from qwench import config
from qwench.data.mixture import (
    MixedDataset,
    MixedShards,
    MixtureConfig,
    PhaseConfig,
    is_mixture,
    plan_mixture,
    write_mixture,
)
from qwench.data.shards import ShardWriter

SIZES = {"web": 6000, "code": 3000, "math": 1000}


def achieved(plan) -> dict[str, float]:
    total = sum(plan.tokens.values())
    return {group: tokens / total for group, tokens in plan.tokens.items()}


def test_without_wishes_everything_is_read_once() -> None:
    plan = plan_mixture(SIZES, MixtureConfig())
    assert plan.tokens == SIZES
    assert plan.epochs == {"web": 1, "code": 1, "math": 1}


def test_shares_and_weights() -> None:
    plan = plan_mixture(SIZES, MixtureConfig(shares={"code": 0.5}))
    assert achieved(plan) == pytest.approx({"code": 0.5, "web": 0.5 * 6 / 7, "math": 0.5 / 7}, abs=1e-3)
    plan = plan_mixture(SIZES, MixtureConfig(weights={"math": 4.0, "web": 0.5}))
    assert achieved(plan) == pytest.approx({"web": 0.3, "code": 0.3, "math": 0.4}, abs=1e-3)
    assert plan.epochs["math"] == pytest.approx(4, abs=0.01)
    plan = plan_mixture(SIZES, MixtureConfig(weights={"web": 0}, tokens=2000))
    assert plan.tokens == {"web": 0, "code": 1500, "math": 500}


def test_repetition_is_limited_and_the_rest_goes_to_the_others() -> None:
    plan = plan_mixture(SIZES, MixtureConfig(shares={"math": 0.5, "code": 0.25}, max_epochs=2))
    assert plan.tokens["math"] == 2000, "asked for 5,000"
    assert plan.tokens["code"] == plan.tokens["web"] == 4000, "equal targets share what math could not give"
    assert "50.00%   20.00%" in plan.describe()
    only = plan_mixture(SIZES, MixtureConfig(max_epochs=2, tokens=40_000, max_group_epochs={"code": 1}))
    assert only.tokens == {"web": 12000, "code": 3000, "math": 2000}
    assert "23,000 of the 40,000 tokens asked for cannot be had" in only.describe()


def test_phases_share_the_limit() -> None:
    phases = {"main": PhaseConfig(share=0.8), "final": PhaseConfig(share=0.2, shares={"math": 1.0})}
    plan = plan_mixture(SIZES, MixtureConfig(phases=phases, max_epochs=1.5))
    main, final = plan.phases
    assert (main.name, final.name) == ("main", "final")
    assert sum(main.tokens.values()) == pytest.approx(8000, abs=3)
    assert plan.tokens["math"] == pytest.approx(1500, abs=2)
    assert main.tokens["math"] / final.tokens["math"] == pytest.approx(800 / 2000, rel=0.01), "held back in both alike"
    assert main.tokens["web"] == pytest.approx(2 * main.tokens["code"], rel=0.01)


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"names 'wiki', which no document is in; groups by kind are code, math, web"):
        plan_mixture(SIZES, MixtureConfig(shares={"wiki": 0.1}))
    with pytest.raises(ValueError, match="no tokens to mix"):
        plan_mixture({"web": 0}, MixtureConfig())
    with pytest.raises(ValueError, match="share or weight 0"):
        plan_mixture({"web": 5}, MixtureConfig(weights={"web": 0}))
    for wrong, says in [
        ("shares={a=0.7,b=0.7}", "add up to 1.4"),
        ("shares={a=0.5}|weights={a=2}", "both a share and a weight for a"),
        ("phases={a={share=0.5}}", "phases add up to 0.5"),
        ("by=['colour']", "give some of kind, source, lang"),
        ("max_epochs=0", "limit of epochs"),
    ]:
        with pytest.raises(ValueError, match=says):
            config.load(MixtureConfig, wrong.split("|"))


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """Three groups whose tokens tell the group and the document."""
    sizes = {}
    for number, (group, documents) in enumerate({"web": 60, "code": 30, "math": 3}.items()):
        with ShardWriter(tmp_path / group, tokenizer_fingerprint="f", vocab_size=60_000) as writer:
            for document in range(documents):
                writer.add(np.full(40, 1000 * number + document))
        sizes[group] = writer.num_tokens
    phases = {"main": PhaseConfig(share=0.75), "final": PhaseConfig(share=0.25, shares={"math": 0.3, "code": 0.7})}
    cfg = MixtureConfig(shares={"web": 0.5}, tokens=40_000, max_epochs=50, phases=phases)
    write_mixture(tmp_path, plan_mixture(sizes, cfg), {group: group for group in sizes}, {})
    return tmp_path


def test_rows_have_the_shares_everywhere(mixture: Path) -> None:
    assert is_mixture(mixture)
    shards = MixedShards.open(mixture, "f")
    data = MixedDataset(shards, 20, seed=3)
    assert data.source_names == ("code", "math", "web")
    assert data.num_rows == pytest.approx(2000, abs=3)
    places = [data.place(index) for index in range(data.num_rows)]
    for group, name in enumerate(data.source_names):
        ranks = [rank for g, rank in places if g == group]
        assert ranks == list(range(len(ranks))), f"every row of {name} once, in order"
    wanted = {name: shards.phases[0].tokens[name] / 30_000 for name in data.source_names}
    for start in range(0, 1201, 100):
        seen = Counter(data.source_names[g] for g, _ in places[start : start + 300])
        assert {n: seen[n] / 300 for n in wanted} == pytest.approx(wanted, abs=0.07), f"rows {start} on"
    final = Counter(data.source_names[g] for g, _ in places[1501:])
    assert final["web"] == 0
    assert final["math"] / final.total() == pytest.approx(0.3, abs=0.01)


def test_rows_are_those_of_the_groups_and_say_so(mixture: Path) -> None:
    data = MixedDataset(MixedShards.open(mixture), 20, seed=3)
    counts: Counter[int] = Counter()
    for index in range(0, data.num_rows, 7):
        row = data.row(0, index)
        assert row.sources is not None
        assert set(row.sources.tolist()) == {data.place(index)[0]}
        kind = {"web": 0, "code": 1, "math": 2}[data.source_names[int(row.sources[0])]]
        assert set((row.tokens // 1000).tolist()) == {kind}
        counts.update(row.tokens.tolist())
    same = MixedDataset(MixedShards.open(mixture), 20, seed=3)
    np.testing.assert_array_equal(same.row(0, 5).tokens, data.row(0, 5).tokens)
    assert same.fingerprint == data.fingerprint
    other = MixedDataset(MixedShards.open(mixture), 20, seed=4)
    assert other.fingerprint != data.fingerprint
    assert [data.place(i) for i in range(500)] != [other.place(i) for i in range(500)]
    assert data.row(1, 0).num_tokens == 20, "a second pass over the plan goes on with further epochs"


def test_every_document_of_a_group_is_read_equally_often(mixture: Path) -> None:
    data = MixedDataset(MixedShards.open(mixture), 20, seed=3)
    counts: Counter[int] = Counter()
    for index in range(data.num_rows):
        counts.update(data.row(0, index).tokens.tolist())
    web = [counts[document] for document in range(60)]
    epochs = sum(web) / (60 * 40)
    assert epochs == pytest.approx(15000 / 2400, rel=0.05)
    assert max(web) - min(web) <= 80, "one epoch more or less, and what ends an epoch without filling a row"


def test_groups_too_small_for_a_row_are_left_out(mixture: Path) -> None:
    data = MixedDataset(MixedShards.open(mixture), 200)
    assert data.left_out == ("math",)
    assert set(data.source_names) == {"code", "web"}
    with pytest.raises(ValueError, match=r"no group of .* has 100001 tokens"):
        MixedDataset(MixedShards.open(mixture), 100_000)


def test_other_shards_than_planned_are_refused(mixture: Path) -> None:
    with pytest.raises(ValueError, match="made with tokenizer"):
        MixedShards.open(mixture, "another")
    with ShardWriter(mixture / "new", tokenizer_fingerprint="f", vocab_size=60_000) as writer:
        writer.add(np.arange(50))
    for path in (mixture / "math").iterdir():
        path.unlink()
    (mixture / "math").rmdir()
    (mixture / "new").rename(mixture / "math")
    with pytest.raises(ValueError, match=r"other shards than mixture\.json was made for"):
        MixedShards.open(mixture)
    with pytest.raises(ValueError, match="holds no mixture"):
        MixedShards.open(mixture / "web")
