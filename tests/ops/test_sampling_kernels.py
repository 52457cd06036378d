"""The Triton kernels of the sampling operations against the references: on a GPU, in the interpreter, and compiled."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence

import pytest
import torch
from sampling_cases import (
    DEVICE,
    INF,
    MIXED,
    PLAIN,
    check_counts,
    check_mask,
    kernels,
    random_logits,
    rows_of,
)
from torch import Tensor

from qwench.engine.sampling import kept_tokens
from qwench.ops.dispatch import OPERATIONS, forced
from qwench.ops.sampling import (
    IN_PROMPT,
    SamplingRows,
    count_,
    exponential,
    noise_bits,
    penalise,
    sample,
    token_logprobs,
)
from qwench.ops.triton_launch import interpreted, runs_triton
from qwench.types import SamplingParams


def close_race(logits_V: Tensor, params: SamplingParams, seed: int, step: int, tokens: list[int]) -> bool:
    """The two tokens pass the filters and their scores differ by rounding alone."""
    ids = torch.tensor(tokens)
    kept = kept_tokens(logits_V, params)[ids]
    noise = exponential(noise_bits(torch.tensor(seed), torch.tensor(step), ids)).double().log()
    scores = logits_V[ids].double() / params.temperature - noise
    return bool(kept.all()) and abs(float(scores[0] - scores[1])) < 2e-5


def compare(
    logits: Tensor, params: Sequence[SamplingParams], vocab_size: int, seed: int = 0, step: int = 0,
    raw: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The kernels draw what the reference draws; a row may differ where two tokens run neck and neck."""
    rows = SamplingRows.of(params, range(seed, seed + len(params)), [step] * len(params), vocab_size, DEVICE)
    logits = logits.to(DEVICE)
    raw = None if raw is None else raw.to(DEVICE)
    before = logits.clone()
    with forced({"sample": "reference"}):
        want, _ = sample(logits, rows, raw)
    with forced({"sample": "triton"}):
        got, logprobs = sample(logits, rows, raw)
    assert torch.equal(logits, before)
    assert got.dtype == torch.int64
    for i in (got != want).nonzero()[:, 0].tolist():
        pair = [int(got[i]), int(want[i])]
        assert close_race(logits[i, :vocab_size].float().cpu(), params[i], seed + i, step, pair), (i, params[i], pair)
    assert int((got != want).sum()) <= max(1, len(params) // 100), "neck and neck that often is a bug"
    torch.testing.assert_close(
        logprobs, token_logprobs(logits if raw is None else raw, got), rtol=1e-5, atol=1e-5, equal_nan=True
    )
    return got


@kernels
@pytest.mark.parametrize(
    ("size", "dtype"), [(1, torch.float32), (130, torch.bfloat16), (2048, torch.float32), (3001, torch.bfloat16)]
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("params", [MIXED, PLAIN], ids=["mixed", "plain"])
def test_kernel_sample(params: list[SamplingParams], masked: bool, size: int, dtype: torch.dtype) -> None:
    """bf16 logits have many ties; the last ids have no token."""
    logits = random_logits(size, (len(params), size)).to(dtype)
    if masked:
        logits[random_logits(7, (len(params), size)) < 0] = -INF
        logits[:, size // 2] = 1.0  # no row without any token
    logits[:, max(1, size - 9) :] += 30
    compare(logits, params, max(1, size - 9), seed=-7, step=size)


@kernels
@pytest.mark.parametrize("params", [MIXED[5], MIXED[3], MIXED[4], MIXED[9]])
def test_kernel_filters_keep_the_same_tokens(params: SamplingParams) -> None:
    """Several draws from one row see the edges of the filter (the interpreter has time for few); all lie inside."""
    num = 4 if interpreted() else 500
    logits = random_logits(11, (2500,), 2.0).bfloat16().float()
    got = compare(logits.expand(num, -1).contiguous(), [params] * num, 2500)
    assert bool(kept_tokens(logits, params)[got.cpu()].all())


@kernels
@pytest.mark.parametrize("top", [2, 2999])
def test_kernel_ties(top: int) -> None:
    """`top` tokens share the largest logit, at the end of the row; the others share another."""
    logits = torch.zeros(len(MIXED), 3000)
    logits[:, 3000 - top :] = 2.0
    compare(logits, MIXED, 3000, seed=3)
    compare(logits[: len(PLAIN)], PLAIN, 3000)


@kernels
def test_kernel_of_flat_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """More candidates than places for them: the whole row is searched, with the same result."""
    from qwench.ops import sampling_triton

    logits = random_logits(12, (len(MIXED), 3001), 0.3)
    want = compare(logits, MIXED, 2990)
    monkeypatch.setattr(sampling_triton, "MAX_CANDIDATES", 4)
    assert torch.equal(compare(logits, MIXED, 2990), want)


@kernels
def test_kernel_extremes() -> None:
    logits = random_logits(13, (4, 2100), 1.0)
    logits[0] *= 1e30
    logits[1] *= 1e-30
    logits[2] = -INF
    logits[3] = -INF
    logits[3, 2077] = -5.0
    got = compare(logits, [SamplingParams()] * 4, 2100)
    assert got.tolist()[2:] == [0, 2077]
    compare(logits, [SamplingParams(top_k=3, top_p=0.9)] * 4, 2100)
    assert compare(logits, [SamplingParams(temperature=0)] * 4, 2100).tolist()[2:] == [0, 2077]


@kernels
@pytest.mark.parametrize("params", [MIXED, PLAIN], ids=["mixed", "plain"])
def test_kernel_logprobs_of_other_logits(params: list[SamplingParams]) -> None:
    raw = random_logits(14, (len(params), 2100)).bfloat16()
    changed = raw.float() + random_logits(15, (len(params), 2100))
    changed[:, ::2] = -INF
    compare(changed, params, 2050, raw=raw)


@kernels
def test_kernel_rows_of_a_larger_tensor() -> None:
    logits = random_logits(16, (6, 2200))[::2, :2100]
    assert logits.stride() == (4400, 1)
    compare(logits, MIXED[3:6], 2100)
    compare(logits, PLAIN[:3], 2100)


@kernels
def test_kernel_without_rows() -> None:
    with forced({"sample": "triton"}):
        tokens, logprobs = sample(torch.empty(0, 64, device=DEVICE), rows_of([], 64))
    assert tokens.shape == logprobs.shape == (0,)


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_penalise(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 4, (5, 2100), generator=generator, dtype=torch.int16)
    counts += IN_PROMPT * torch.randint(0, 2, (5, 2100), generator=generator, dtype=torch.int16)
    logits = random_logits(17, (3, 2100)).to(dtype)
    arguments = [
        x.to(DEVICE)
        for x in (
            logits, counts, torch.tensor([4, 0, 2]), torch.tensor([1.2, 1.0, 1.0]), torch.tensor([0.5, 0.0, -0.5]),
            torch.tensor([0.1, 0.0, 0.0]),
        )
    ]  # fmt: skip
    with forced({"penalise": "reference"}):
        want = penalise(*arguments)
    with forced({"penalise": "triton"}):
        got = penalise(*arguments)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want)
        assert torch.equal(got[1], arguments[0][1].float())
        assert float((got[0] - logits[0].to(DEVICE).float()).abs().max()) > 0.1
        if dtype == torch.float32:
            assert penalise(*arguments, arguments[0]) is arguments[0]
            assert torch.equal(arguments[0], got)


@kernels
def test_kernel_count() -> None:
    with forced({"count": "triton"}):
        check_counts()


@kernels
@pytest.mark.parametrize("size", [32, 100, 3001])
def test_kernel_mask(size: int) -> None:
    with forced({"mask": "triton"}):
        check_mask(size)


def kernel_variants() -> list[tuple[str, str, dict[str, object], int]]:
    """File, kernel, constants and warps of every variant that is launched at the published vocabulary's size."""
    tiles = [
        {"RAW": raw, "STATISTICS": statistics, "SUBS": subs, "DRAW": draws}
        for raw in (False, True)
        for statistics, subs, draws in ((True, False, True), (True, True, False), (False, True, True))
    ]
    return [
        *(("sampling_triton", "_tiles_kernel", constants, 4) for constants in tiles),
        ("sampling_triton", "_cut_kernel", {"SUBS": 2048}, 4),
        ("sampling_triton", "_gather_kernel", {}, 4),
        ("sampling_triton", "_select_kernel", {"BLOCK": 2048}, 16),
        ("sampling_triton", "_finish_kernel", {"TILES": 128}, 1),
        ("penalties_triton", "_penalise_kernel", {}, 4),
        ("penalties_triton", "_count_kernel", {"BLOCK": 128}, 4),
        ("penalties_triton", "_mask_kernel", {}, 4),
    ]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(interpreted(), reason="the interpreter compiles nothing")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_kernels_compile(dtype: str) -> None:
    """For Hopper, on any machine: the compiler refuses more than the interpreter does."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as triton_compile

    special = dict.fromkeys(("logits_ptr", "raw_ptr", "candidates_ptr"), f"*{dtype}")
    special |= dict.fromkeys(("seeds_ptr", "steps_ptr", "token_ptr", "slots_ptr", "tokens_ptr"), "*i64")
    special |= dict.fromkeys(("id_ptr", "num_ptr", "top_k_ptr", "words_ptr", "mask_ptr"), "*i32")
    special |= {"counts_ptr": "*i16"}
    for module, name, constants, num_warps in kernel_variants():
        kernel = getattr(importlib.import_module(f"qwench.ops.{module}"), name)
        names = list(kernel.arg_names)
        types = {n: special.get(n, "*fp32" if n.endswith("_ptr") else "i32") for n in names}
        types |= dict.fromkeys(constants, "constexpr")
        aligned = [i for i, n in enumerate(names) if types[n][0] == "*" or n in ("V", "stride_b", "raw_stride_b")]
        source = ASTSource(
            kernel,
            types,
            {(names.index(n),): value for n, value in constants.items()},
            {(i,): [["tt.divisibility", 16]] for i in aligned},
        )
        built = triton_compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
        assert built.asm["cubin"], name
        assert ".local" not in built.asm["ptx"], f"{name} keeps an array in memory"
        if name == "_tiles_kernel":
            assert "ld.global.v4" in built.asm["ptx"], "logits are not read in wide words"


def test_which_implementation_is_chosen() -> None:
    for name in ("sample", "penalise", "count", "mask"):
        available = [impl.name for impl in OPERATIONS[name].available(DEVICE)]
        assert available == (["triton", "reference"] if runs_triton(DEVICE) else ["reference"])


# At full size, on a GPU.

VOCAB, COLUMNS = 151_665, 151_936


def model_like_logits(num: int) -> Tensor:
    """Flat to peaked rows, rounded to bf16 as a model's head gives them."""
    logits = random_logits(20, (num, COLUMNS), 2.5)
    logits[:, :300] += torch.linspace(0, 12, num)[:, None]
    return logits.bfloat16()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num", [1, 64])
def test_kernel_at_full_size(num: int, dtype: torch.dtype) -> None:
    logits = model_like_logits(num).to(dtype)
    for step in range(4):
        for params in (MIXED, PLAIN):
            compare(logits, [params[(i + step) % len(params)] for i in range(num)], VOCAB, step=step)


@pytest.mark.gpu
def test_kernel_of_a_thousand_rows() -> None:
    logits = model_like_logits(64).repeat(16, 1)
    compare(logits, [SamplingParams(temperature=0.8, top_k=20, top_p=0.9)] * 1024, VOCAB)
    compare(logits, [SamplingParams()] * 1024, VOCAB)


@pytest.mark.gpu
@pytest.mark.parametrize("params", [MIXED, PLAIN], ids=["mixed", "plain"])
def test_kernel_in_a_cuda_graph(params: list[SamplingParams]) -> None:
    """Recorded once with penalties and counts, replayed with other logits, seeds and steps in the same tensors."""
    num = len(params)
    rows = rows_of(params, VOCAB)
    logits = model_like_logits(num).to(DEVICE)
    counts = torch.zeros((num, COLUMNS), dtype=torch.int16, device=DEVICE)
    slots = torch.arange(num, device=DEVICE)
    penalties = [torch.full((num,), x, device=DEVICE) for x in (1.1, 0.2, 0.3)]

    def step() -> tuple[Tensor, Tensor]:
        changed = penalise(logits, counts, slots, *penalties)
        tokens, logprobs = sample(changed, rows, logits)
        count_(counts, slots, tokens)
        rows.steps.add_(1)
        return tokens, logprobs

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens, logprobs = step()
    for change in (0.0, 1.0):
        logits.add_(change * random_logits(21, (num, COLUMNS)).to(DEVICE))
        for tensor in (counts, rows.steps):
            tensor.zero_()
        recorded = []
        for _ in range(4):
            graph.replay()
            recorded.append((tokens.clone(), logprobs.clone()))
        for tensor in (counts, rows.steps):
            tensor.zero_()
        for got_tokens, got_logprobs in recorded:
            want_tokens, want_logprobs = step()
            assert torch.equal(got_tokens, want_tokens)
            assert torch.equal(got_logprobs, want_logprobs)
        assert int((counts > 0).sum()) > num
