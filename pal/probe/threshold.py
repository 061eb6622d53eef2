"""Where a curve of accuracy against difficulty crosses 75 %: a psychometric function fitted to counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.75
"""Accuracy at the threshold: half way from chance (1/2) to 1."""
RESAMPLES = 500

_LAPSES = np.array([0.01, 0.03, 0.06, 0.1, 0.15, 0.2])
"""Shares of questions answered wrong however easy they are; below 1 - LEVEL, or there would be no crossing."""
_PLACES, _SLOPES = 181, 14
_ALIKE = 0.05
"""Difference of two log-likelihoods that is negligible."""
_CHUNK = 50
"""Resamples fitted at once, to bound the memory."""

Counts = NDArray[np.float64]


@dataclass(frozen=True)
class Threshold:
    """Where accuracy crosses `LEVEL`, in the unit of the sweep."""

    at: float | None
    """Threshold; None where accuracy does not cross inside the sweep, as `says` explains."""
    ci95: tuple[float, float] | None
    """Percentile bootstrap, with `at` between its ends; ends outside of the sweep are its ends."""
    crossing: float
    """Share of the resampled data sets with a crossing inside the sweep."""
    says: str


def threshold(points: Sequence[float], right_UP: Counts, asked_UP: Counts, seed: int = 0) -> Threshold:
    """Fit `accuracy(x) = 1/2 + (1/2 - lapse) logistic((x - middle) / slope)` by maximum likelihood.

    The usual psychometric function of a choice between two (Wichmann & Hill 2001), rising with x. The likelihood is
    taken on a grid of thresholds, slopes and lapses: no start to choose. Between two points of a step every threshold
    is about as likely: the middle is given, and the interval holds them all.

    Args:
        points: x of the P points of the sweep, in rising order.
        right_UP: right answers of each of U units (that the bootstrap draws whole) at each point.
        asked_UP: questions of each unit at each point.
        seed: of the bootstrap.
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
    # few units draw many data sets without a crossing here, whose ends may both lie on one side of it
    ci95 = min(float(ends[0]), float(best)), max(float(ends[1]), float(best))
    return Threshold(float(best), ci95, crossing, "crosses")


def _grid(x_P: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Thresholds [X] of all X parameter sets, and the logarithms of right and wrong at each point, [P, X]."""
    span = float(x_P[-1] - x_P[0])
    # beyond both ends, where a curve that does not cross in the sweep has its threshold
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
    """The lowest and the highest of the likeliest thresholds of each of R data sets -> [R, 2]."""
    likelihood_RX = right_RP @ logs_PX + (asked_RP - right_RP) @ wrongs_PX
    best_RX = likelihood_RX >= likelihood_RX.max(1, keepdims=True) - _ALIKE
    # the thresholds rise along the grid
    first_R, last_R = best_RX.argmax(1), best_RX.shape[1] - 1 - best_RX[:, ::-1].argmax(1)
    return np.stack([at_X[first_R], at_X[last_R]], axis=1)
