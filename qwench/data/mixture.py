"""The mixture: how many tokens of each group of documents are read, when, and how often.

Groups are domains, sources or languages. A plan gives every group of every phase a number of tokens: what is asked for
(shares, or factors on natural size), limited by how often a group may be repeated, with what a group cannot give spread
over the others [Qwen TR 2.1 step 6: over-sampling; Qwen2.5 TR 3.1: domains re-weighted]. The shares in the reports are
unpublished.

    MIXTURE/mixture.json        the plan, with checksums of the groups' shards
    MIXTURE/GROUP/              token shards (data.shards), every document once

Nothing is repeated on disk: `MixedDataset` draws rows from the groups' shards on the fly. Which group a row is from
follows from its number alone, in any process, and every stretch of a phase has the phase's shares to within a few rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qwench.config import config
from qwench.data.packing import PackedRow, PretrainDataset
from qwench.data.permutation import permute
from qwench.data.shards import TokenShards
from qwench.run import write_atomically

MIXTURE = "mixture.json"
FORMAT = "qwench-mixture"
VERSION = 1
_LEAF_ROWS = 256  # stretches of a phase that have its exact shares and are shuffled inside


@config
class PhaseConfig:
    """A part of the run with shares of its own."""

    share: float = 1.0
    """Of the run's tokens; the shares of all phases add up to 1."""
    shares: dict[str, float] = field(default_factory=dict)
    """As mixture.shares, for this phase; empty: those."""
    weights: dict[str, float] = field(default_factory=dict)
    """As mixture.weights, for this phase; empty: those."""


