"""Drawing the next token of many sequences at once, and the penalties that come before.

The noise is counter-based: a pure function of (the request's seed, the index of the token in the answer, the token id).
What a request draws therefore depends on its seed and its logits alone, never on its batch, and a draft of
speculative decoding is checked by comparing it with the draw itself.

A draw is an exponential race (the Gumbel-max trick): every token that passes the filters gets e ~ Exp(1), and the
largest logit / temperature - log(e) wins; the lowest id among equals.

Contract of the filters, on logits after penalties, bias and masks, in this order:
* temperature 0: the largest logit, the lowest id among equals; the filters do not matter.
* top-k: keep logits at least as large as the k-th largest, so every token tied with it stays.
* top-p: on the distribution that top-k leaves, keep p >= p*, the largest level whose tokens and all likelier ones have
  a mass of at least top_p together.
* min-p: keep p >= min_p * max p.
* Logits of -inf and ids >= vocab_size are never drawn. A row with nothing to draw gives id 0.
Probabilities below 2**-40 of the likeliest token count as 0 in top-p.

Logarithms of probabilities are natural and those of the whole row of `raw` logits, before any of this.

Shape suffixes: B rows (sequences), V columns of the logits (rows of the model's head), R rows of the table of counts,
W = ceil(V / 32) words of a bit mask, N any number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwench.ops.dispatch import Implementation, Operation
from qwench.ops.triton_launch import runs_triton
from qwench.types import SamplingParams

IN_PROMPT = 1 << 14
"""Flag in a count: the token stands in the prompt. The 14 bits below count how often it stands in the answer."""
MAX_COUNT = IN_PROMPT - 1
REACH = 26.0
"""A token whose logit / temperature is further than this below the largest cannot win: -log(e) is in (-2.82, 22.9)."""
COLDEST, HOTTEST = 1e-30, 1e30
"""Temperatures outside are moved here: beyond, fp32 cannot hold logit / temperature, and the draw is the same."""
MASS_UNIT = 2.0**40
"""Probabilities relative to the likeliest are summed as integers of 1 / MASS_UNIT: no order changes the sum."""

_WORD = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """How each of B rows of logits is drawn from. All tensors are [B], contiguous and on the logits' device.

    >>> SamplingRows.of([SamplingParams(top_k=20)], seeds=[7], steps=[0], vocab_size=151665, device="cpu")
    """

    temperature: Tensor
    """fp32; 0 is greedy."""
    top_k: Tensor
    """int32; 0 is off."""
    top_p: Tensor
    """fp32; 1 is off."""
    min_p: Tensor
    """fp32; 0 is off."""
    seeds: Tensor
    """int64, one a request."""
    steps: Tensor
    """int64: index in the answer of the token that is drawn."""
    vocab_size: int
    """Ids from here on (rows of the model without a token) are never drawn."""
    filtered: bool = True
    """Whether any row may use top-k, top-p or min-p. False ignores those three and saves their kernels."""

    @staticmethod
    def of(
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        steps: Sequence[int],
        vocab_size: int,
        device: torch.device | str,
    ) -> SamplingRows:
        """Rows of requests. Seeds are taken modulo 2**64."""

        def floats(name: str) -> Tensor:
            return torch.tensor([getattr(one, name) for one in params], dtype=torch.float32, device=device)

        return SamplingRows(
            temperature=floats("temperature"),
            top_k=torch.tensor([min(one.top_k, 2**31 - 1) for one in params], dtype=torch.int32, device=device),
            top_p=floats("top_p"),
            min_p=floats("min_p"),
            seeds=torch.tensor([wrap_seed(seed) for seed in seeds], dtype=torch.int64, device=device),
            steps=torch.tensor(list(steps), dtype=torch.int64, device=device),
            vocab_size=vocab_size,
            filtered=any(uses_filters(one) for one in params),
        )


def uses_filters(params: SamplingParams) -> bool:
    """Whether the draw needs top-k, top-p or min-p (a greedy one does not)."""
    return params.temperature > 0 and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)


def wrap_seed(seed: int) -> int:
    """Any integer as the int64 with the same low 64 bits."""
    return (seed + 2**63) % 2**64 - 2**63


def sample(logits_BV: Tensor, rows: SamplingRows, raw_BV: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The next tokens [B] int64 and their log-probabilities [B] fp32; see the contract at the top of this file.

    `logits_BV` float, any dtype, contiguous rows. `raw_BV` are the logits that log-probabilities refer to where
    penalties or masks have changed `logits_BV` since; by default `logits_BV` itself. No gradient.
    """
    return SAMPLE.choose(logits_BV.device)(logits_BV, rows, raw_BV)


