"""From a step's logits to its tokens: penalties, edits, grammar masks, then the draw of `ops.sampling`.

The order is that of `SamplingParams`. What the rows of a step need decides its `Mode`, a part of the key of recorded
graphs; what only the host can know (biases, bans, grammars) comes as `Extras`.

Shape suffixes: B rows of the step, V vocabulary rows, R rows of the engine's state, N rows of counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from qwench.engine.rows import RowState
from qwench.engine.sequence import Sequence
from qwench.ops.sampling import SamplingRows, add_bias_, count_, mask_, penalise, sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """What the device must do for the rows of a step."""

    filtered: bool = False
    """Some row uses top-k, top-p or min-p."""
    penalised: bool = False
    """Some row uses a repetition, presence or frequency penalty."""


@dataclass(slots=True)
class Extras:
    """What the host adds to one step."""

    edits: list[tuple[int, int, float]] = field(default_factory=list)
    """(row of the step, token, number added to its logit)."""
    masks: np.ndarray | dict[int, np.ndarray] | None = None
    """For each row of `masked` an int32 [ceil(V / 32)]: bit set = allowed."""
    masked: list[int] = field(default_factory=list)
    num_top: int = 0

    @property
    def is_masks_alone(self) -> bool:
        return not self.edits and not self.num_top


class MaskTable:
    """What grammars allow in each row of a step's logits: computed in pinned memory, and copied to the same rows on the
    device. A recorded draw reads the device's copy, always at one place."""

    def __init__(self, num_rows: int, num_words: int, device: torch.device) -> None:
        shape = (num_rows, num_words)
        self._host = torch.full(shape, -1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = torch.full(shape, -1, dtype=torch.int32, device=device)
        self._array = self._host.numpy()
        self._rows: list[int] = []
        self._stale: set[int] = set()
        """Rows that allow everything again, which the device does not know yet."""
        self._stretches: list[tuple[int, int]] = []

    def take(self, rows: list[int]) -> np.ndarray:
        """[num_rows, ceil(V / 32)] int32, to compute the masks of these rows in; all others allow everything.

        The step that used the table before must have been waited for.
        """
        if rows != self._rows:
            stale = set(self._rows).difference(rows)
            self._array[list(stale)] = -1
            self._rows, self._stale = list(rows), (self._stale | stale).difference(rows)
            self._stretches = stretches([*rows, *self._stale])
        return self._array

    def put(self, num_rows: int) -> Tensor:
        """The masks of a step whose logits have `num_rows` rows, on the device, [num_rows, ceil(V / 32)]."""
        for first, stop in self._stretches:
            self._device[first:stop].copy_(self._host[first:stop], non_blocking=True)
        if self._stale:
            self._stale, self._stretches = set(), stretches(self._rows)
        return self._device[:num_rows]


def stretches(rows: Iterable[int], gap: int = 8) -> list[tuple[int, int]]:
    """(first, stop) of stretches that cover these rows, over gaps of up to `gap` others: one copy costs as much."""
    found: list[tuple[int, int]] = []
    for row in sorted(rows):
        if found and row - found[-1][1] <= gap:
            found[-1] = found[-1][0], row + 1
        else:
            found.append((row, row + 1))
    return found


def mode_of(sequences: Iterable[Sequence]) -> Mode:
    wishes = {(s.filtered, s.penalised) for s in sequences}
    return Mode(filtered=any(f for f, _ in wishes), penalised=any(p for _, p in wishes))


def draw(
    logits_BV: Tensor,
    rows: RowState,
    which: slice | Tensor,
    mode: Mode,
    counts_RV: Tensor | None,
    vocab_size: int,
    extras: Extras | None = None,
    upload: Callable[[Tensor], Tensor] | None = None,
    mask_BW: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens [B] int64 and the log-probabilities [B] fp32 that the model itself gives them; the tokens are counted.

    `which` rows of the state the logits belong to. Without extras nothing here needs the host; `mask_BW` is theirs
    where it is on the device already.
    """
    slots_B = torch.arange(which.stop, device=logits_BV.device) if isinstance(which, slice) else which
    tokens_B, logprobs_B = draw_at(
        logits_BV, rows, which, rows.step[which], mode, counts_RV, slots_B, vocab_size, extras, upload, mask_BW
    )
    if mode.penalised and counts_RV is not None:
        count_(counts_RV, slots_B, tokens_B)
    return tokens_B, logprobs_B


def draw_at(
    logits_BV: Tensor,
    rows: RowState,
    which: slice | Tensor,
    steps_B: Tensor,
    mode: Mode,
    counts_NV: Tensor | None,
    slots_B: Tensor,
    vocab_size: int,
    extras: Extras | None = None,
    upload: Callable[[Tensor], Tensor] | None = None,
    mask_BW: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`draw` for the places `steps_B` [B] int64 of the answers, with the counts in row slots_B[b] of `counts_NV`.

    Row b draws as row which[b] of the state does, which may stand there several times. Nothing is counted.
    """
    drawing = SamplingRows(
        temperature=rows.temperature[which],
        top_k=rows.top_k[which],
        top_p=rows.top_p[which],
        min_p=rows.min_p[which],
        seeds=rows.seed[which],
        steps=steps_B,
        filtered=mode.filtered,
        vocab_size=vocab_size,
    )
    changed_BV = logits_BV
    if mode.penalised:
        assert counts_NV is not None
        penalties = rows.repetition[which], rows.presence[which], rows.frequency[which]
        changed_BV = penalise(logits_BV, counts_NV, slots_B, *penalties)
    if extras is not None and upload is not None:
        if extras.edits:
            if changed_BV is logits_BV:
                changed_BV = logits_BV.to(torch.float32, copy=True)
            at, token, value = zip(*extras.edits, strict=True)
            places = upload(torch.tensor([at, token]))
            add_bias_(changed_BV, places[0], places[1], upload(torch.tensor(value, dtype=torch.float32)))
        if extras.masks is not None and mask_BW is None:
            everything = np.full((changed_BV.shape[0], -(-changed_BV.shape[1] // 32)), -1, np.int32)
            for row in extras.masked:
                everything[row] = extras.masks[row]
            mask_BW = upload(torch.from_numpy(everything))
    if mask_BW is not None:
        changed_BV = logits_BV.clone() if changed_BV is logits_BV else changed_BV
        mask_(changed_BV, mask_BW)
    return sample(changed_BV, drawing, None if changed_BV is logits_BV else logits_BV)
