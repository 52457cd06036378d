import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwench.data.packing import PretrainDataset, SampleDataset, pack_lengths
from qwench.data.permutation import permute
from qwench.types import Sample

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def documents_of(lengths):
    """Documents whose tokens are unique over the corpus (1, 2, 3 ...), each closed by 0."""
    documents, start = [], 1
    for length in lengths:
        documents.append(np.append(np.arange(start, start + length - 1), 0))
        start += length - 1
    return documents


def stream_of(documents, seed, epoch):
    """The definition: documents in shuffled order, end to end."""
    order = permute(np.arange(len(documents)), len(documents), seed, epoch)
    return [documents[i] for i in order]


lengths_lists = st.lists(st.integers(1, 40), min_size=1, max_size=200)


@quick
@given(lengths=lengths_lists, seq_len=st.integers(1, 50), seed=st.integers(0, 99), epoch=st.integers(0, 3))
def test_rows_are_the_shuffled_stream(make_shards, lengths, seq_len, seed, epoch):
    documents = documents_of(lengths)
    name = f"{abs(hash((tuple(lengths), seq_len, seed, epoch)))}"
    shards = make_shards(documents, name, vocab_size=20_000)
    stream = np.concatenate(stream_of(documents, seed, epoch))
    if len(stream) <= seq_len:
        with pytest.raises(ValueError, match="too few for one row"):
            PretrainDataset(shards, seq_len, seed)
        return
    apart = PretrainDataset(shards, seq_len, seed)
    across = PretrainDataset(shards, seq_len, seed, attend_across=True)
    assert apart.num_rows == (len(stream) - 1) // seq_len
    for index in range(apart.num_rows):
        row = apart.row(epoch, index)
        start = index * seq_len
        np.testing.assert_array_equal(row.tokens, stream[start : start + seq_len])
        np.testing.assert_array_equal(row.targets, stream[start + 1 : start + seq_len + 1])
        # documents end in 0 and nowhere else
        np.testing.assert_array_equal(row.loss_weights, (row.tokens != 0).astype(np.float32))
        ends = np.flatnonzero(row.tokens == 0) + 1
        bounds = np.unique(np.concatenate(([0], ends, [seq_len])))
        np.testing.assert_array_equal(row.seq_lens, np.diff(bounds))
        joined = across.row(epoch, index)
        np.testing.assert_array_equal(joined.tokens, row.tokens)
        np.testing.assert_array_equal(joined.targets, row.targets)
        assert joined.loss_weights.tolist() == [1.0] * seq_len
        assert joined.seq_lens.tolist() == [seq_len]


def test_every_token_is_read_once_an_epoch_but_for_the_tail(make_shards):
    rng = np.random.default_rng(0)
    documents = documents_of(rng.integers(2, 60, 500))
    shards = make_shards(documents, vocab_size=20_000, shard_tokens=3000)
    dataset = PretrainDataset(shards, 64, seed=7)
    everything = np.concatenate(documents)
    orders = []
    for epoch in range(3):
        tokens = np.concatenate([dataset.row(epoch, i).tokens for i in range(dataset.num_rows)])
        left_out = len(everything) - len(tokens)
        assert 1 <= left_out <= 64
        unique = tokens[tokens != 0]
        assert len(np.unique(unique)) == len(unique)
        orders.append(tokens)
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[1], orders[2])
    assert not np.array_equal(orders[0], PretrainDataset(shards, 64, seed=8).row(0, 0).tokens)


def test_rows_do_not_depend_on_how_the_tokens_are_sharded(make_shards):
    documents = documents_of(np.random.default_rng(1).integers(2, 30, 300))
    one = PretrainDataset(make_shards(documents, "one", shard_tokens=10**6, vocab_size=9999), 32)
    many = PretrainDataset(make_shards(documents, "many", shard_tokens=150, vocab_size=9999), 32)
    for index in (0, 5, one.num_rows - 1):
        np.testing.assert_array_equal(one.row(2, index).tokens, many.row(2, index).tokens)


def test_memory_stays_with_the_index(make_shards):
    shards = make_shards([np.array([1, 2, 0])] * 40_000, shard_tokens=30_000)
    dataset = PretrainDataset(shards, 100)
    dataset.row(0, 700)
    _, starts = dataset._block_starts
    assert starts.nbytes == 8 * 40_000 // 64