def penalise(
    logits_BV: Tensor,
    counts_RV: Tensor,
    slots_B: Tensor,
    repetition_B: Tensor,
    presence_B: Tensor,
    frequency_B: Tensor,
    out_BV: Tensor | None = None,
) -> Tensor:
    """Logits after repetition, presence and frequency penalties, fp32 [B, V].

    `counts_RV` int16: how often each token stands in the answer, plus IN_PROMPT where it stands in the prompt; row b
    of the logits uses row slots_B[b] (int64). Penalties are fp32 [B]; 1, 0 and 0 change nothing. Written to
    `out_BV` if given, which may be `logits_BV` itself when that is fp32.
    """
    return PENALISE.choose(logits_BV.device)(
        logits_BV, counts_RV, slots_B, repetition_B, presence_B, frequency_B, out_BV
    )


def count_(counts_RV: Tensor, slots_N: Tensor, tokens_N: Tensor) -> None:
    """Add one to counts_RV[slots_N[i], tokens_N[i]] for each i. int16 [R, V]; int64 [N]; V even.

    A count of 16,383 stays; only several equal places in one call could go beyond it.
    """
    COUNT.choose(counts_RV.device)(counts_RV, slots_N, tokens_N)


def start_counts_(counts_RV: Tensor, slot: int, prompt_ids: Tensor, answer_ids: Tensor) -> None:
    """Fill row `slot` for a request with this prompt and the answer so far; int64 [N] ids below V, on the device."""
    times_V = torch.zeros(counts_RV.shape[1], dtype=torch.int32, device=counts_RV.device)
    times_V.scatter_add_(0, answer_ids, torch.ones_like(answer_ids, dtype=torch.int32)).clamp_(max=MAX_COUNT)
    times_V[prompt_ids] = times_V[prompt_ids] + IN_PROMPT  # an id that stands there twice is written twice, not added
    counts_RV[slot] = times_V


def add_bias_(logits_BV: Tensor, rows_N: Tensor, tokens_N: Tensor, values_N: Tensor) -> None:
    """Add values_N (fp32) to logits_BV[rows_N, tokens_N] (int64, fp32 logits, contiguous).

    To fill a fixed N, repeat any place with the value 0.
    """
    logits_BV.view(-1).scatter_add_(0, rows_N * logits_BV.shape[1] + tokens_N, values_N)


def mask_(logits_BV: Tensor, mask_BW: Tensor) -> None:
    """Set logits to -inf where bit (v % 32) of the int32 word mask_BW[b, v // 32] is 0; -1 lets 32 tokens through."""
    MASK.choose(logits_BV.device)(logits_BV, mask_BW)


def token_logprobs(raw_BV: Tensor, tokens_B: Tensor) -> Tensor:
    """Natural logarithm of each token's probability in its row, fp32 [B]."""
    logits_BV = raw_BV.float()
    return logits_BV.gather(1, tokens_B[:, None])[:, 0] - logits_BV.logsumexp(1)


# The noise. 32-bit arithmetic in int64: every product stays below 2**63, and every step is cut to 32 bits.

_MULTIPLIERS = (0xED5AD4BB, 0xAC4C1B51, 0x31848BAB)  # of "triple32" in C. Wellons' hash-prospector: bias 0.02 %
_SHIFTS = (17, 11, 15, 14)


def _mix(x: Tensor, key: Tensor | int = 0) -> Tensor:
    """A bijection of 32-bit words; `key` is added after the first product."""
    x = x ^ (x >> _SHIFTS[0])
    x.mul_(_MULTIPLIERS[0]).add_(key).bitwise_and_(_WORD)
    x.bitwise_xor_(x >> _SHIFTS[1]).mul_(_MULTIPLIERS[1]).bitwise_and_(_WORD)
    x.bitwise_xor_(x >> _SHIFTS[2]).mul_(_MULTIPLIERS[2]).bitwise_and_(_WORD)
    return x.bitwise_xor_(x >> _SHIFTS[3])


