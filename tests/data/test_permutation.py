import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwench.data.permutation import permute


@given(num=st.integers(1, 3000), seed=st.integers(0, 2**40), epoch=st.integers(0, 100))
def test_it_is_a_permutation_and_entries_do_not_depend_on_their_company(num, seed, epoch):
    whole = permute(np.arange(num), num, seed, epoch)
    np.testing.assert_array_equal(np.sort(whole), np.arange(num))
    some = np.arange(num)[:: max(1, num // 7)]
    np.testing.assert_array_equal(permute(some, num, seed, epoch), whole[some])


def test_large_domains_need_no_memory():
    num = 10**15
    values = permute(np.arange(1000), num, 1)
    assert values.min() >= 0
    assert values.max() < num
    assert len(set(values.tolist())) == 1000


@pytest.mark.parametrize("num", [2, 5, 100])
def test_every_value_comes_equally_often_to_every_place(num):
    draws = np.stack([permute(np.arange(num), num, seed) for seed in range(2000)])
    for place in (0, num // 2, num - 1):
        counts = np.bincount(draws[:, place], minlength=num)
        expected = 2000 / num
        chi_square = ((counts - expected) ** 2 / expected).sum()
        # mean num - 1, standard deviation sqrt(2 (num - 1))
        assert chi_square < num - 1 + 5 * np.sqrt(2 * (num - 1))


def test_neighbours_are_torn_apart():
    values = permute(np.arange(10_000), 10_000, 3)
    assert np.mean(np.abs(np.diff(values))) == pytest.approx(10_000 / 3, rel=0.05)


def test_the_order_is_pinned():
    # A change here silently reorders the data of every run that resumes.
    assert permute(np.arange(8), 8, 0, 0).tolist() == PINNED


PINNED = [5, 7, 4, 6, 2, 3, 1, 0]
