"""Rows cut over context-parallel ranks: every rank's pieces together attend as the whole stream does, at equal cost."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qwench.ops.attention import AttnMeta, attention
from qwench.ops.dispatch import forced
from qwench.parallel.context import Part, check_rows, cut

STREAMS = {
    "one document a row": [[32], [32]],
    "one document": [[48]],
    "across chunks": [[5, 19, 1, 23], [16]],
    "at the borders of chunks": [[4, 4, 8, 16], [8, 8]],
    "more documents than chunks": [[2, 3, 1, 4, 2, 5, 1, 6], [3, 5, 2, 2, 2, 1, 1, 8]],
    "nothing but single tokens": [[1] * 16],
}


def parts(rows: list[list[int]], world: int) -> list[Part]:
    seq_lens = [length for row in rows for length in row]
    return [cut(seq_lens, rank, world, [sum(row) for row in rows]) for rank in range(world)]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("name", STREAMS)
def test_pieces(name: str, world: int) -> None:
    """Every token is one rank's, and a piece's queries are the last of the keys of its own sequence."""
    rows = STREAMS[name]
    seq_lens = [length for row in rows for length in row]
    sequence = np.repeat(np.arange(len(seq_lens)), seq_lens)
    position = np.concatenate([np.arange(length) for length in seq_lens])
    all_parts = parts(rows, world)
    order = np.concatenate([part.index for part in all_parts])
    assert np.array_equal(np.sort(order), np.arange(sum(seq_lens)))
    for part in all_parts:
        assert len(part.index) == sum(seq_lens) // world == sum(part.query_lens)
        assert min(part.query_lens) > 0
        for keys in (part.first_keys, part.second_keys):
            assert len(np.unique(keys)) == len(keys)
        keys = order[np.concatenate((part.first_keys, part.second_keys))]
        assert len(keys) == sum(part.key_lens)
        for queries, seen in zip(
            np.split(part.index, np.cumsum(part.query_lens)[:-1]), np.split(keys, np.cumsum(part.key_lens)[:-1]),
            strict=True,
        ):  # fmt: skip
            assert len(set(sequence[seen])) == 1
            assert position[seen].tolist() == list(range(len(seen)))
            assert np.array_equal(queries, seen[len(seen) - len(queries) :])


@pytest.mark.parametrize("world", [2, 4])
def test_equal_cost(world: int) -> None:
    """With one document a row each rank has the same number of pairs of a query and a key that it sees."""
    costs = []
    for part in parts([[64], [32]], world):
        pairs = zip(part.query_lens, part.key_lens, strict=True)
        costs.append(sum(q * (k - q) + q * (q + 1) // 2 for q, k in pairs))
    assert len(set(costs)) == 1
    assert sum(costs) == 64 * 65 // 2 + 32 * 33 // 2


@pytest.mark.parametrize("implementation", ["reference", "sdpa", "short"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("name", STREAMS)
def test_attention_of_pieces(name: str, window: int | None, implementation: str) -> None:
    """Queries that are the last of their keys, keys from elsewhere: values and gradients of the whole stream's."""
    rows, world = STREAMS[name], 2
    seq_lens = [length for row in rows for length in row]
    torch.manual_seed(0)
    q, k, v, d_out = (torch.randn(sum(seq_lens), heads, 8) for heads in (4, 2, 2, 4))

    def leaves() -> list[torch.Tensor]:
        return [x.clone().requires_grad_() for x in (q, k, v)]

    (whole_q, whole_k, whole_v), (some_q, some_k, some_v) = whole, pieces = leaves(), leaves()
    with forced({"attention": "reference"}):
        want = attention(whole_q, whole_k, whole_v, AttnMeta.packed(seq_lens), None, window)
    want.backward(d_out)
    out = torch.full_like(d_out, float("nan"))
    all_parts = parts(rows, world)
    order = torch.from_numpy(np.concatenate([part.index for part in all_parts]))
    for part in all_parts:
        index = torch.from_numpy(part.index)
        keys = order[torch.from_numpy(np.concatenate((part.first_keys, part.second_keys)))]
        meta = AttnMeta.packed(part.query_lens, key_lens=part.key_lens)
        with forced({"attention": implementation}):
            got = attention(some_q[index], some_k[keys], some_v[keys], meta, None, window)
        got.backward(d_out[index])
        out[index] = got.detach()
    torch.testing.assert_close(out, want.detach(), rtol=1e-5, atol=1e-5)
    for got, expected in zip(pieces, whole, strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-5, atol=1e-5)


def test_the_keys_given_can_be_made_of_others() -> None:
    """`gather` stands between the rotation and the attention."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, 2, 8) for n in (3, 5, 5))
    want = attention(q, k, v, AttnMeta.packed([3], key_lens=[5]))

    def gather(new_k: torch.Tensor, new_v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat((k[:2], new_k)), torch.cat((v[:2], new_v))

    meta = AttnMeta.packed([3], key_lens=[5], gather=gather)
    assert torch.equal(attention(q, k[2:], v[2:], meta), want)


def test_without_rows_the_stream_is_cut_as_one() -> None:
    assert np.array_equal(cut([3, 5], 1, 2).index, cut([3, 5], 1, 2, [8]).index)
    assert cut([3, 5], 0, 2).index.tolist() == [0, 1, 6, 7]
    assert cut([4, 8, 4], 1, 2, [4, 12]).index.tolist() == [1, *range(7, 10), 2, *range(10, 13)]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("rows", [[30], [32, 6]])
def test_rows_that_do_not_divide(rows: list[int], world: int) -> None:
    with pytest.raises(ValueError, match=rf"a row of (30|6) tokens does not divide into {2 * world} runs .* such as"):
        cut(rows, 0, world, rows)


def test_tokens_that_do_not_divide_over_a_tensor_group() -> None:
    check_rows([24], 2, 4)
    with pytest.raises(
        ValueError, match=r"24 tokens, 12 on each of 2 .* over 8 tensor-parallel ranks; .* of 16 tokens"
    ):
        check_rows([24], 2, 8)
