"""Dedup of parts from hashes to rewritten files, with slices and buckets forced to be small."""

import itertools
import json
import random
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import networkx as nx
import numpy as np
import pyarrow.parquet as pq
import pytest

from qwench.data.dedup import DedupSettings, normalise
from qwench.data.minhash import MinHashSettings, exact_jaccard
from qwench.data.pipeline import dedup
from qwench.data.pipeline.dedup import DedupResult, run_dedup
from qwench.data.pipeline.dedup_hashes import HashWriter
from qwench.data.pipeline.parts import DOCS, read_part, write_part
from qwench.data.pipeline.work import Finished, Room
from qwench.types import Document

PLAIN = DedupSettings(paragraph_chars=0)
ENGLISH = [
    f"{a}{b}" for a in ("riv", "mount", "cast", "gard", "lamp", "wint") for b in ("er", "ain", "le", "en", "ing", "s")
]
HAN = "春眠不觉晓处处闻啼鸟夜来风雨声花落知多少床前明月光疑是地上霜举头望低思故乡"
THAI = "กขคงจชซญดตถทนบปพฟมยรลวสหอ"


def prepare(room: Path, parts: Sequence[Sequence[Document]], settings: DedupSettings) -> list[Finished]:
    """As the prepare stage leaves it."""
    finished = []
    for number, documents in enumerate(parts):
        directory = room / "prepare" / f"{number:05d}"
        directory.mkdir(parents=True)
        write_part(directory / DOCS, documents)
        writer = HashWriter(settings, directory)
        for document in documents:
            writer.add([document])
        finished.append(Finished(directory=directory, counts=writer.close(), digest=f"{room.name} {number}"))
    return finished


def run(
    room: Path, parts: Sequence[Sequence[Document]], settings: DedupSettings = PLAIN, workers: int = 1
) -> DedupResult:
    return run_dedup(Room(path=room, workers=workers), prepare(room, parts, settings), settings)


def kept(result: DedupResult) -> dict[str, str]:
    return {document.id: document.text for part in result.parts for document in read_part(part.docs)}


def dropped(result: DedupResult) -> dict[str, tuple[str, str]]:
    rows = [row for part in result.parts if part.dropped for row in pq.read_table(part.dropped).to_pylist()]
    return {row["id"]: (row["reason"], json.loads(row["meta"]).get("duplicate_of", "")) for row in rows}


def clusters(result: DedupResult) -> set[frozenset[str]]:
    groups: dict[int, set[str]] = {}
    for row in itertools.chain(*(pq.read_table(path).to_pylist() for path in result.clusters)):
        groups.setdefault(row["cluster"], set()).add(row["id"])
        assert len(groups[row["cluster"]]) <= row["size"]
    return {frozenset(members) for members in groups.values()}


def split(documents: Sequence[Document], sizes: int) -> list[list[Document]]:
    return [list(documents[first : first + sizes]) for first in range(0, len(documents), sizes)]


def families(seed: int, count: int = 40) -> list[Document]:
    """Texts in three scripts, each with exact copies in other case and near copies with one word changed."""
    draw = random.Random(seed)
    documents = []
    for number in range(count):
        if number % 3 == 0:
            words = [draw.choice(ENGLISH) for _ in range(120)]
            near = [*words[:60], "changed", *words[61:]]
            texts = [" ".join(words), " ".join(words).upper().replace(" ", "  "), " ".join(near)]
        else:
            letters = [draw.choice(HAN if number % 3 == 1 else THAI) for _ in range(200)]
            near = [*letters[:90], letters[0], *letters[91:]]
            texts = ["".join(letters), "".join(letters[:50]) + "\n" + "".join(letters[50:]), "".join(near)]
        for copy in range(draw.randint(1, 3)):
            meta = {"quality": draw.random()}
            documents.append(Document(id=f"{number}.{copy}", text=texts[copy], source=str(number), meta=meta))
    draw.shuffle(documents)
    return documents


