"""Cluster bootstrap over clips: confidence intervals of metrics.

An interval always contains the metric itself. Its coverage is measured by `python -m tests.evaluate.coverage`;
docs/evaluation.md has the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pal.evaluate.metrics import RESAMPLES, Metric, Ratio, Support

INTERVALS = (
    "95 %, bootstrap over whole clips. Means and ratios of sums: percentiles. Means over labels, which are biased with "
    "few clips: from the bias-corrected score to the score, widened by the spread. At least Wilson's interval if all "
    "answers are right (or wrong), or if a mean over labels has fewer than five wrong (or right) clips"
)
"""Description of the intervals, for score files."""

_CHUNK = 4_000_000
"""Maximum number of drawn indices in memory: 32 MB."""
_FEW = 5
"""Minimum number of wrong (or right) clips for a percentile interval of a share, a usual rule of thumb."""


class Groups:
    """Clusters of the bootstrap. Questions about one clip are not independent, so they are drawn together."""

    def __init__(self, keys: Sequence[Hashable]) -> None:
        places: dict[Hashable, int] = {}
        self.of_item = np.asarray([places.setdefault(key, len(places)) for key in keys], dtype=np.intp)
        self.members = np.split(np.argsort(self.of_item, kind="stable"), np.cumsum(np.bincount(self.of_item))[:-1])

    def __len__(self) -> int:
        return len(self.members)


@dataclass(frozen=True)
class DrawnMetric:
    """Metric with its values on R bootstrap samples."""

    value: float
    values_R: NDArray[np.float64]
    support: Support

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Confidence interval; it always contains `value`. NaN if `value` is NaN."""
        if math.isnan(self.value):
            return float("nan"), float("nan")
        corrected, clips = self.support.widened is not None, self.support.clips
        ends = self._corrected(level) if corrected else interval(self.values_R, self.value, level)
        if clips and (self.value in (0, 1) or (corrected and clips * min(self.value, 1 - self.value) < _FEW)):
            low, high = wilson(self.value, clips, level)
            ends = min(ends[0], low), max(ends[1], high)
        return ends

    def chance(self) -> float:
        """Two-sided bootstrap p-value of a difference from 0; never below 1 / number of draws."""
        kept_R = self.values_R[~np.isnan(self.values_R)]
        if math.isnan(self.value) or not len(kept_R):
            return float("nan")
        ways = [kept_R]
        if self.support.widened is not None:
            apart_R = (kept_R - kept_R.mean()) * math.sqrt(self.support.widened)
            ways = [self.value + apart_R, 2 * self.value - kept_R.mean() + apart_R]
        tails = [min(float(np.mean(way_R <= 0)), float(np.mean(way_R >= 0))) for way_R in ways]
        return min(1.0, max(2 * max(tails), 1 / len(kept_R)))

    def __sub__(self, other: DrawnMetric) -> DrawnMetric:
        """Paired difference of two metrics on the same bootstrap samples."""
        both = [one.support.widened for one in (self, other) if one.support.widened is not None]
        support = Support(None, max(both, default=None))
        return DrawnMetric(self.value - other.value, self.values_R - other.values_R, support)

    def _corrected(self, level: float) -> tuple[float, float]:
        """Interval from the bias-corrected metric to the metric itself, widened by the spread of the draws.

        A mean over labels with few clips is biased. Bootstrap samples are biased in the same way relative to the data,
        so the mean of the samples minus the metric estimates the bias (Efron & Tibshirani 1993, chapter 10). Shares are
        transformed by asin(sqrt(x)), which stabilises their variance (Anscombe 1948).
        """
        assert self.support.widened is not None
        share = self.support.clips is not None
        drawn_R = self.values_R[~np.isnan(self.values_R)]
        value = _angle(self.value) if share else self.value
        drawn_R = _angle(drawn_R) if share else drawn_R
        if not len(drawn_R):
            return self.value, self.value
        bias = float(drawn_R.mean()) - float(value)
        tail = (1 - level) / 2
        spread = np.quantile(drawn_R - drawn_R.mean(), [tail, 1 - tail]) * math.sqrt(self.support.widened)
        low, high = value - max(bias, 0.0) + min(spread[0], 0.0), value - min(bias, 0.0) + max(spread[1], 0.0)
        if share:
            low, high = (float(np.sin(np.clip(end, 0, np.pi / 2)) ** 2) for end in (low, high))
        return min(float(low), self.value), max(float(high), self.value)


def draw(metrics: Sequence[Metric], groups: Groups, seed: int = 0) -> list[DrawnMetric]:
    """Each metric with its bootstrap distribution, on the same samples for all, so that differences are paired."""
    drawn_RM = resample(metrics, groups, seed)
    return [DrawnMetric(one.value(), drawn_RM[:, at], one.support(groups)) for at, one in enumerate(metrics)]


def resample(
    metrics: Sequence[Metric], groups: Groups, seed: int = 0, resamples: int | None = None
) -> NDArray[np.float64]:
    """Metrics on bootstrap samples, drawn from the groups with replacement -> [R, M].

    All metrics use the same samples, so their differences are paired.
    """
    resamples = resamples or min(metric.resamples for metric in metrics)
    rng = np.random.default_rng(seed)
    per_draw = max(1, _CHUNK // len(groups))
    parts = []
    for first in range(0, resamples, per_draw):
        drawn_RG = rng.integers(len(groups), size=(min(per_draw, resamples - first), len(groups)))
        parts.append(np.stack([metric.resampled(groups, drawn_RG) for metric in metrics], axis=1))
    return np.concatenate(parts)


def interval(values_R: NDArray[np.float64], estimate: float, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval (Efron & Tibshirani 1993, section 13.3), without draws that are NaN.

    It is extended to contain the estimate, which rounding or very uneven groups could leave just outside.
    """
    kept = values_R[~np.isnan(values_R)]
    if not len(kept) or math.isnan(estimate):
        return (estimate, estimate)
    tail = (1 - level) / 2
    low, high = np.quantile(kept, [tail, 1 - tail])
    return min(float(low), estimate), max(float(high), estimate)


def bootstrap_ci(
    values: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron & Tibshirani 1993, section 13.3).

    Args:
        values: one number for each item, such as 1 for a right answer, or a difference of two models.
        groups: cluster of each item. Whole clusters are drawn, since questions about one clip are not independent.
            Without groups, items are drawn.
        resamples: number of bootstrap samples.
        level: confidence level.
        seed: seed of the draws; the same seed gives the same interval.

    Returns:
        Lower and upper end, with the mean between them; NaN for no items.
    """
    if len(values) == 0:
        return float("nan"), float("nan")
    mean = Ratio.mean(values)
    drawn_R = resample([mean], Groups(groups if groups is not None else range(len(values))), seed, resamples)[:, 0]
    low, high = interval(drawn_R, mean.value(), level)
    # the caller's mean may differ by the order of summation
    other = sum(values) / len(values)
    return min(low, other), max(high, other)


def wilson(share: float, n: float, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval (1927) of a share of n independent answers."""
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    middle, half = share + z2 / (2 * n), math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n)))
    return max(0.0, (middle - half) / (1 + z2 / n)), min(1.0, (middle + half) / (1 + z2 / n))


def _angle(share: Any) -> Any:
    return np.arcsin(np.sqrt(np.clip(share, 0.0, 1.0)))