def row_keys(seeds: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Two 32-bit words (in int64) of each pair of seed and step (the step's low 32 bits)."""
    low, high, step = seeds & _WORD, (seeds >> 32) & _WORD, steps & _WORD
    first = _mix(_mix(_mix((low + 0x9E3779B9) & _WORD) ^ high) ^ step)
    second = _mix(_mix(_mix((step + 0x7F4A7C15) & _WORD) ^ high) ^ low)
    return first, second


def noise_bits(seeds: Tensor, steps: Tensor, tokens: Tensor) -> Tensor:
    """32 random bits (in int64) for each (seed, step, token id); the three int64 tensors are broadcast."""
    first, second = row_keys(seeds, steps)
    return _mix(tokens ^ first, second)


def exponential(bits: Tensor) -> Tensor:
    """32 random bits -> Exp(1), fp32 in (2**-33, 16.7): finest near 0, where the winners of a race are."""
    v = (bits.float() + 0.5) * 2.0**-32
    return -torch.log1p(-v.clamp(max=1 - 2.0**-24))  # fp32 rounds the last values to 1, whose logarithm is infinite


# The reference.


def _sample(logits_BV: Tensor, rows: SamplingRows, raw_BV: Tensor | None) -> tuple[Tensor, Tensor]:
    """Row by row, noise only for tokens that can win."""
    settings = zip(
        rows.temperature.tolist(), rows.top_k.tolist(), rows.top_p.tolist(), rows.min_p.tolist(), strict=True
    )
    first_B, second_B = row_keys(rows.seeds, rows.steps)
    tokens = []
    for b, (temperature, *filters) in enumerate(settings):
        logits_V = logits_BV[b, : rows.vocab_size].float()
        if temperature == 0:
            tokens.append(logits_V.argmax())
            continue
        largest = logits_V.max()
        cold = 1 / min(max(temperature, COLDEST), HOTTEST)
        if rows.filtered and filters != [0, 1, 0]:
            logits_N, ids_N = _filter(logits_V, largest, cold, *filters)
        else:
            logits_N, ids_N = logits_V, torch.arange(rows.vocab_size, device=logits_V.device)
        if logits_N.numel() == 0:
            tokens.append(ids_N.new_zeros(()))
            continue
        noise_N = exponential(_mix(ids_N ^ first_B[b], second_B[b])).log_()
        scores_N = (logits_N - largest).mul_(cold).sub_(noise_N)
        tokens.append(ids_N[scores_N.nan_to_num_(nan=float("-inf")).argmax()])  # NaN: the whole row is -inf
    tokens_B = torch.stack(tokens)
    return tokens_B, token_logprobs(logits_BV if raw_BV is None else raw_BV, tokens_B)


def _filter(
    logits_V: Tensor, largest: Tensor, cold: float, top_k: int, top_p: float, min_p: float
) -> tuple[Tensor, Tensor]:
    """The logits [N] and ids [N] that the filters leave, in order of ids, without some that cannot win."""
    floor = largest + max(math.log(min_p) if min_p > 0 else -REACH, -REACH) / cold
    if top_k == 0 and top_p < 1:
        floor = torch.maximum(floor, _nucleus_floor(logits_V, largest, cold, top_p))
    kth = logits_V.topk(top_k).values[-1] if 0 < top_k < logits_V.numel() else largest - REACH / cold
    (ids_N,) = (logits_V >= (kth if top_k else floor)).nonzero(as_tuple=True)
    logits_N = logits_V[ids_N]
    if top_k and logits_N.numel():
        if top_p < 1:
            floor = torch.maximum(floor, _nucleus_floor(logits_N, largest, cold, top_p))
        kept_N = logits_N >= floor
        logits_N, ids_N = logits_N[kept_N], ids_N[kept_N]
    return logits_N, ids_N


def _nucleus_floor(logits_N: Tensor, largest: Tensor, cold: float, top_p: float) -> Tensor:
    """The smallest logit that top-p keeps of these. Sorts no more of them than it turns out to need."""
    needed = _mass(logits_N, largest, cold).sum().double() * top_p
    size = logits_N.numel()
    num = min(size, 512)
    while True:
        ordered_N = logits_N.topk(num).values if num < size else logits_N.sort(descending=True).values
        enough_N = _mass(ordered_N, largest, cold).cumsum(0).double() >= needed
        if bool(enough_N[-1]):
            return ordered_N[enough_N.int().argmax()]
        if num == size:
            return ordered_N[-1]  # rounding may leave the sum below a top_p next to 1
        num = 16 * num if 64 * num < size else size


def _mass(logits_N: Tensor, largest: Tensor, cold: float) -> Tensor:
    """Probabilities relative to the likeliest token, int64 in units of 1 / MASS_UNIT."""
    return (logits_N - largest).mul_(cold).exp_().mul_(MASS_UNIT).long()


def _penalise(
    logits_BV: Tensor,
    counts_RV: Tensor,
    slots_B: Tensor,
    repetition_B: Tensor,
    presence_B: Tensor,
    frequency_B: Tensor,
    out_BV: Tensor | None,
) -> Tensor:
    counts_BV = counts_RV[slots_B]
    times_BV = counts_BV & MAX_COUNT
    x_BV = logits_BV.float()
    repetition_B1 = repetition_B[:, None]
    repeated_BV = torch.where(x_BV > 0, x_BV / repetition_B1, x_BV * repetition_B1)
    x_BV = torch.where(counts_BV != 0, repeated_BV, x_BV)
    x_BV = x_BV - presence_B[:, None] * (times_BV > 0) - frequency_B[:, None] * times_BV
    return x_BV if out_BV is None else out_BV.copy_(x_BV)


def _count(counts_RV: Tensor, slots_N: Tensor, tokens_N: Tensor) -> None:
    flat = counts_RV.view(-1)
    places_N = slots_N * counts_RV.shape[1] + tokens_N
    flat.scatter_add_(0, places_N, ((flat[places_N] & MAX_COUNT) < MAX_COUNT).to(flat.dtype))


def _mask(logits_BV: Tensor, mask_BW: Tensor) -> None:
    bits_BWN = (mask_BW[:, :, None] >> torch.arange(32, dtype=torch.int32, device=mask_BW.device)) & 1
    logits_BV.masked_fill_(bits_BWN.flatten(1)[:, : logits_BV.shape[1]] == 0, float("-inf"))


def _triton_sample(logits_BV: Tensor, rows: SamplingRows, raw_BV: Tensor | None) -> tuple[Tensor, Tensor]:
    from qwench.ops import sampling_triton

    return sampling_triton.sample(logits_BV, rows, raw_BV)


def _triton_penalise(
    logits_BV: Tensor,
    counts_RV: Tensor,
    slots_B: Tensor,
    repetition_B: Tensor,
    presence_B: Tensor,
    frequency_B: Tensor,
    out_BV: Tensor | None,
) -> Tensor:
    from qwench.ops import penalties_triton

    return penalties_triton.penalise(logits_BV, counts_RV, slots_B, repetition_B, presence_B, frequency_B, out_BV)


def _triton_count(counts_RV: Tensor, slots_N: Tensor, tokens_N: Tensor) -> None:
    from qwench.ops import penalties_triton

    penalties_triton.count_(counts_RV, slots_N, tokens_N)


def _triton_mask(logits_BV: Tensor, mask_BW: Tensor) -> None:
    from qwench.ops import penalties_triton

    penalties_triton.mask_(logits_BV, mask_BW)


SAMPLE = Operation(
    "sample", [Implementation("triton", _triton_sample, runs_triton), Implementation("reference", _sample)]
)
PENALISE = Operation(
    "penalise", [Implementation("triton", _triton_penalise, runs_triton), Implementation("reference", _penalise)]
)
COUNT = Operation("count", [Implementation("triton", _triton_count, runs_triton), Implementation("reference", _count)])
MASK = Operation("mask", [Implementation("triton", _triton_mask, runs_triton), Implementation("reference", _mask)])