@config
class MixtureConfig:
    """Which share of the tokens comes from where."""

    by: tuple[str, ...] = ("kind",)
    """What makes a group: "kind" (the domain), "source", "lang", or several of them."""
    shares: dict[str, float] = field(default_factory=dict)
    """Group -> share of the tokens. Groups that are not named divide the rest by their size times weight."""
    weights: dict[str, float] = field(default_factory=dict)
    """Group -> factor on its size, for groups not in shares: 2 doubles its share against others, 0 leaves it out."""
    tokens: int | None = None
    """Tokens of the whole run; unset: as many as there are."""
    max_epochs: float = 4.0
    """How often a document may be read at most in the whole run; what that takes from a share goes to the others."""
    max_group_epochs: dict[str, float] = field(default_factory=dict)
    """Group -> its own limit."""
    phases: dict[str, PhaseConfig] = field(default_factory=dict)
    """Name -> phase, in their order in the run; none: one phase."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.by if name not in ("kind", "source", "lang")]
        if unknown or not self.by:
            raise ValueError(f"mixture.by is {list(self.by)}; give some of kind, source, lang")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"mixture.tokens is {self.tokens}; give a positive number, or leave it out")
        _check_shares("mixture", self.shares, self.weights)
        for name, limit in [("max_epochs", self.max_epochs), *self.max_group_epochs.items()]:
            if limit <= 0:
                raise ValueError(f"the limit of epochs {name} is {limit}; give a positive number")
        for name, phase in self.phases.items():
            _check_shares(f"mixture.phases.{name}", phase.shares, phase.weights)
        total = sum(phase.share for phase in self.phases.values())
        if self.phases and (abs(total - 1) > 1e-6 or any(phase.share <= 0 for phase in self.phases.values())):
            raise ValueError(f"the shares of the phases add up to {total:g}; give positive numbers that add up to 1")

    @property
    def groups_named(self) -> set[str]:
        """Every group that some key speaks of."""
        named = {*self.shares, *self.weights, *self.max_group_epochs}
        for phase in self.phases.values():
            named |= {*phase.shares, *phase.weights}
        return named


def _check_shares(where: str, shares: Mapping[str, float], weights: Mapping[str, float]) -> None:
    if any(share < 0 for share in shares.values()) or sum(shares.values()) > 1 + 1e-6:
        raise ValueError(
            f"{where}.shares add up to {sum(shares.values()):g}; give shares from 0 to 1, at most 1 in all"
        )
    if any(weight < 0 for weight in weights.values()):
        raise ValueError(f"{where}.weights has a negative factor; give 0 to leave a group out")
    if both := set(shares) & set(weights):
        raise ValueError(f"{where} gives both a share and a weight for {', '.join(sorted(both))}; give one of them")


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """`Phase(name="all", tokens={"web": 700, "code": 300}, targets={"web": 0.7, "code": 0.3})`: tokens to read of each
    group, and the shares that were asked for."""

    name: str
    tokens: dict[str, int]
    targets: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class MixturePlan:
    """What is read of each group: `available` are the tokens there are, `phases` in order."""

    available: dict[str, int]
    phases: tuple[Phase, ...]
    asked_tokens: int

    @property
    def tokens(self) -> dict[str, int]:
        """Group -> tokens in all phases together."""
        return {group: sum(phase.tokens[group] for phase in self.phases) for group in self.available}

    @property
    def epochs(self) -> dict[str, float]:
        """Group -> how often each of its tokens is read."""
        return {group: tokens / max(1, self.available[group]) for group, tokens in self.tokens.items()}

    def describe(self) -> str:
        """Asked and achieved shares and epochs as a table."""
        width = max([5, *map(len, self.available)])
        lines = [f"{'group':<{width}} {'available':>15} {'read':>15} {'epochs':>7} {'target':>8} {'achieved':>8}"]
        many = len(self.phases) > 1
        for phase in self.phases:
            total = max(1, sum(phase.tokens.values()))
            if many:
                lines.append(f"phase {phase.name}: {total:,} tokens")
            for group, available in self.available.items():
                tokens = phase.tokens[group]
                lines.append(
                    f"{group:<{width}} {available:>15,} {tokens:>15,} {tokens / max(1, available):>7.2f} "
                    f"{phase.targets[group]:>8.2%} {tokens / total:>8.2%}"
                )
        read = sum(self.tokens.values())
        lines.append(f"{'all':<{width}} {sum(self.available.values()):>15,} {read:>15,}")
        if read < 0.999 * self.asked_tokens:  # the rest is rounding
            lines.append(
                f"{self.asked_tokens - read:,} of the {self.asked_tokens:,} tokens asked for cannot be had: "
                "every group is at its limit of epochs (mixture.max_epochs)"
            )
        return "\n".join(lines)


def plan_mixture(available: Mapping[str, int], cfg: MixtureConfig) -> MixturePlan:
    """Tokens of each group in each phase from tokens available. Raises ValueError for groups that do not exist.

    A group that would be read more often than it may is held at its limit in all phases alike; what is missing in a
    phase is taken from the phase's other groups in proportion to their targets.
    """
    groups = sorted(group for group, tokens in available.items() if tokens > 0)
    if not groups:
        raise ValueError("there are no tokens to mix; no document is left")
    if unknown := sorted(cfg.groups_named - set(available)):
        raise ValueError(
            f"the mixture names {', '.join(map(repr, unknown))}, which no document is in; groups by "
            f"{', '.join(cfg.by)} are {', '.join(groups)}"
        )
    sizes = np.array([available[group] for group in groups], np.float64)
    limits = sizes * np.array([cfg.max_group_epochs.get(group, cfg.max_epochs) for group in groups])
    phases = cfg.phases or {"all": PhaseConfig()}
    asked = cfg.tokens or int(sizes.sum())
    targets_PG = np.array([_targets(groups, sizes, cfg, phase) for phase in phases.values()])
    budget_P = asked * np.array([phase.share for phase in phases.values()])
    tokens_PG = budget_P[:, None] * targets_PG
    full = np.zeros(len(groups), bool)
    while True:
        over = ~full & (tokens_PG.sum(0) > limits * (1 + 1e-9))
        if not over.any():
            break
        full |= over
        used = tokens_PG.sum(0)
        tokens_PG[:, over] *= limits[over] / used[over]
        free_PG = np.where(full, 0.0, targets_PG)
        weight_P = free_PG.sum(1)
        room_P = budget_P - tokens_PG[:, full].sum(1)
        scale_P = np.divide(room_P, weight_P, out=np.zeros_like(room_P), where=weight_P > 0)
        tokens_PG = np.where(full, tokens_PG, free_PG * scale_P[:, None])
    return MixturePlan(
        available={group: int(available[group]) for group in groups},
        phases=tuple(
            Phase(
                name=name,
                tokens={group: int(tokens) for group, tokens in zip(groups, tokens_G, strict=True)},
                targets={group: float(share) for group, share in zip(groups, targets_G, strict=True)},
            )
            for name, tokens_G, targets_G in zip(phases, tokens_PG, targets_PG, strict=True)
        ),
        asked_tokens=asked,
    )


def _targets(groups: Sequence[str], sizes: np.ndarray, cfg: MixtureConfig, phase: PhaseConfig) -> np.ndarray:
    """Shares of the groups in a phase, adding up to 1."""
    shares = phase.shares or (cfg.shares if not phase.weights else {})
    weights = phase.weights or (cfg.weights if not phase.shares else {})
    given = np.array([shares.get(group, np.nan) for group in groups])
    natural = np.where(np.isnan(given), sizes * np.array([weights.get(group, 1.0) for group in groups]), 0.0)
    fixed = np.nan_to_num(given)
    rest = 1 - fixed.sum()
    targets = fixed + natural * (rest / natural.sum()) if natural.sum() > 0 else fixed
    if targets.sum() <= 0:
        raise ValueError("every group of the mixture has share or weight 0; leave at least one in")
    return targets / targets.sum()


# ---------------------------------------------------------------------------------------------------------- on the disk
def write_mixture(directory: Path, plan: MixturePlan, groups: Mapping[str, str], settings: Mapping[str, Any]) -> None:
    """Write mixture.json beside the groups' shards. `groups` names each group's folder."""
    shards = {group: TokenShards.open(directory / folder) for group, folder in groups.items()}
    table = {
        "format": FORMAT,
        "version": VERSION,
        "settings": dict(settings),
        "groups": {
            group: {
                "directory": groups[group],
                "num_tokens": shards[group].num_tokens,
                "num_documents": shards[group].num_documents,
                "fingerprint": shards[group].fingerprint,
                "epochs": plan.epochs.get(group, 0.0),
            }
            for group in sorted(groups)
        },
        "phases": [asdict(phase) for phase in plan.phases],
    }
    write_atomically(directory / MIXTURE, json.dumps(table, indent=1, ensure_ascii=False) + "\n")


def is_mixture(directory: Path) -> bool:
    return (directory / MIXTURE).is_file()


class MixedShards:
    """The groups' shards of a mixture with its plan. Open them with `MixedShards.open`."""

    def __init__(self, directory: Path, table: Mapping[str, Any], shards: Mapping[str, TokenShards]) -> None:
        self.directory = directory
        self.shards = dict(shards)
        self.phases = tuple(Phase(**phase) for phase in table["phases"])
        plan = json.dumps([asdict(phase) for phase in self.phases], sort_keys=True)
        sums = " ".join(f"{group} {member.fingerprint}" for group, member in self.shards.items())
        self.fingerprint = hashlib.sha256(f"{plan} {sums}".encode()).hexdigest()

    @staticmethod
    def open(directory: str | Path, tokenizer_fingerprint: str | None = None) -> MixedShards:
        """Map the shards of all groups that are read. Raises ValueError as `TokenShards.open` does, and for shards that
        are not those the plan was made for."""
        directory = Path(directory)
        try:
            table = json.loads((directory / MIXTURE).read_bytes())
        except FileNotFoundError:
            raise ValueError(f"{directory} holds no mixture (no {MIXTURE}); make one with qwench data") from None
        except ValueError as error:
            raise ValueError(f"{directory / MIXTURE} is not valid JSON ({error}); run qwench data again") from None
        if table.get("format") != FORMAT or table.get("version") != VERSION:
            raise ValueError(
                f"{directory / MIXTURE} is {table.get('format')!r} version {table.get('version')!r}, this program "
                f"reads {FORMAT!r} version {VERSION}; run qwench data again"
            )
        used = {group for phase in table["phases"] for group, tokens in phase["tokens"].items() if tokens > 0}
        shards = {}
        for group in sorted(used):
            entry = table["groups"][group]
            shards[group] = TokenShards.open(directory / entry["directory"], tokenizer_fingerprint)
            if shards[group].fingerprint != entry["fingerprint"]:
                raise ValueError(
                    f"{directory / entry['directory']} holds other shards than {MIXTURE} was made for; "
                    "run qwench data again"
                )
        return MixedShards(directory, table, shards)

    @property
    def num_tokens(self) -> int:
        """Tokens that the plan reads, repetitions included."""
        return sum(sum(phase.tokens.values()) for phase in self.phases)

    def verify(self, share: int = 0, shares: int = 1) -> None:
        """`TokenShards.verify` of all."""
        for member in self.shards.values():
            member.verify(share, shares)


