import itertools
from collections import Counter

import pytest

from qwench.data.prepare import Preparer
from qwench.demo.corpus import read_corpus
from qwench.demo.prepare import RULES
from qwench.types import Document

BUDGET = 1_500_000


@pytest.fixture(scope="module")
def corpus():
    found = []
    return list(read_corpus(BUDGET, found=found)), found


def test_every_python_has_code_docs_reference_and_other_scripts(corpus):
    documents, found = corpus
    kinds = Counter()
    for document in documents:
        kinds[document.kind] += len(document.text.encode())
    assert kinds["code"] > 200_000
    assert kinds["docs"] > 200_000
    assert kinds["reference"] > 100_000
    assert all(document.source for document in documents)
    assert len({document.id for document in documents}) == len(documents)
    assert {entry.source for entry in found} >= {document.source for document in documents}


def test_the_budget_is_kept_and_the_report_adds_up(corpus):
    documents, found = corpus
    sizes = [len(document.text.encode()) for document in documents]
    assert sum(sizes) >= BUDGET > sum(sizes[:-1])
    assert sum(entry.num_bytes for entry in found) == sum(sizes)
    assert sum(entry.num_documents for entry in found) == len(documents)
    reference = next(entry for entry in found if entry.source == "standard library")
    assert not reference.exhausted


def test_the_order_is_the_same_every_time_and_a_larger_budget_begins_alike(corpus):
    documents, _ = corpus
    again = itertools.islice(read_corpus(3 * BUDGET), len(documents))
    assert [d.id for d in again] == [d.id for d in documents]


def test_tests_of_the_library_are_left_out_unless_asked_for(corpus):
    code = [d.id for d in read_corpus(40_000_000) if d.kind == "code"]
    assert len(code) > 300
    assert not [name for name in code if "/test/" in name or "/tests/" in name or "site-packages" in name]
    assert len(set(code)) == len(code)


def test_almost_everything_survives_cleaning(corpus):
    documents, _ = corpus
    preparer = Preparer(RULES)
    kept = [document for document in map(preparer.prepare, documents) if isinstance(document, Document)]
    assert len(kept) > 0.95 * len(documents)


def test_texts_in_chinese_japanese_and_korean_where_python_brings_its_tests(corpus):
    texts = {d.lang: d.text for d in corpus[0] if d.source == "texts in East Asian scripts"}
    if not texts:
        pytest.skip("this Python was installed without its test package")
    assert {"zh", "ja", "ko"} <= set(texts)
    assert "语言" in "".join(d.text for d in corpus[0] if d.lang == "zh")


def test_the_users_data_replaces_it(tmp_path):
    (tmp_path / "mine.txt").write_text("my own text\n\n" * 20_000)
    found = []
    documents = list(read_corpus(100_000, data=tmp_path, found=found))
    assert {d.source for d in documents} == {tmp_path.name}
    assert len(documents) > 2  # a single long file is enough for a validation part
    assert 100_000 <= found[0].num_bytes < 140_000
    assert not found[0].exhausted
    with pytest.raises(ValueError, match="does not exist"):
        list(read_corpus(1000, data=tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="budget is 0"):
        read_corpus(0)
