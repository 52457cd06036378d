"""The same logits however tokens arrive: packed, one by one, padded, prefilled in chunks through pages, or decoded."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from qwench.data.packing import PretrainDataset
from qwench.data.shards import TokenShards
from qwench.engine.naive import SequenceCache
from qwench.ops.attention import ATTENTION, AttnMeta, KVCache
from qwench.ops.dispatch import forced
from qwench.train.batch import make_batch
from qwench.train.loss import next_token_loss

VARIANTS = {
    "gqa tied": {},
    "mha untied": dict(num_key_value_heads=4, tie_word_embeddings=False),
    "one key head": dict(num_key_value_heads=1),
    "head_dim 16": dict(head_dim=16),
    "window on the upper layer": dict(use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "window everywhere": dict(use_sliding_window=True, sliding_window=3, max_window_layers=0),
    "no biases, theta 1e4": dict(qkv_bias=False, rope_theta=1e4),
}
LENGTHS = (7, 1, 23, 12)
TOLERANCE = dict(rtol=0, atol=2e-5)


@pytest.fixture(params=VARIANTS)
def model(request, make_model, tiny_config):
    return make_model(dataclasses.replace(tiny_config, **VARIANTS[request.param]))


@pytest.fixture
def prompts(tiny_config) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(tiny_config.vocab_size, (length,), generator=generator) for length in LENGTHS]


@pytest.fixture
def separate(model, prompts) -> list[Tensor]:
    """The reference: every prompt alone, [T, V]."""
    logits = [model.logits(prompt[None])[0] for prompt in prompts]
    assert max(float(one.abs().max()) for one in logits) > 1
    return logits


@torch.no_grad()
def test_packed(model, prompts, separate) -> None:
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    hidden = model(torch.cat(prompts), positions, AttnMeta.packed(LENGTHS))
    torch.testing.assert_close(model.head(hidden), torch.cat(separate), **TOLERANCE)


def test_padded(model, prompts, separate) -> None:
    """What stands after a sequence changes nothing before it."""
    padded = torch.full((len(prompts), max(LENGTHS)), 9)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    for logits, want in zip(model.logits(padded), separate, strict=True):
        torch.testing.assert_close(logits[: len(want)], want, **TOLERANCE)


def pages(model, num_blocks: int, block: int) -> list[KVCache]:
    """Empty pages, filled with NaN so that a read of what was never written shows."""
    shape = (num_blocks, block, model.config.num_key_value_heads, model.config.d_head)
    return [(torch.full(shape, float("nan")), torch.full(shape, float("nan"))) for _ in model.model.layers]


def slots_of(blocks: Tensor, block: int, start: int, stop: int) -> Tensor:
    places = torch.arange(start, stop)
    return blocks.long()[places // block] * block + places % block


@torch.no_grad()
@pytest.mark.parametrize(("block", "chunk"), [(4, 5), (16, 3), (3, 1), (32, 32)])
@pytest.mark.parametrize("implementation", [impl.name for impl in ATTENTION.available(torch.device("cpu"))])
def test_paged_in_chunks(block: int, chunk: int, implementation: str, model, prompts, separate) -> None:
    """Mixed batches: at any time some sequences prefill, others decode, others have ended; pages lie in any order."""
    per_sequence = -(-max(LENGTHS) // block)
    order = torch.randperm(len(prompts) * per_sequence, generator=torch.Generator().manual_seed(1))
    table = order.view(len(prompts), per_sequence).int()
    caches = pages(model, table.numel(), block)
    done = [0] * len(prompts)
    got: list[list[Tensor]] = [[] for _ in prompts]
    chunks = [chunk, 1, chunk + 2, 2 * chunk]
    while unfinished := [i for i, n in enumerate(LENGTHS) if done[i] < n]:
        spans = {i: (done[i], min(LENGTHS[i], done[i] + chunks[i])) for i in unfinished}
        positions = torch.cat([torch.arange(*span) for span in spans.values()])
        sizes = [stop - start for start, stop in spans.values()]
        meta = AttnMeta(
            cu_q=torch.tensor([0, *np.cumsum(sizes).tolist()], dtype=torch.int32),
            max_q=max(sizes),
            lens_k=torch.tensor([stop for _, stop in spans.values()], dtype=torch.int32),
            max_k=max(stop for _, stop in spans.values()),
            block_table=table[unfinished],
            slots=torch.cat([slots_of(table[i], block, *span) for i, span in spans.items()]),
        )
        tokens = torch.cat([prompts[i][start:stop] for i, (start, stop) in spans.items()])
        with forced({"attention": implementation}):
            logits = model.head(model(tokens, positions, meta, caches))
        for i, part in zip(unfinished, logits.split(sizes), strict=True):
            got[i].append(part)
            done[i] = spans[i][1]
    for parts, want in zip(got, separate, strict=True):
        torch.testing.assert_close(torch.cat(parts), want, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("capacity", [1, 4, 64])
def test_step_by_step(capacity: int, model, prompts, separate) -> None:
    """One token at a time through the naive generator's cache, which grows where it is too small."""
    for prompt, want in zip(prompts, separate, strict=True):
        cache = SequenceCache(model, capacity)
        first = len(prompt) // 3 or 1
        steps = [prompt[:first].tolist(), *([token] for token in prompt[first:].tolist())]
        hidden = torch.cat([cache.append(model, step) for step in steps])
        torch.testing.assert_close(model.head(hidden), want, **TOLERANCE)
        assert cache.length == len(prompt) <= cache.capacity