# ------------------------------------------------------------------------------------------------------------- reading
@dataclass(frozen=True, slots=True)
class _Leaf:
    """The stretch of a run that was looked up last: finding it again for each of its rows would take milliseconds."""

    start: int
    groups: np.ndarray
    ranks: np.ndarray
    """How many rows of the same group come before each in the stretch."""
    before: np.ndarray
    """How many of each group come before the stretch."""


class MixedDataset:
    """Rows of `seq_len` tokens in the shares of a mixture: a `RowSource` whose epoch is the planned run.

    A row is from one group, and a group's rows come in the order of its own shuffled epochs. Groups of less than one
    row are left out (`left_out`). Beyond the planned run rows go on with further epochs of the groups, over all phases
    again. Memory: some kilobytes. Raises ValueError if nothing fills a row.
    """

    def __init__(self, shards: MixedShards, seq_len: int, seed: int = 0, *, attend_across: bool = False) -> None:
        self.shards, self.seq_len, self.seed = shards, seq_len, seed
        self.left_out = tuple(name for name, member in shards.shards.items() if member.num_tokens <= seq_len)
        self.names = tuple(name for name in shards.shards if name not in self.left_out)
        if not self.names:
            raise ValueError(
                f"no group of {shards.directory} has {seq_len + 1} tokens, one row; give more documents or shorter rows"
            )
        self.members = [
            PretrainDataset(shards.shards[name], seq_len, seed, attend_across=attend_across) for name in self.names
        ]
        self.source_names = self.names if len(self.names) > 1 else ()
        self._counts = [_rows_of(phase, self.names, seq_len) for phase in shards.phases]
        self._starts = np.cumsum([0, *(int(counts.sum()) for counts in self._counts)]).tolist()
        self._before = np.cumsum([np.zeros(len(self.names), np.int64), *self._counts], axis=0)
        self.num_rows = int(self._starts[-1])
        if self.num_rows == 0:
            raise ValueError(f"the mixture of {shards.directory} reads less than one row of {seq_len} tokens")
        self._leaf: _Leaf | None = None
        settings = f"{shards.fingerprint} {seq_len} {seed} {attend_across}"
        self.fingerprint = hashlib.sha256(settings.encode()).hexdigest()

    def row(self, epoch: int, index: int) -> PackedRow:
        """Row `index` of `epoch`, 0 <= index < num_rows."""
        group, place = self.place(index)
        place += epoch * int(self._before[-1][group])
        member = self.members[group]
        row = member.row(place // member.num_rows, place % member.num_rows)
        if not self.source_names:
            return row
        return PackedRow(
            tokens=row.tokens,
            targets=row.targets,
            loss_weights=row.loss_weights,
            seq_lens=row.seq_lens,
            sources=np.full(row.num_tokens, group, np.int16),
        )

    def place(self, index: int) -> tuple[int, int]:
        """Which group row `index` of the run is from, and how many rows of that group come before it."""
        assert 0 <= index < self.num_rows, f"row {index} of {self.num_rows}"
        leaf = self._leaf
        if leaf is None or not leaf.start <= index < leaf.start + len(leaf.groups):
            # One assignment, so that a prefetching thread and its owner always see a whole one.
            self._leaf = leaf = self._find_leaf(index)
        group = int(leaf.groups[index - leaf.start])
        return group, int(leaf.before[group] + leaf.ranks[index - leaf.start])

    def _find_leaf(self, index: int) -> _Leaf:
        phase = int(np.searchsorted(self._starts, index, side="right")) - 1
        start = self._starts[phase]
        first, counts, before = index - start, self._counts[phase], self._before[phase].copy()
        begin = 0
        # Down a binary tree over the phase's rows: each half has half of every group, give or take one row.
        while (total := int(counts.sum())) > _LEAF_ROWS:
            left = self._left_half(counts, phase, start + begin)
            size = int(left.sum())
            if first < size:
                counts = left
            else:
                first, begin, before, counts = first - size, begin + size, before + left, counts - left
        ordered = np.repeat(np.arange(len(counts)), counts)
        groups = ordered[permute(np.arange(total), total, self.seed, phase, start + begin)]
        ranks = np.empty(total, np.int64)
        for group in range(len(counts)):
            here = groups == group
            ranks[here] = np.arange(int(here.sum()))
        return _Leaf(start + begin, groups, ranks, before)

    def _left_half(self, counts: np.ndarray, phase: int, key: int) -> np.ndarray:
        """Rows of each group in the first half of a stretch: half of them, and of the groups with an odd number every
        other one has the odd row here, in an order drawn for this stretch."""
        odd = np.flatnonzero(counts % 2)
        left = counts // 2
        if len(odd):
            order = permute(np.arange(len(odd)), len(odd), self.seed, phase, key, 1)
            left[odd[order[: len(odd) // 2]]] += 1
        return left


def _rows_of(phase: Phase, names: Sequence[str], seq_len: int) -> np.ndarray:
    """Rows of each group by largest remainders, so that the phase has as many rows as its tokens fill: int64 [G]."""
    exact = np.array([phase.tokens.get(name, 0) / seq_len for name in names])
    counts = np.floor(exact).astype(np.int64)
    missing = int(exact.sum()) - int(counts.sum())
    order = np.argsort(-(exact - counts), kind="stable")
    counts[order[:missing]] += 1
    return counts
