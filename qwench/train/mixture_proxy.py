"""`qwench mixture`: weights for a mixture from small models trained on variants of it.

    OUT/shards-.../         the groups' documents divided into those to train on and those to measure on
    OUT/runs/NN-.../        one run of `qwench pretrain` a mixture, and losses.json
    OUT/proposal.toml       the proposed shares as a piece of a data recipe
    OUT/proposal.json       everything measured and predicted

Mixtures are drawn around the current one, which is the first. Each proxy trains on the tokens of its mixture and is
measured on held-out documents of every group; a regression on the shares (`data.mixture_fit`) then says which shares
should give the least weighted loss, never outside the range that was tried. Groups are cut so that a proxy repeats
documents as often as the real run would. The same command goes on after an interruption: what is trained is not
trained again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwench import config
from qwench.config import to_dict
from qwench.data.mixture import MIXTURE, MixedShards, MixtureConfig, plan_mixture, write_mixture
from qwench.data.mixture_fit import LossFit, best_shares, fit_losses, sample_shares
from qwench.data.packing import PretrainDataset
from qwench.data.pipeline.tokens import folder_names
from qwench.data.shards import ShardWriter, TokenShards
from qwench.model.config import ModelConfig
from qwench.model.load import load_model
from qwench.ops.hardware import pick_device
from qwench.run import console, write_atomically
from qwench.tokenizer import Tokenizer
from qwench.train.batch import make_batch
from qwench.train.config import CheckpointConfig, LoopConfig, OptimConfig, PretrainConfig, ScheduleConfig, StartConfig
from qwench.train.loss import next_token_losses
from qwench.train.pretrain import pretrain

LOSSES = "losses.json"


@config.config
class MixtureProxyConfig:
    """Propose shares for the groups of a mixture from proxy runs."""

    out: Path
    """Directory of the proxies and the proposal; running again goes on."""
    data: Path
    """The mixture: OUT/shards/train of qwench data."""
    tokenizer: Path
    """Tokenizer directory that made the shards."""
    runs: int = 16
    """Mixtures to train on, the current one included. At least two more than there are groups are sensible."""
    concentration: float = 20.0
    """How near the sampled mixtures are to the current one: a share s varies by about
    sqrt(s (1 - s) / concentration)."""
    min_share: float = 0.01
    """Of every group in every sampled mixture."""
    tokens: int | None = None
    """Tokens of the run that is planned; unset: those of the mixture. Decides how often groups repeat."""
    max_epochs: float = 4.0
    """How often a document may be read in the planned run."""
    max_group_epochs: dict[str, float] = field(default_factory=dict)
    """Group -> its own limit."""
    loss_weights: dict[str, float] = field(default_factory=dict)
    """Group -> weight of its loss in what is minimised; unnamed groups have weight 0. Empty: all alike."""
    val_tokens: int = 65_536
    """Tokens of each group to measure on, at most a tenth of the group."""
    confirm: bool = True
    """Train one more proxy, on the proposal, and compare it with the one on the current mixture."""
    seed: int = 0
    """Of the sampled mixtures."""
    seq_len: int = 256
    attend_across: bool = False
    """As in the planned run."""
    model: StartConfig = StartConfig(
        config=ModelConfig(
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )
    """The proxy."""
    loop: LoopConfig = LoopConfig(steps=400, batch_rows=32, eval_every=0)
    """Steps of a proxy, its batch, device and seed; all proxies start from the same weights."""
    optim: OptimConfig = OptimConfig(lr=2e-3)
    schedule: ScheduleConfig = ScheduleConfig(warmup_share=0.05)

    def __post_init__(self) -> None:
        if self.runs < 4:
            raise ValueError(f"runs is {self.runs}; give at least 4")
        if self.loop.steps is None:
            raise ValueError("a proxy's length is loop.steps; give it instead of loop.epochs")
        if self.concentration <= 0 or self.val_tokens < 1 or self.seq_len < 1:
            raise ValueError("concentration, val_tokens and seq_len are positive numbers")
        if any(weight < 0 for weight in self.loss_weights.values()):
            raise ValueError("loss_weights has a negative weight")

    @property
    def proxy_tokens(self) -> int:
        """Tokens that a proxy trains on."""
        return (self.loop.steps or 0) * self.loop.batch_rows * self.seq_len


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyRun:
    """A trained proxy: shares of its tokens [G] and losses on every group [G], nats per token."""

    shares: np.ndarray
    losses: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What came out. Arrays have an entry a group; the current mixture is the first of `runs`."""

    groups: tuple[str, ...]
    by: tuple[str, ...]
    runs: tuple[ProxyRun, ...]
    fit: LossFit
    weights: np.ndarray
    shares: np.ndarray
    epochs: np.ndarray
    """How often the planned run would read each group."""
    confirmed: ProxyRun | None

    @property
    def predicted_gain(self) -> float:
        """Weighted loss that the proposal saves against the current mixture, as the regression says."""
        now, then = self.fit.predict(np.stack([self.runs[0].shares, self.shares])) @ self.weights
        return float(now - then)

    @property
    def measured_gain(self) -> float | None:
        if self.confirmed is None:
            return None
        return float((self.runs[0].losses - self.confirmed.losses) @ self.weights)

    @property
    def error(self) -> float:
        """Root mean squared error of the weighted loss for mixtures that the regression has not seen."""
        return float(np.sqrt(np.mean(((self.fit.left_out_ND - self.fit.losses_ND) @ self.weights) ** 2)))

    def describe(self) -> str:
        """A table for people, and what to think of it."""
        current, width = self.runs[0], max(6, *map(len, self.groups))
        told = self.fit.predict(np.stack([current.shares, self.shares]))
        lines = [
            f"{'group':<{width}} {'current':>8} {'proposed':>8} {'epochs':>7} {'weight':>7} {'loss':>7} "
            f"{'predicted':>9} {'measured':>9} {'LOO error':>9} {'spread':>7}  form"
        ]
        measured = self.confirmed.losses if self.confirmed is not None else None
        for g, group in enumerate(self.groups):
            seen = f"{measured[g]:>9.4f}" if measured is not None else f"{'':>9}"
            lines.append(
                f"{group:<{width}} {current.shares[g]:>8.2%} {self.shares[g]:>8.2%} {self.epochs[g]:>7.2f} "
                f"{self.weights[g]:>7.3f} {current.losses[g]:>7.4f} {told[1, g]:>9.4f} {seen} "
                f"{self.fit.loo_rmse_D[g]:>9.4f} {self.fit.losses_ND[:, g].std():>7.4f}  {self.fit.forms[g]}"
            )
        lines.append(
            f"weighted loss: {float(current.losses @ self.weights):.4f} now; predicted to fall by "
            f"{self.predicted_gain:.4f} with an error of {self.error:.4f} for unseen mixtures (R2 of left-out "
            f"mixtures {self.fit.loo_r2(self.weights):.2f}, {len(self.runs)} runs)"
        )
        gain = self.measured_gain
        if gain is not None:
            lines.append(f"measured by a proxy on the proposal: it falls by {gain:.4f}")
        lines.append(self.verdict)
        return "\n".join(lines)

    @property
    def verdict(self) -> str:
        gain = self.measured_gain
        if gain is not None and gain <= 0:
            return "The proposal is no better than the current mixture: keep that, or train more or longer proxies."
        if self.predicted_gain <= self.error:
            return "What is predicted is not larger than the regression's error: more runs would tell more."
        return "The proposal is better than the current mixture at the proxies' size; a larger model may differ."


