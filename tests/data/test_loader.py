import threading

import numpy as np
import pytest

from qwench.data.loader import RowLoader
from qwench.data.packing import PackedRow, PretrainDataset


class CountedRows:
    """Rows that say where they come from; nothing to pack."""

    def __init__(self, num_rows, name="rows"):
        self.num_rows = num_rows
        self.fingerprint = name
        self.source_names = ()

    def row(self, epoch, index):
        place = np.array([epoch, index], np.int32)
        return PackedRow(tokens=place, targets=place, loss_weights=np.ones(2, np.float32), seq_lens=np.array([2]))


def places(batch):
    return [tuple(row.tokens.tolist()) for row in batch]


def take(loader, num):
    return [places(next(loader)) for _ in range(num)]


def test_every_row_comes_once_an_epoch_in_a_new_order():
    loader = RowLoader(CountedRows(20), 4)
    rows = [place for batch in take(loader, 10) for place in batch]
    assert sorted(rows) == [(e, i) for e in (0, 1) for i in range(20)]
    assert [i for _, i in rows[:20]] != [i for _, i in rows[20:]]
    assert sorted(rows[:20]) == [(0, i) for i in range(20)]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_global_order_is_the_same_for_any_number_of_ranks(world):
    expected = take(RowLoader(CountedRows(10), 8, seed=3), 5)
    ranks = [RowLoader(CountedRows(10), 8, seed=3, rank=r, world=world) for r in range(world)]
    for step in expected:
        parts = [places(next(rank)) for rank in ranks]
        assert [parts[i % world][i // world] for i in range(8)] == step


@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_resuming_is_exact_and_describes_what_was_consumed(prefetch):
    reference = take(RowLoader(CountedRows(7), 3, prefetch=0), 12)
    loader = RowLoader(CountedRows(7), 3, prefetch=prefetch)
    take(loader, 5)
    state = loader.state_dict()
    assert (state["epoch"], state["position"]) == divmod(15, 7)
    resumed = RowLoader(CountedRows(7), 3, prefetch=prefetch)
    take(resumed, 2)  # whatever it did before is forgotten
    resumed.load_state_dict(state)
    assert take(resumed, 7) == reference[5:]
    assert take(loader, 7) == reference[5:]


def test_a_run_may_go_on_with_other_ranks_and_another_batch_size():
    flat = [place for batch in take(RowLoader(CountedRows(11), 1), 40) for place in batch]
    loader = RowLoader(CountedRows(11), 4)
    take(loader, 3)
    rank = RowLoader(CountedRows(11), 6, rank=1, world=2)
    rank.load_state_dict(loader.state_dict())
    assert places(next(rank)) == flat[12:18][1::2]


def test_a_state_of_other_data_is_refused():
    state = RowLoader(CountedRows(7), 1).state_dict()
    for other in (RowLoader(CountedRows(7, "other"), 1), RowLoader(CountedRows(7), 1, seed=1)):
        with pytest.raises(ValueError, match="resume with the same data"):
            other.load_state_dict(state)


def test_a_finite_pass_gives_every_row_once_on_all_ranks_together():
    parts = [list(RowLoader(CountedRows(10), 4, rank=r, world=2, epochs=1, shuffle=False)) for r in range(2)]
    assert [places(b) for b in parts[0]] == [[(0, 0), (0, 2)], [(0, 4), (0, 6)], [(0, 8)]]
    assert [places(b) for b in parts[1]] == [[(0, 1), (0, 3)], [(0, 5), (0, 7)], [(0, 9)]]
    assert list(RowLoader(CountedRows(10), 4, epochs=0)) == []


def test_an_error_while_reading_reaches_the_caller():
    class Broken(CountedRows):
        def row(self, epoch, index):
            raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        next(RowLoader(Broken(5), 2))


def test_close_ends_the_thread_and_the_loader_goes_on():
    expected = take(RowLoader(CountedRows(9), 2, prefetch=0), 4)
    before = threading.active_count()
    loader = RowLoader(CountedRows(9), 2)
    assert take(loader, 2) == expected[:2]
    assert threading.active_count() == before + 1
    loader.close()
    assert threading.active_count() == before
    assert take(loader, 2) == expected[2:]
    loader.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_rows": 3, "world": 2}, "multiple"),
        ({"batch_rows": 0}, "multiple"),
        ({"batch_rows": 2, "rank": 2}, "rank 2 of 1"),
    ],
)
def test_impossible_divisions_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RowLoader(CountedRows(5), **arguments)


def test_pretraining_rows_resume_exactly(make_shards):
    documents = [np.append(np.random.default_rng(i).integers(1, 900, 5 + i % 40), 0) for i in range(200)]
    shards = make_shards(documents, shard_tokens=700)
    loader = RowLoader(PretrainDataset(shards, 32, seed=1), 4, seed=1)
    for _ in range(60):
        next(loader)
    state = loader.state_dict()
    expected = [row.tokens.tolist() for _ in range(5) for row in next(loader)]
    fresh = RowLoader(PretrainDataset(shards, 32, seed=1), 4, seed=1)
    fresh.load_state_dict(state)
    assert [row.tokens.tolist() for _ in range(5) for row in next(fresh)] == expected
    assert state["epoch"] >= 1
    with pytest.raises(ValueError, match="source"):
        RowLoader(PretrainDataset(shards, 16, seed=1), 4, seed=1).load_state_dict(state)


def test_looking_ahead_moves_nothing():
    loader = RowLoader(CountedRows(7), 3, epochs=1)
    for position in (0, 3, 6):
        ahead = loader.peek()
        assert loader.peek() is ahead
        assert loader.state_dict()["position"] == position
        assert next(loader) is ahead
    with pytest.raises(AssertionError, match="at its end"):
        loader.peek()
    loader.load_state_dict(loader.state_dict() | {"epoch": 0, "position": 3})
    assert places(loader.peek()) == places(next(loader))