def test_bf16_activations_over_fp32_weights(make_model, tiny_config) -> None:
    """The cache takes the dtype of the activations, and decoding agrees with a full pass within bf16."""
    model = make_model(tiny_config)
    model.set_compute_dtype(torch.bfloat16)
    prompt = list(range(30, 50))
    with torch.no_grad():
        cache = SequenceCache(model, 4)
        assert cache.layers[0][0].dtype == torch.bfloat16
        stepwise = model.head(torch.cat([cache.append(model, [token]) for token in prompt]))
        full = model.logits(torch.tensor([prompt]))[0]
    assert float((stepwise - full).norm() / full.norm()) < 2e-2


@torch.no_grad()
@pytest.mark.parametrize("across", [False, True])
def test_attend_across(across: bool, make_model, tiny_config, tiny_shards, tiny_tokenizer) -> None:
    """Documents of a row see each other only if asked to; in both cases the loss is that of the definition."""
    model = make_model(tiny_config)
    shards = TokenShards.open(tiny_shards / "train")
    dataset = PretrainDataset(shards, 96, seed=3, attend_across=across)
    rows = [dataset.row(0, index) for index in range(3)]
    batch = make_batch(rows, torch.device("cpu"))
    logits = model.head(model(batch.tokens_T, batch.positions_T, batch.meta))
    at, total = 0, 0.0
    num_sequences = 0
    for row in rows:
        # The definition: cut after every <|endoftext|> unless documents attend across, each part alone.
        tokens = torch.from_numpy(row.tokens.astype(np.int64))
        ends = [] if across else [i + 1 for i, t in enumerate(row.tokens) if t == tiny_tokenizer.eod_id]
        bounds = sorted({0, *ends, len(tokens)})
        num_sequences += len(bounds) - 1
        alone = torch.cat([model.logits(tokens[None, a:b])[0] for a, b in itertools.pairwise(bounds)])
        torch.testing.assert_close(logits[at : at + len(tokens)], alone, **TOLERANCE)
        targets = torch.from_numpy(row.targets.astype(np.int64))
        nll = torch.nn.functional.cross_entropy(alone, targets, reduction="none")
        total += float(nll[torch.tensor([across or t != tiny_tokenizer.eod_id for t in row.tokens])].sum())
        at += len(tokens)
    assert num_sequences > len(rows) or across, "some row must hold several documents"
    assert float(next_token_loss(model, batch)) == pytest.approx(total, rel=1e-5)
