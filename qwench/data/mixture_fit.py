"""From the losses of small models on sampled mixtures to shares: sampling, regression, minimisation, all in numpy.

    shares_NG = sample_shares(current_G, 16, concentration=20.0, min_share=0.01, seed=0)
    fit = fit_losses(shares_NG, losses_ND)                  # after a model was trained on each of them
    fit.loo_rmse_D                                          # how far it is from mixtures it has not seen
    best_G = best_shares(fit, weights_D, lower_G, upper_G)

The logarithm of a domain's loss is taken to be linear in the shares, or in their logarithms (a power law), whichever
predicts left-out mixtures better; ridge keeps few runs from being fitted too well. This is the idea of RegMix and of
data mixing laws with the simplest regression that shows its own error. Training is not done here
(`train.mixture_proxy`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Form = Literal["linear", "log"]
_RIDGES = 10.0 ** np.arange(-6.0, 2.5, 0.5)
_FLOOR = 1e-4  # of a share, before its logarithm is taken
_STARTS, _ITERATIONS = 12, 300


def sample_shares(current_G: np.ndarray, num: int, *, concentration: float, min_share: float, seed: int) -> np.ndarray:
    """Mixtures [num, G] around `current_G`, which is the first: Dirichlet(concentration x current), raised to
    `min_share` each. Raises ValueError if min_share leaves no room."""
    num_groups = len(current_G)
    if not 0 <= min_share * num_groups < 1:
        raise ValueError(
            f"min_share is {min_share:g}, which {num_groups} groups cannot all have; give less than "
            f"{1 / num_groups:.3g}"
        )
    rng = np.random.default_rng(seed)
    alphas = concentration * np.maximum(current_G / current_G.sum(), 1e-3)
    drawn = rng.dirichlet(alphas, max(0, num - 1))
    rows = min_share + (1 - min_share * num_groups) * drawn
    return np.concatenate([(current_G / current_G.sum())[None], rows])[:num]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossFit:
    """Predicts D losses from G shares, with what is known of its error."""

    forms: tuple[Form, ...]
    """How each domain's loss depends on the shares."""
    ridges: tuple[float, ...]
    intercepts_D: np.ndarray
    slopes_DG: np.ndarray
    left_out_ND: np.ndarray
    """Losses of each mixture as predicted from all the others. The form and the ridge were chosen by these, so their
    error is a little too small."""
    losses_ND: np.ndarray

    @property
    def loo_rmse_D(self) -> np.ndarray:
        """Root of the mean squared error of the left-out predictions."""
        return np.sqrt(np.mean((self.left_out_ND - self.losses_ND) ** 2, axis=0))

    def loo_r2(self, weights_D: np.ndarray) -> float:
        """Share of the weighted loss's variance that left-out predictions explain; 0 or less: they tell nothing."""
        told, seen = self.left_out_ND @ weights_D, self.losses_ND @ weights_D
        spread = float(np.sum((seen - seen.mean()) ** 2))
        return 1 - float(np.sum((told - seen) ** 2)) / spread if spread else 0.0

    def predict(self, shares_NG: np.ndarray) -> np.ndarray:
        """Losses [N, D]."""
        logs = [
            self.intercepts_D[place] + _features(shares_NG, form) @ self.slopes_DG[place]
            for place, form in enumerate(self.forms)
        ]
        return np.exp(np.stack(logs, axis=-1))

    def gradient(self, shares_G: np.ndarray, weights_D: np.ndarray) -> np.ndarray:
        """Of the weighted loss by the shares [G]."""
        losses_D = self.predict(shares_G[None])[0]
        total_G = np.zeros(len(shares_G))
        for place, form in enumerate(self.forms):
            slope_G = self.slopes_DG[place]
            if form == "log":
                slope_G = np.where(shares_G > _FLOOR, slope_G / np.maximum(shares_G, _FLOOR), 0.0)
            total_G += weights_D[place] * losses_D[place] * slope_G
        return total_G


def _features(shares_NG: np.ndarray, form: Form) -> np.ndarray:
    return shares_NG if form == "linear" else np.log(np.maximum(shares_NG, _FLOOR))