def propose(cfg: MixtureProxyConfig) -> Proposal:
    """Train the proxies that are missing and propose shares; writes OUT/proposal.toml and .json.

    Raises ValueError for groups that are too small, for weights of unknown groups, and where `pretrain` does.
    """
    tokenizer = Tokenizer.load(cfg.tokenizer)
    mixture = MixedShards.open(cfg.data, tokenizer.fingerprint)
    groups = tuple(mixture.shards)
    if len(groups) < 2:
        raise ValueError(f"{cfg.data} has one group ({', '.join(groups)}); mixture.by of the data recipe makes several")
    weights = _weights(cfg, groups)
    current = np.array([sum(phase.tokens.get(group, 0) for phase in mixture.phases) for group in groups], np.float64)
    planned = cfg.tokens or int(current.sum())
    room = _divide(cfg, mixture, planned)
    drawn = sample_shares(current, cfg.runs, concentration=cfg.concentration, min_share=cfg.min_share, seed=cfg.seed)
    runs = []
    for number, shares in enumerate(drawn):
        console.print(f"mixture {number + 1} of {cfg.runs}: {_shown(groups, shares)}")
        runs.append(_train(cfg, room, groups, f"{number:02d}", shares))
    fit = fit_losses(np.stack([run.shares for run in runs]), np.stack([run.losses for run in runs]))
    tried = np.stack([run.shares for run in runs])
    available = np.array([mixture.shards[group].num_tokens for group in groups], np.float64)
    limits = np.array([cfg.max_group_epochs.get(group, cfg.max_epochs) for group in groups])
    upper = np.minimum(tried.max(0), limits * available / planned)
    lower = np.minimum(tried.min(0), upper)
    shares = best_shares(fit, weights, lower, upper, seed=cfg.seed)
    confirmed = None
    if cfg.confirm:
        console.print(f"the proposal: {_shown(groups, shares)}")
        confirmed = _train(cfg, room, groups, "proposal", shares)
    settings = json.loads((cfg.data / MIXTURE).read_bytes())["settings"]
    proposal = Proposal(
        groups=groups,
        by=tuple(settings.get("by", ("kind",))),
        runs=tuple(runs),
        fit=fit,
        weights=weights,
        shares=shares,
        epochs=shares * planned / available,
        confirmed=confirmed,
    )
    _write(cfg.out, proposal)
    return proposal