# --------------------------------------------------------------------------------------------------------- samples
def sample_of(length, start=1, learnt_from=1):
    weights = np.zeros(length, np.float32)
    weights[learnt_from:] = 1
    return Sample(token_ids=np.arange(start, start + length, dtype=np.int32), loss_weights=weights)


@quick
@given(lengths=st.lists(st.integers(2, 30), min_size=1, max_size=80), seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_every_sample_lies_whole_in_one_row(lengths, seed, epoch):
    starts = np.cumsum([1, *lengths])
    samples = [sample_of(n, int(s), learnt_from=n // 2 or 1) for n, s in zip(lengths, starts, strict=False)]
    dataset = SampleDataset(samples, 30, seed)
    seen = []
    for index in range(dataset.num_rows):
        row = dataset.row(epoch, index)
        assert 0 < row.num_tokens <= 30
        assert row.seq_lens.sum() == row.num_tokens == len(row.targets) == len(row.loss_weights)
        end = 0
        for length in row.seq_lens:
            part = slice(end, end + length)
            end += length
            number = int(np.searchsorted(starts, row.tokens[part][0]))
            sample = samples[number]
            np.testing.assert_array_equal(row.tokens[part], sample.token_ids)
            np.testing.assert_array_equal(row.targets[part][:-1], sample.token_ids[1:])
            np.testing.assert_array_equal(row.loss_weights[part][:-1], sample.loss_weights[1:])
            assert row.loss_weights[part][-1] == 0
            seen.append(number)
    assert sorted(seen) == list(range(len(samples)))


def test_samples_change_company_between_epochs():
    samples = [sample_of(10, i * 10 + 1) for i in range(30)]
    dataset = SampleDataset(samples, 30)
    companies = [
        {frozenset(dataset.row(epoch, i).tokens[::10].tolist()) for i in range(dataset.num_rows)} for epoch in (0, 1)
    ]
    assert companies[0] != companies[1]
    again = SampleDataset(samples, 30)
    assert companies[1] == {frozenset(again.row(1, i).tokens[::10].tolist()) for i in range(again.num_rows)}


def test_long_samples_are_cut_or_left_out_and_counted():
    samples = [sample_of(10), sample_of(50), sample_of(60, learnt_from=55)]
    cut = SampleDataset(samples, 40)
    assert (cut.num_over_long, cut.num_without_loss, len(cut.samples)) == (2, 1, 2)
    assert cut.num_tokens == 50
    left = SampleDataset(samples, 40, over_long="drop")
    assert (left.num_over_long, left.num_without_loss, len(left.samples)) == (2, 0, 1)


def test_unusable_samples_are_errors():
    with pytest.raises(ValueError, match="no sample left of 1"):
        SampleDataset([sample_of(5, learnt_from=5)], 10)
    with pytest.raises(ValueError, match="sample 0 has 2 tokens and 3 loss weights"):
        SampleDataset([Sample(token_ids=np.zeros(2), loss_weights=np.zeros(3))], 10)
    with pytest.raises(ValueError, match="over_long"):
        SampleDataset([sample_of(5)], 10, over_long="keep")  # pyright: ignore[reportArgumentType]


@given(lengths=st.lists(st.integers(1, 100), max_size=300))
def test_packing_fits_and_is_near_the_bound(lengths):
    rows = pack_lengths(lengths, 100)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 100 for row in rows)
    # best fit decreasing: 11/9 of the optimum plus one; the optimum is bounded below by volume and by halves
    bound = max(-(-sum(lengths) // 100), sum(n > 50 for n in lengths))
    assert len(rows) <= 11 / 9 * 1.5 * bound + 1


def test_packing_takes_the_tightest_fit():
    assert pack_lengths([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]


def test_packing_real_lengths_wastes_little():
    lengths = np.random.default_rng(0).lognormal(4.5, 0.8, 5000).astype(int).clip(2, 1024).tolist()
    rows = pack_lengths(lengths, 1024)
    assert sum(lengths) / (1024 * len(rows)) > 0.99