def fit_losses(shares_NG: np.ndarray, losses_ND: np.ndarray) -> LossFit:
    """Fit each column of `losses_ND` (positive). Raises ValueError for fewer than four mixtures."""
    if len(shares_NG) < 4:
        raise ValueError(f"{len(shares_NG)} mixtures tell nothing about others; train on at least 4")
    if not (np.isfinite(losses_ND).all() and (losses_ND > 0).all()):
        raise ValueError("a loss is not a positive number; look at the run it is from")
    forms: list[Form] = []
    columns: list[tuple[float, float, np.ndarray, np.ndarray]] = []
    for losses_N in losses_ND.T:
        best: tuple[float, Form, tuple[float, float, np.ndarray, np.ndarray]] | None = None
        for form in ("linear", "log"):
            for ridge in _RIDGES.tolist():
                fitted = _ridge(_features(shares_NG, form), np.log(losses_N), ridge)
                error = float(np.sqrt(np.mean((np.exp(fitted[3]) - losses_N) ** 2)))
                if best is None or error < best[0]:
                    best = error, form, fitted
        assert best is not None
        forms.append(best[1])
        columns.append(best[2])
    return LossFit(
        forms=tuple(forms),
        ridges=tuple(ridge for ridge, *_ in columns),
        intercepts_D=np.array([intercept for _, intercept, _, _ in columns]),
        slopes_DG=np.stack([slopes for _, _, slopes, _ in columns]),
        left_out_ND=np.exp(np.stack([left_out for *_, left_out in columns], axis=-1)),
        losses_ND=losses_ND,
    )


def _ridge(x_NG: np.ndarray, y_N: np.ndarray, ridge: float) -> tuple[float, float, np.ndarray, np.ndarray]:
    """(ridge, intercept, slopes [G], predictions of each row from all the others [N]).

    `ridge` is relative to the features' variance, and the intercept is free of it. For such a smoother the prediction
    without row i follows from the residual and the diagonal of the hat matrix.
    """
    mean_G = x_NG.mean(0)
    centred = x_NG - mean_G
    gram = centred.T @ centred
    strength = ridge * max(float(np.trace(gram)) / len(gram), 1e-12)
    solve = np.linalg.solve(gram + strength * np.eye(len(gram)), centred.T)
    slopes_G = solve @ (y_N - y_N.mean())
    leverage_N = 1 / len(y_N) + np.einsum("ng,gn->n", centred, solve)
    residual_N = y_N - y_N.mean() - centred @ slopes_G
    left_out_N = y_N - residual_N / np.maximum(1 - leverage_N, 1e-9)
    return ridge, float(y_N.mean() - mean_G @ slopes_G), slopes_G, left_out_N


# ---------------------------------------------------------------------------------------------------------- minimising
def best_shares(
    fit: LossFit, weights_D: np.ndarray, lower_G: np.ndarray, upper_G: np.ndarray, *, seed: int = 0
) -> np.ndarray:
    """Shares [G] between the bounds with the smallest weighted loss that `fit` predicts.

    Projected gradient descent from many starts, since power laws with a wrong sign are not convex. Raises ValueError
    for bounds between which no shares add up to 1.
    """
    if (lower_G > upper_G + 1e-12).any() or lower_G.sum() > 1 + 1e-9 or upper_G.sum() < 1 - 1e-9:
        raise ValueError(
            f"no shares that add up to 1 lie within the limits (in all {lower_G.sum():.3f} to {upper_G.sum():.3f}); "
            "allow more epochs, or fewer tokens"
        )
    rng = np.random.default_rng(seed)
    starts = [(lower_G + upper_G) / 2, *rng.dirichlet(np.ones(len(lower_G)), _STARTS - 1)]
    found = [_descend(fit, weights_D, _project(start, lower_G, upper_G), lower_G, upper_G) for start in starts]
    return min(found, key=lambda entry: entry[0])[1]


def _descend(
    fit: LossFit, weights_D: np.ndarray, shares_G: np.ndarray, lower_G: np.ndarray, upper_G: np.ndarray
) -> tuple[float, np.ndarray]:
    value = float(fit.predict(shares_G[None])[0] @ weights_D)
    step = 0.1
    for _ in range(_ITERATIONS):
        gradient_G = fit.gradient(shares_G, weights_D)
        scale = max(float(np.abs(gradient_G - gradient_G.mean()).max()), 1e-12)
        moved_G = _project(shares_G - step * gradient_G / scale, lower_G, upper_G)
        moved = float(fit.predict(moved_G[None])[0] @ weights_D)
        if moved < value:
            converged = value - moved < 1e-10 * value
            shares_G, value, step = moved_G, moved, min(step * 1.5, 0.5)
            if converged:
                break
        else:
            step /= 2
            if step < 1e-7:
                break
    return value, shares_G


def _project(point_G: np.ndarray, lower_G: np.ndarray, upper_G: np.ndarray) -> np.ndarray:
    """The nearest shares within the bounds that add up to 1: a common shift, found by bisection."""
    low, high = float((point_G - upper_G).min()) - 1, float((point_G - lower_G).max()) + 1
    for _ in range(50):
        middle = (low + high) / 2
        if np.clip(point_G - middle, lower_G, upper_G).sum() > 1:
            low = middle
        else:
            high = middle
    return np.clip(point_G - (low + high) / 2, lower_G, upper_G)