def _weights(cfg: MixtureProxyConfig, groups: Sequence[str]) -> np.ndarray:
    if unknown := sorted({*cfg.loss_weights, *cfg.max_group_epochs} - set(groups)):
        raise ValueError(
            f"there is no group {', '.join(map(repr, unknown))} in the mixture, which has {', '.join(groups)}"
        )
    weights = np.array([cfg.loss_weights.get(group, 0.0 if cfg.loss_weights else 1.0) for group in groups])
    if weights.sum() <= 0:
        raise ValueError("all loss_weights are 0; give one group a positive weight")
    return weights / weights.sum()


def _shown(groups: Sequence[str], shares: np.ndarray) -> str:
    return ", ".join(f"{group} {share:.1%}" for group, share in zip(groups, shares.tolist(), strict=True))


# ---------------------------------------------------------------------------------------------------------------- data
@dataclass(frozen=True, slots=True)
class _Room:
    """The divided shards: folders of each group, and their tokens to train on."""

    name: str
    train: dict[str, Path]
    val: dict[str, Path]
    available: dict[str, int]


def _divide(cfg: MixtureProxyConfig, mixture: MixedShards, planned: int) -> _Room:
    """Held-out documents of each group, and as large a part of the others as a proxy is of the planned run."""
    ratio = min(1.0, cfg.proxy_tokens / planned)
    wanted: dict[str, tuple[int, int]] = {}
    for group, shards in mixture.shards.items():
        val = min(cfg.val_tokens, shards.num_tokens // 10)
        wanted[group] = val, max(int(ratio * shards.num_tokens), 4 * cfg.seq_len)
    mark = _digest({"fingerprint": mixture.fingerprint, "wanted": wanted})
    root = cfg.out / f"shards-{mark}"
    folders = folder_names(list(wanted))
    if not root.is_dir():
        partial = cfg.out / f".shards-{mark}.{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        for group, shards in mixture.shards.items():
            _copy(shards, partial, folders[group], group, wanted[group], cfg.seq_len)
        os.replace(partial, root)
    train = {group: root / "train" / folders[group] for group in wanted}
    val = {group: root / "val" / folders[group] for group in wanted}
    return _Room(mark, train, val, {group: TokenShards.open(path).num_tokens for group, path in train.items()})


def _copy(shards: TokenShards, root: Path, folder: str, group: str, wanted: tuple[int, int], seq_len: int) -> None:
    """Documents come in the order of their hashes, so the first are a sample like any other."""
    number = 0
    for side, limit in zip(("val", "train"), wanted, strict=True):
        with ShardWriter(
            root / side / folder,
            tokenizer_fingerprint=shards.tokenizer_fingerprint,
            vocab_size=shards.vocab_size,
            config={"group": group, "side": side},
        ) as writer:
            while writer.num_tokens < max(limit, seq_len + 1) and number < shards.num_documents:
                writer.add(shards.document(number))
                number += 1
            if writer.num_tokens <= seq_len:
                raise ValueError(
                    f"the group {group!r} has too few documents ({shards.num_documents}, {shards.num_tokens:,} tokens) "
                    f"to train and to measure on rows of {seq_len}; give a smaller seq_len, or leave the group out"
                )


# ------------------------------------------------------------------------------------------------------------- proxies
def _train(cfg: MixtureProxyConfig, room: _Room, groups: Sequence[str], name: str, shares: np.ndarray) -> ProxyRun:
    """Train and measure a proxy, or read what an earlier call measured."""
    mixing = MixtureConfig(
        shares=dict(zip(groups, (np.floor(shares * 1e9) / 1e9).tolist(), strict=True)),
        tokens=cfg.proxy_tokens,
        max_epochs=cfg.max_epochs,
        max_group_epochs=cfg.max_group_epochs,
    )
    plan = plan_mixture(room.available, mixing)
    tokens = np.array([plan.tokens[group] for group in groups], np.float64)
    proxy = {name: to_dict(getattr(cfg, name)) for name in ("model", "loop", "optim", "schedule")}
    proxy |= {"seq_len": cfg.seq_len, "attend_across": cfg.attend_across, "tokens": plan.tokens, "data": room.name}
    out = cfg.out / "runs" / f"{name}-{_digest(proxy)}"
    if not (out / LOSSES).is_file():
        (out / "mixture").mkdir(parents=True, exist_ok=True)
        folders = {group: os.path.relpath(room.train[group], out / "mixture") for group in groups}
        write_mixture(out / "mixture", plan, folders, {"proxy": True})
        pretrain(_recipe(cfg, out))
        losses = _measure(cfg, out, room, groups)
        write_atomically(out / LOSSES, json.dumps(losses, indent=1) + "\n")
    losses = json.loads((out / LOSSES).read_bytes())
    return ProxyRun(shares=tokens / tokens.sum(), losses=np.array([losses[group] for group in groups]))


def _recipe(cfg: MixtureProxyConfig, out: Path) -> PretrainConfig:
    assert cfg.loop.steps is not None
    return PretrainConfig(
        out=out / "run",
        model=cfg.model,
        tokenizer=cfg.tokenizer,
        train_shards=out / "mixture",
        verify_shards=False,
        seq_len=cfg.seq_len,
        attend_across=cfg.attend_across,
        loop=cfg.loop,
        optim=cfg.optim,
        schedule=cfg.schedule,
        checkpoint=CheckpointConfig(every_steps=max(1, cfg.loop.steps // 2), keep_last=1, keep_best=False),
    )


@torch.no_grad()
def _measure(cfg: MixtureProxyConfig, out: Path, room: _Room, groups: Sequence[str]) -> dict[str, float]:
    """Nats per token on the held-out documents of every group."""
    device = pick_device(cfg.loop.device)
    model = load_model(out / "run", device)
    losses = {}
    for group in groups:
        source = PretrainDataset(TokenShards.open(room.val[group]), cfg.seq_len, 0, attend_across=cfg.attend_across)
        total = weight = 0.0
        for first in range(0, source.num_rows, cfg.loop.batch_rows):
            rows = [source.row(0, i) for i in range(first, min(first + cfg.loop.batch_rows, source.num_rows))]
            batch = make_batch(rows, device)
            total += float(next_token_losses(model, batch)[0])
            weight += float(sum(row.loss_weights.sum(dtype=np.float64) for row in rows))
        losses[group] = total / weight
    return losses


def _digest(table: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True, default=str).encode()).hexdigest()[:12]


# -------------------------------------------------------------------------------------------------------------- output
def _write(out: Path, proposal: Proposal) -> None:
    shares = np.floor(proposal.shares * 1e4) / 1e4
    comment = "".join(f"# {line}\n" for line in proposal.describe().splitlines())
    fragment = config.dump(
        _Fragment(
            mixture=_Shares(
                by=proposal.by, shares=dict(zip(proposal.groups, [round(s, 4) for s in shares.tolist()], strict=True))
            )
        )
    )
    usage = (
        "# Use: qwench data RECIPE.toml THIS.toml, with a recipe that has no mixture.weights and phases of its own.\n"
    )
    write_atomically(out / "proposal.toml", comment + usage + fragment)
    told = proposal.fit.predict(np.stack([proposal.runs[0].shares, proposal.shares]))
    table = {
        "groups": list(proposal.groups),
        "runs": [{"shares": run.shares.tolist(), "losses": run.losses.tolist()} for run in proposal.runs],
        "loss_weights": proposal.weights.tolist(),
        "shares": proposal.shares.tolist(),
        "epochs": proposal.epochs.tolist(),
        "predicted_now": told[0].tolist(),
        "predicted": told[1].tolist(),
        "measured": proposal.confirmed.losses.tolist() if proposal.confirmed is not None else None,
        "forms": list(proposal.fit.forms),
        "ridges": list(proposal.fit.ridges),
        "loo_rmse": proposal.fit.loo_rmse_D.tolist(),
        "loo_r2": proposal.fit.loo_r2(proposal.weights),
        "predicted_gain": proposal.predicted_gain,
        "measured_gain": proposal.measured_gain,
    }
    write_atomically(out / "proposal.json", json.dumps(table, indent=1, ensure_ascii=False) + "\n")


@config.config
class _Shares:
    by: tuple[str, ...]
    shares: dict[str, float]


@config.config
class _Fragment:
    mixture: _Shares


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="qwench mixture",
        description="Train small models on mixtures around the current one, fit their losses by the shares, and "
        "propose shares that minimise a weighted loss. Writes OUT/proposal.toml, a piece of a data recipe.",
        epilog="All keys with their defaults: qwench config show mixture. Example: qwench mixture out=proxies "
        "data=run/shards/train tokenizer=DIR runs=24 loop.steps=500",
    )
    parser.add_argument(
        "recipe", nargs="+", help="TOML files, merged left to right, and key=value overrides in TOML grammar"
    )
    cfg = config.load(MixtureProxyConfig, parser.parse_args(argv).recipe)
    proposal = propose(cfg)
    print(f"{proposal.describe()}\nproposal: {cfg.out / 'proposal.toml'}")
    return 0