@pytest.fixture
def small_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty records an item: several slices of hash values, buckets of components and of clusters."""
    monkeypatch.setattr(dedup, "_RECORD_BYTES", 1 << 14)


TINY = DedupSettings(paragraph_chars=0, memory_mb=1)


def family(document_id: str) -> str:
    return document_id.partition(".")[0]


@pytest.mark.usefixtures("small_items")
def test_one_document_of_every_family_stays_and_it_is_the_best(tmp_path: Path):
    documents = families(1, 30)
    result = run(tmp_path, split(documents, 9), TINY)
    best = {}
    for document in documents:
        best.setdefault(family(document.id), []).append((document.meta["quality"], document.id))
    assert set(kept(result)) == {max(members)[1] for members in best.values()}
    assert {frozenset(m for _, m in members) for members in best.values() if len(members) > 1} == clusters(result)
    for document_id, (reason, survivor) in dropped(result).items():
        assert survivor == max(best[family(document_id)])[1]
        by_id = {d.id: normalise(d.text).replace(" ", "") for d in documents}
        same_up_to_blanks = by_id[document_id] == by_id[survivor]
        assert reason == "near_duplicate" or same_up_to_blanks
    assert (tmp_path / "dedup-components-001").is_dir(), "components ran over buckets"
    assert result.counts["dropped"] == len(documents) - len(best) == len(dropped(result))
    table = pq.read_table(result.parts[0].keep).to_pydict()
    assert table["keep"] == [d.id in kept(result) for d in documents[:9]]
    meta = {d.id: d.meta.get("duplicates", 1) for part in result.parts for d in read_part(part.docs)}
    assert meta == {max(members)[1]: len(members) for members in best.values()}


def test_random_texts_give_the_components_of_brute_force_jaccard(tmp_path: Path):
    """With one permutation a band a pair of Jaccard J is missed with (1 - J)^512: none above 0.05; 0 is never found."""
    draw = random.Random(5)
    documents: list[Document] = []
    words: list[str] = []
    for number in range(60):
        # Chains of four: each shares two thirds of its words with the one before.
        words = words[10:] + draw.choices(ENGLISH, k=10) if number % 4 else draw.choices(ENGLISH, k=30)
        documents.append(Document(id=str(number), text=" ".join(words)))
    draw.shuffle(documents)
    settings = DedupSettings(paragraph_chars=0, minhash=MinHashSettings(bands=512, rows=1, verify=0.0))
    graph = nx.Graph()
    for a, b in itertools.combinations(documents, 2):
        jaccard = exact_jaccard(a.text, b.text)
        assert jaccard == 0 or jaccard > 0.05, "between these the result is a matter of chance"
        if jaccard:
            graph.add_edge(a.id, b.id)
    assert clusters(run(tmp_path, split(documents, 20), settings)) == set(
        map(frozenset, nx.connected_components(graph))
    )


@pytest.mark.usefixtures("small_items")
def test_neither_order_nor_parts_nor_memory_change_what_stays(tmp_path: Path):
    documents = families(2, 30)
    one = run(tmp_path / "a", [documents], PLAIN)
    other = run(tmp_path / "b", split(documents[::-1], 7), TINY)
    assert kept(one) == kept(other)
    assert dropped(one) == dropped(other)
    assert clusters(one) == clusters(other)


@pytest.mark.usefixtures("small_items")
def test_two_workers_write_the_bytes_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dedup, "_ALONE_RECORDS", 0)
    monkeypatch.setattr(dedup, "_ALONE_TEXT", 0)
    documents = families(3, 18)
    settings = DedupSettings(paragraph_chars=20, line_chars=10, substring_tokens=12, memory_mb=8)
    contents = []
    for workers in (1, 2):
        room = tmp_path / str(workers) / "work"
        result = run(room, split(documents, 16), settings, workers)
        files = sorted(path for path in room.rglob("*") if path.is_file() and path.name != "done.json")
        contents.append({str(path.relative_to(room)): path.read_bytes() for path in files})
        assert len(contents[-1]) > 30
        assert result.counts["dropped"]
    assert contents[0] == contents[1]


@pytest.mark.usefixtures("small_items")
def test_gathered_parts_give_what_single_parts_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    documents = families(4, 20)
    for verify in (0.0, 0.5):
        settings = DedupSettings(paragraph_chars=0, memory_mb=1, minhash=MinHashSettings(verify=verify))
        single = run(tmp_path / f"{verify}a", split(documents, 5), settings)
        monkeypatch.setattr(dedup, "_FAN_IN", 4)
        gathered = run(tmp_path / f"{verify}b", split(documents, 5), settings)
        monkeypatch.undo()
        assert (tmp_path / f"{verify}b" / "dedup-gather").is_dir()
        assert kept(single) == kept(gathered)
        assert clusters(single) == clusters(gathered)


def test_a_chain_is_not_reduced_to_one_end(tmp_path: Path):
    """Each text is like the next, and the ends have nothing in common: what goes is like something that stays."""
    words = [f"w{n}" for n in range(400)]
    documents = [Document(id=str(n), text=" ".join(words[8 * n : 8 * n + 200])) for n in range(20)]
    texts = {document.id: document.text for document in documents}
    chain = run(
        tmp_path / "a", split(documents, 3), DedupSettings(paragraph_chars=0, minhash=MinHashSettings(verify=0.0))
    )
    assert len(kept(chain)) == 1
    results = [run(tmp_path / str(turn), split(documents[::turn], 6)) for turn in (1, -1)]
    assert kept(results[0]) == kept(results[1])
    assert 1 < len(kept(results[0])) < 20
    for document_id, (_, survivor) in dropped(results[0]).items():
        assert exact_jaccard(texts[document_id], texts[survivor]) > 0.6
    assert sum(map(len, clusters(results[0]))) <= 20


def test_verification_breaks_up_candidates_that_are_not_alike(tmp_path: Path):
    draw = random.Random(6)
    base = [draw.choice(ENGLISH) for _ in range(300)]
    half = [*base[:200], *draw.choices(ENGLISH, k=100)]  # Jaccard about 1/2
    documents = [Document(id=str(i), text=" ".join(words)) for i, words in enumerate((base, half, [*base[:-1], "x"]))]
    loose = MinHashSettings(bands=64, rows=1, verify=0.0)
    assert len(kept(run(tmp_path / "a", [documents], DedupSettings(paragraph_chars=0, minhash=loose)))) == 1
    strict = MinHashSettings(bands=64, rows=1, verify=0.8)
    result = run(tmp_path / "b", [documents], DedupSettings(paragraph_chars=0, minhash=strict))
    assert clusters(result) == {frozenset(("0", "2"))}


# --------------------------------------------------------------------------------------------------------- survivors
def test_the_survivor_is_chosen_by_the_fields_of_prefer(tmp_path: Path):
    text = "one two three four five six seven eight nine ten " * 5
    documents = [
        Document(id="long", text=text + "\n\n\n\n", meta={"errors": 3}),
        Document(id="good", text=text, meta={"quality": 0.9, "errors": 2}),
        Document(id="fine", text=text, meta={"quality": 0.5, "errors": 1}),
        Document(id="odd", text=text, meta={"quality": "high"}),
    ]
    for prefer, survivor in ((("quality", "chars"), "good"), (("chars",), "long"), (("-errors",), "fine")):
        for turn in range(4):
            settings = DedupSettings(paragraph_chars=0, prefer=prefer)
            order = documents[turn:] + documents[:turn]
            assert list(kept(run(tmp_path / f"{prefer[0]}{turn}", [order[:2], order[2:]], settings))) == [survivor]


def test_ties_are_broken_by_id_and_not_by_order(tmp_path: Path):
    documents = [Document(id=f"d{n}", text="equal texts, all of the same length") for n in range(6)]
    survivors = {
        tuple(kept(run(tmp_path / str(n), split(order, 2))))
        for n, order in enumerate((documents, documents[::-1], documents[3:] + documents[:3]))
    }
    assert len(survivors) == 1


def test_short_texts_that_differ_in_signs_only_are_no_duplicates(tmp_path: Path):
    documents = [Document(id=sign, text=f"2 {sign} 3") for sign in "+-*/"]
    assert len(kept(run(tmp_path, [documents]))) == 4


# ------------------------------------------------------------------------------------------------------- incremental
@pytest.mark.usefixtures("small_items")
def test_runs_against_an_index_end_where_one_run_does(tmp_path: Path):
    documents = families(7, 21)
    parts = split(documents, 8)
    whole = run(tmp_path / "whole", parts, TINY)
    settings = DedupSettings(paragraph_chars=0, memory_mb=1, index=tmp_path / "index", keep_published=False)
    results = [
        run(tmp_path / f"run{n}", parts[first : first + 2], settings) for n, first in enumerate(range(0, len(parts), 2))
    ]
    assert len(results) > 2
    assert clusters(results[-1]) == clusters(whole)
    # What the last run says of every document, old ones included, is what the one run says.
    last = itertools.chain(*(pq.read_table(path).to_pylist() for path in results[-1].clusters))
    once = itertools.chain(*(pq.read_table(path).to_pylist() for path in whole.clusters))
    facts = [sorted((r["id"], r["kept"], r["size"], r["reason"], r["survivor"]) for r in rows) for rows in (last, once)]
    assert facts[0] == facts[1]


def test_what_was_published_stays_published(tmp_path: Path):
    text = "a text that comes back later in another run and in better quality " * 4
    settings = DedupSettings(paragraph_chars=0, index=tmp_path / "index")
    first = run(tmp_path / "1", [[Document(id="old", text=text, meta={"quality": 0.1})]], settings)
    better = Document(id="new", text=text + "!", meta={"quality": 0.9})
    second = run(tmp_path / "2", [[better, Document(id="other", text="something else that is new here")]], settings)
    assert list(kept(first)) == ["old"]
    assert list(kept(second)) == ["other"]
    assert dropped(second) == {"new": ("near_duplicate", "old")}
    again = run(tmp_path / "3", [[Document(id="third", text=text, meta={"quality": 1.0})]], settings)
    assert not kept(again)
    assert again.counts["cluster_displaced"] == 0


def test_an_index_takes_a_run_once_and_refuses_other_settings(tmp_path: Path):
    documents = [Document(id=str(n), text=f"text number {n} with some words in it") for n in range(3)]
    settings = DedupSettings(paragraph_chars=0, index=tmp_path / "index")
    prepared = prepare(tmp_path / "1", [documents], settings)
    for _ in range(2):
        assert len(kept(run_dedup(Room(path=tmp_path / "1"), prepared, settings))) == 3
    assert len(json.loads((tmp_path / "index" / "manifest.json").read_bytes())["generations"]) == 1
    other = DedupSettings(paragraph_chars=0, index=tmp_path / "index", minhash=MinHashSettings(bands=20, rows=5))
    with pytest.raises(ValueError, match="other minhash"):
        run(tmp_path / "2", [documents], other)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(ValueError, match="no index"):
        run(tmp_path / "4", [documents], DedupSettings(index=tmp_path / "full"))


# ------------------------------------------------------------------------------------------------------ adversarial
def test_ten_thousand_times_the_same_document(tmp_path: Path):
    same = [Document(id=str(n), text="The same document again and again, word for word.") for n in range(10_000)]
    result = run(tmp_path, split(same, 4000))
    assert len(kept(result)) == 1
    assert result.counts["largest_cluster"] == 10_000
    assert result.counts["sizes"] == {"8192": 1}
    assert result.counts["exact_duplicate"] == 9_999


def test_odd_documents(tmp_path: Path):
    big = " ".join(map(str, range(1_000_000, 2_300_000)))
    assert len(big) > 10_000_000
    texts = {"empty": "", "word": "word", "WORD": "WORD", "signs": "?!", "blank": " \n ", "big": big, "big2": big[:-40]}
    documents = [Document(id=name, text=text, source=name) for name, text in texts.items()]
    result = run(tmp_path, [documents[:3], [], documents[3:]])
    assert set(map(frozenset, clusters(result))) == {
        frozenset(("empty", "blank")), frozenset(("word", "WORD")), frozenset(("big", "big2")),
    }  # fmt: skip
    assert {"signs", "big"} < set(kept(result))
    nothing = run(tmp_path / "nothing", [[]])
    assert kept(nothing) == {}


def test_nothing_to_do_leaves_the_parts_as_they_are(tmp_path: Path):
    off = DedupSettings(exact=False, near=False, paragraph_chars=0)
    result = run(tmp_path, [[Document(id="a", text="x")], [Document(id="b", text="x")]], off)
    assert [part.docs for part in result.parts] == [tmp_path / "prepare" / f"0000{n}" / DOCS for n in (0, 1)]
    exact = run(
        tmp_path / "exact", [[Document(id="a", text="x"), Document(id="b", text="X ")]], DedupSettings(near=False)
    )
    assert len(kept(exact)) == 1


def test_sampled_pairs_hold_both_texts_and_their_similarity(tmp_path: Path):
    documents = families(8, 12)
    result = run(tmp_path, split(documents, 5))
    assert result.pairs is not None
    rows = pq.read_table(result.pairs).to_pylist()
    texts = {document.id: document.text for document in documents}
    assert len(rows) == result.counts["near_duplicate"]
    for row in rows:
        assert (row["left_text"], row["right_text"]) == (texts[row["left_id"]], texts[row["right_id"]])
        assert row["jaccard"] == pytest.approx(exact_jaccard(row["left_text"], row["right_text"]))
    few = run(tmp_path / "few", split(documents, 5), DedupSettings(paragraph_chars=0, sample_pairs=2))
    assert few.pairs is not None
    assert pq.read_metadata(few.pairs).num_rows == 2


def test_memory_stays_where_it_is_when_the_input_grows_fourfold(tmp_path: Path):
    """Peak of everything allocated from hashing to rewriting, with parts of the same size, three and twelve of them."""
    settings = DedupSettings(memory_mb=1, sample_pairs=5)
    peaks = []
    for count in (3, 12):
        room = tmp_path / str(count)
        draw = np.random.default_rng(count)
        prepared = []
        for number in range(count):
            # A third of the texts is that of the first part with a word changed.
            words = [draw.integers(0, 5000, 2000) if row % 3 else np.arange(2000) + 3000 * row for row in range(45)]
            texts = [" ".join(map(str, [*row.tolist(), number])) for row in words]
            part = [Document(id=f"{number}.{row}", text=text) for row, text in enumerate(texts)]
            prepared += prepare(room, [part], settings) if number == 0 else moved(room, number, part, settings)
        tracemalloc.start()
        result = run_dedup(Room(path=room, workers=1), prepared, settings)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert result.counts["near_duplicate"] == 15 * (count - 1)
    assert peaks[1] < 1.5 * peaks[0]


def moved(room: Path, number: int, part: Sequence[Document], settings: DedupSettings) -> list[Finished]:
    """One more prepared part."""
    (finished,) = prepare(room / "more" / str(number), [part], settings)
    return [Finished(directory=finished.directory, counts=finished.counts, digest=f"{room.name} {number}")]
