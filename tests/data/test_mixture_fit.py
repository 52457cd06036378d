"""Regression of losses on shares and its minimum, on losses whose best mixture is known."""

import numpy as np
import pytest

from qwench.data.mixture_fit import best_shares, fit_losses, sample_shares

CURRENT = np.array([0.6, 0.3, 0.1])
FACTORS, POWER = np.array([2.0, 3.0, 1.5]), 0.1
EVEN = np.ones(3) / 3


def power_law(shares: np.ndarray) -> np.ndarray:
    """Each domain's loss falls with a power of its own share."""
    return FACTORS * shares**-POWER


def test_samples_are_mixtures_around_the_current_one():
    shares = sample_shares(CURRENT, 400, concentration=50, min_share=0.02, seed=3)
    assert shares.shape == (400, 3)
    assert shares.sum(1) == pytest.approx(1)
    assert shares[0] == pytest.approx(CURRENT)
    assert shares.min() >= 0.02
    assert shares.mean(0) == pytest.approx(0.02 + 0.94 * CURRENT, abs=0.02)
    near = sample_shares(CURRENT, 400, concentration=500, min_share=0.02, seed=3)
    assert near.std(0).max() < shares.std(0).min()
    assert (sample_shares(CURRENT, 400, concentration=50, min_share=0.02, seed=3) == shares).all()
    with pytest.raises(ValueError, match="min_share is"):
        sample_shares(CURRENT, 4, concentration=50, min_share=0.4, seed=0)


def test_the_known_optimum_of_power_laws_is_found():
    """sum_d a_d s_d^-b is least where s_d is in proportion to a_d^(1 / (1 + b))."""
    shares = sample_shares(CURRENT, 24, concentration=10, min_share=0.02, seed=0)
    fit = fit_losses(shares, power_law(shares))
    assert set(fit.forms) == {"log"}
    assert fit.loo_rmse_D.max() < 1e-4
    assert fit.loo_r2(EVEN) > 0.999
    best = FACTORS ** (1 / (1 + POWER))
    found = best_shares(fit, EVEN, np.full(3, 0.02), np.full(3, 0.9))
    assert found == pytest.approx(best / best.sum(), abs=1e-3)
    # With one share held at a limit the other two divide the rest as before.
    limited = best_shares(fit, EVEN, np.full(3, 0.02), np.array([0.9, 0.35, 0.9]))
    assert limited[1] == pytest.approx(0.35)
    assert limited[0] / limited[2] == pytest.approx(best[0] / best[2], rel=0.01)
    one = best_shares(fit, np.array([0.0, 0.0, 1.0]), np.full(3, 0.02), np.full(3, 0.9))
    assert one == pytest.approx([0.02, 0.08, 0.9], abs=0.07)
    assert one[2] == pytest.approx(0.9)


def test_losses_linear_in_the_shares_are_recognised():
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(4), 30)
    slopes = np.array([[-0.3, 0.1, 0.0, 0.2], [0.2, -0.4, 0.1, 0.1]])
    fit = fit_losses(shares, np.exp(1 + shares @ slopes.T))
    assert fit.forms == ("linear", "linear")
    assert fit.predict(np.eye(4)) == pytest.approx(np.exp(1 + slopes.T), rel=1e-3)
    assert best_shares(fit, np.array([1.0, 0.0]), np.zeros(4), np.ones(4)) == pytest.approx([1, 0, 0, 0], abs=1e-6)


def test_left_out_predictions_are_those_of_fits_without_the_mixture():
    rng = np.random.default_rng(5)
    shares = sample_shares(CURRENT, 12, concentration=10, min_share=0.02, seed=1)
    losses = power_law(shares) * np.exp(rng.normal(0, 0.02, (12, 3)))
    fit = fit_losses(shares, losses)
    for place, (form, ridge) in enumerate(zip(fit.forms, fit.ridges, strict=True)):
        features = shares if form == "linear" else np.log(shares)
        centred = features - features.mean(0)
        strength = ridge * np.trace(centred.T @ centred) / 3
        for row in range(12):
            x, y = np.delete(features, row, 0), np.delete(np.log(losses[:, place]), row)
            design = np.hstack([np.ones((11, 1)), x])
            penalty = np.diag([0.0, *[strength] * 3])
            weights = np.linalg.solve(design.T @ design + penalty, design.T @ y)
            expected = np.exp(weights[0] + features[row] @ weights[1:])
            assert fit.left_out_ND[row, place] == pytest.approx(expected, rel=1e-6)


def test_noise_without_signal_is_not_mistaken_for_knowledge():
    rng = np.random.default_rng(2)
    shares = rng.dirichlet(np.ones(5), 20)
    fit = fit_losses(shares, np.exp(rng.normal(1, 0.05, (20, 5))))
    assert fit.loo_r2(np.ones(5) / 5) < 0.3


def test_what_cannot_be_fitted_or_met_is_refused():
    shares = sample_shares(CURRENT, 8, concentration=10, min_share=0.02, seed=0)
    fit = fit_losses(shares, power_law(shares))
    with pytest.raises(ValueError, match="at least 4"):
        fit_losses(shares[:3], power_law(shares[:3]))
    with pytest.raises(ValueError, match="not a positive number"):
        fit_losses(shares, np.full((8, 3), np.nan))
    with pytest.raises(ValueError, match="add up to 1"):
        best_shares(fit, EVEN, np.zeros(3), np.full(3, 0.3))
