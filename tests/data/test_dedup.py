import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from qwench.data.dedup import Duplicate, deduplicate, normalise
from qwench.types import Document

LONG = "A paragraph that is long enough to be compared with all the others that came before it. " * 3


def documents(*texts):
    return [Document(id=str(i), text=text) for i, text in enumerate(texts)]


def test_the_first_of_equal_texts_stays_and_the_others_name_it():
    duplicates = []
    kept = list(deduplicate(documents("Hello  World", "other", "hello\nworld", "ＨELLO world"), duplicates))
    assert [d.id for d in kept] == ["0", "1"]
    assert duplicates == [
        Duplicate(id="2", duplicate_of="0", num_chars=11),
        Duplicate(id="3", duplicate_of="0", num_chars=11),
    ]


def test_texts_that_differ_in_a_sign_are_different():
    assert len(list(deduplicate(documents("2 + 3", "2 - 3", "23", "2 3")))) == 4


@given(st.lists(st.text("ab \n", max_size=4), max_size=30))
def test_kept_and_duplicates_together_are_the_input(texts):
    duplicates = []
    kept = list(deduplicate(documents(*texts), duplicates))
    assert {d.id for d in kept} | {d.id for d in duplicates} == {str(i) for i in range(len(texts))}
    assert len(kept) + len(duplicates) == len(texts)
    assert len({normalise(d.text) for d in kept}) == len(kept) == len({normalise(t) for t in texts})


def test_memory_holds_hashes_and_not_texts():
    tracemalloc.start()
    texts = (Document(id=str(i), text=f"{i} " + "x" * 20_000) for i in range(3000))
    assert sum(1 for _ in deduplicate(texts)) == 3000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000  # of 60 MB
