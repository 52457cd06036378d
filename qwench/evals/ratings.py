"""Figures from pairwise judgements: win rates, Bradley-Terry ratings, and what length has to do with them.

A game is (first, second, outcome): 1 if the first model's answer was preferred, 0 if the second's, 0.5 for a tie.
Errors come from resampling questions, since the games of one question (two turns, several opponents) are not
independent. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
ELO = 400 / math.log(10)
"""Points of the Elo scale for one unit of log-strength: 400 points are odds of ten to one."""
VIRTUAL_GAMES = 1.0
"""Ties that every pair of models is credited with, so that a model that has won every game has a rating."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Game:
    """`Game(question="81", first="new", second="old", outcome=1.0, first_length=900, second_length=400)`"""

    question: str
    first: str
    second: str
    outcome: float
    """Of the first: 1 won, 0 lost, 0.5 a tie."""
    first_length: int = 0
    second_length: int = 0
    """Characters of the two answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """`Estimate(value=0.61, low=0.52, high=0.70)`: a figure with its 95 % interval."""

    value: float
    low: float
    high: float


def win_rate(games: Sequence[Game], resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Of the first models, ties counting half."""
    outcomes = np.array([game.outcome for game in games])
    parts, counts = _by_question(games)
    sums = np.array([outcomes[part].sum() for part in parts])
    drawn = np.random.default_rng(seed).multinomial(len(parts), np.full(len(parts), 1 / len(parts)), resamples)
    return _estimate(float(outcomes.mean()), drawn @ sums / (drawn @ counts))


def bradley_terry(
    games: Sequence[Game], anchor: str, anchor_rating: float = 1000.0, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Estimate]:
    """Ratings on the Elo scale, `anchor` at `anchor_rating` [Bradley & Terry 1952; Hunter 2004]; a tie is half a win.

    Raises ValueError for models that no chain of games connects with the anchor.
    """
    names = sorted({name for game in games for name in (game.first, game.second)})
    if anchor not in names:
        raise ValueError(f"{anchor} has played no game; choose one of {', '.join(names)}")
    place = {name: at for at, name in enumerate(names)}
    parts, _ = _by_question(games)
    wins_QNN = np.zeros((len(parts), len(names), len(names)))  # [question, winner, loser]
    for question, part in enumerate(parts):
        for game in (games[at] for at in part):
            i, j = place[game.first], place[game.second]
            wins_QNN[question, i, j] += game.outcome
            wins_QNN[question, j, i] += 1 - game.outcome
    total_NN = wins_QNN.sum(0)
    _refuse_islands(total_NN, names, anchor)
    met_NN = (total_NN + total_NN.T) > 0
    drawn = np.random.default_rng(seed).multinomial(len(parts), np.full(len(parts), 1 / len(parts)), resamples)
    samples_RNN = np.einsum("rq,qij->rij", drawn, wins_QNN)
    strengths_RN = _strengths(np.concatenate([total_NN[None], samples_RNN]) + met_NN * VIRTUAL_GAMES / 2)
    ratings = anchor_rating + ELO * (strengths_RN - strengths_RN[:, place[anchor], None])
    return {name: _estimate(float(ratings[0, at]), ratings[1:, at]) for name, at in place.items()}


def length_controlled(games: Sequence[Game]) -> tuple[float, float] | None:
    """The win rate of the first models if both answers were equally long, and how many times the odds of winning change
    for an answer that is longer by one standard deviation; None where lengths do not vary.

    A logistic regression of the outcome on tanh(difference of lengths / its deviation), as in length-controlled
    AlpacaEval [Dubois et al. 2024] with one model pair and no question difficulty.
    """
    lengths = np.array([game.first_length - game.second_length for game in games], np.float64)
    outcomes = np.array([game.outcome for game in games])
    if len(games) < 3 or lengths.std() == 0:
        return None
    x = np.tanh(lengths / lengths.std())
    design = np.stack([np.ones_like(x), x], 1)
    weights = np.zeros(2)
    ridge = np.diag([1e-3, 1e-3])  # keeps a model that has won everything finite
    for _ in range(100):
        p = 1 / (1 + np.exp(-design @ weights))
        step = np.linalg.solve(
            (design * (p * (1 - p))[:, None]).T @ design + ridge, design.T @ (outcomes - p) - ridge @ weights
        )
        step *= min(1.0, 2.0 / max(1e-9, float(np.abs(step).max())))
        weights += step
        if np.abs(step).max() < 1e-10:
            break
    return float(1 / (1 + math.exp(-weights[0]))), float(math.exp(weights[1] * math.tanh(1.0)))


def _strengths(wins_RNN: np.ndarray) -> np.ndarray:
    """Log-strengths of largest likelihood [R, N] of wins [R, winner, loser], by Hunter's MM iteration."""
    games_RNN = wins_RNN + wins_RNN.transpose(0, 2, 1)
    won_RN = wins_RNN.sum(2)
    p_RN = np.ones(won_RN.shape)
    for _ in range(5000):
        shares = games_RNN / (p_RN[:, :, None] + p_RN[:, None, :])
        new = won_RN / shares.sum(2)
        new /= np.exp(np.log(new).mean(1, keepdims=True))
        moved = np.abs(np.log(new / p_RN)).max()
        p_RN = new
        if moved < 1e-9:
            break
    return np.log(p_RN)


def _refuse_islands(wins_NN: np.ndarray, names: Sequence[str], anchor: str) -> None:
    met = (wins_NN + wins_NN.T) > 0
    reached = np.array([name == anchor for name in names])
    while True:
        further = reached | met[reached].any(0)
        if (further == reached).all():
            break
        reached = further
    if not reached.all():
        alone = ", ".join(name for name, is_in in zip(names, reached, strict=True) if not is_in)
        raise ValueError(f"no games connect {alone} with {anchor}; compare them with it, or with a model that was")


def _by_question(games: Sequence[Game]) -> tuple[list[list[int]], np.ndarray]:
    found: dict[str, list[int]] = {}
    for at, game in enumerate(games):
        found.setdefault(game.question, []).append(at)
    parts = list(found.values())
    return parts, np.array([len(part) for part in parts])


def _estimate(value: float, drawn: np.ndarray) -> Estimate:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(value=value, low=float(low), high=float(high))
