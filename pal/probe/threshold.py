"""Psychometric threshold: where accuracy against a stimulus parameter crosses 75 %."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.75
"""Accuracy at the threshold: half way from chance (1/2) to 1."""
RESAMPLES = 500
"""Number of bootstrap samples."""

_LAPSES = np.array([0.01, 0.03, 0.06, 0.1, 0.15, 0.2])
"""Lapse rates of the fit: shares of wrong answers to the easiest questions; below 1 - LEVEL, so that there is a
crossing."""
_PLACES, _SLOPES = 181, 14
"""Sizes of the grid of thresholds and of slopes."""
_ALIKE = 0.05
"""Negligible difference of two log-likelihoods."""
_CHUNK = 50
"""Number of bootstrap samples fitted at once, to limit memory."""

Counts = NDArray[np.float64]


@dataclass(frozen=True)
class Threshold:
    """Value of the parameter at which accuracy crosses `LEVEL`."""

    at: float | None
    """Threshold in the unit of the sweep; None if accuracy does not cross inside the sweep (see `says`)."""
    ci95: tuple[float, float] | None
    """Percentile bootstrap interval, extended to contain `at` and limited to the sweep."""
    crossing: float
    """Share of the bootstrap samples with a crossing inside the sweep."""
    says: str
    """Result in words."""


def threshold(points: Sequence[float], right_UP: Counts, asked_UP: Counts, seed: int = 0) -> Threshold:
    """Fit `accuracy(x) = 1/2 + (1/2 - lapse) logistic((x - middle) / slope)` by maximum likelihood.

    This is the usual psychometric function of a two-alternative choice (Wichmann & Hill 2001), rising with x. The
    likelihood is maximised over a grid of thresholds, slopes and lapse rates, so no initial values are needed. If
    accuracy jumps between two points, all thresholds between them are about equally likely: their middle is returned,
    and the interval contains all of them.

    Args:
        points: x of the P points of the sweep, in rising order.
        right_UP: number of right answers of each of U units, the clusters of the bootstrap, at each point.
        asked_UP: number of questions of each unit at each point.
        seed: seed of the bootstrap.
    """
    x_P = np.asarray(points, dtype=float)
    low, high = float(x_P[0]), float(x_P[-1])
    at_X, logs_PX, wrongs_PX = _grid(x_P)
    best = _fit(right_UP.sum(0, keepdims=True), asked_UP.sum(0, keepdims=True), at_X, logs_PX, wrongs_PX)[0].mean()
    rng = np.random.default_rng(seed)
    units = len(right_UP)
    weights_RU = rng.multinomial(units, np.full(units, 1 / units), size=RESAMPLES).astype(float)
    drawn = [
        _fit(part_RU @ right_UP, part_RU @ asked_UP, at_X, logs_PX, wrongs_PX)
        for part_RU in np.array_split(weights_RU, -(-RESAMPLES // _CHUNK))
    ]
    drawn_R2 = np.concatenate(drawn)
    crossing = float(np.mean((drawn_R2.mean(1) >= low) & (drawn_R2.mean(1) <= high)))
    if not low <= best <= high:
        side = "above" if best < low else "below"
        return Threshold(None, None, crossing, f"no crossing: {side} {LEVEL:.0%} from {low:g} to {high:g}")
    ends = np.clip([np.quantile(drawn_R2[:, 0], 0.025), np.quantile(drawn_R2[:, 1], 0.975)], low, high)
    # with few units many samples do not cross, so both quantiles may lie on one side of the threshold
    ci95 = min(float(ends[0]), float(best)), max(float(ends[1]), float(best))
    return Threshold(float(best), ci95, crossing, "crosses")


def _grid(x_P: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Thresholds [X] of X parameter sets, and log probabilities of right and of wrong answers at each point, [P, X]."""
    span = float(x_P[-1] - x_P[0])
    # beyond both ends, for curves without a crossing in the sweep
    places = np.linspace(x_P[0] - span / 2, x_P[-1] + span / 2, _PLACES)
    slopes = np.geomspace(span / 400, span / 2, _SLOPES)
    at, slope, lapse = (axis.ravel() for axis in np.meshgrid(places, slopes, _LAPSES, indexing="ij"))
    share = (LEVEL - 0.5) / (0.5 - lapse)
    z_PX = (x_P[:, None] - at) / slope + np.log(share / (1 - share))
    right_PX = 0.5 + (0.5 - lapse) / (1 + np.exp(-np.clip(z_PX, -60, 60)))
    return at, np.log(right_PX), np.log1p(-right_PX)


def _fit(
    right_RP: Counts, asked_RP: Counts, at_X: NDArray[Any], logs_PX: NDArray[Any], wrongs_PX: NDArray[Any]
) -> NDArray[np.float64]:
    """Lowest and highest threshold of maximum likelihood for each of R data sets -> [R, 2]."""
    likelihood_RX = right_RP @ logs_PX + (asked_RP - right_RP) @ wrongs_PX
    best_RX = likelihood_RX >= likelihood_RX.max(1, keepdims=True) - _ALIKE
    # the thresholds rise along the grid
    first_R, last_R = best_RX.argmax(1), best_RX.shape[1] - 1 - best_RX[:, ::-1].argmax(1)
    return np.stack([at_X[first_R], at_X[last_R]], axis=1)
