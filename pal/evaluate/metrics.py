"""Metrics over any selection of items, such as accuracy or word error rate, with their bootstrap."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pal.evaluate.bootstrap import Groups

Rows = NDArray[np.intp]
"""Indices of items, or of groups of items."""

RESAMPLES = 2000
"""Number of bootstrap samples of a ratio metric."""


class Metric(ABC):
    """Metric over any selection of the items."""

    resamples: int = RESAMPLES

    @property
    def slow(self) -> bool:
        """True if resampling takes long, so that subsets get no intervals."""
        return False

    @abstractmethod
    def value(self, rows: Rows | None = None) -> float:
        """The metric over the items `rows` (which may repeat), or over all; NaN if it is undefined."""

    @abstractmethod
    def subset(self, rows: Rows) -> Metric:
        """The metric of some items."""

    @abstractmethod
    def resampled(self, groups: Groups, drawn_RG: Rows) -> NDArray[np.float64]:
        """The metric on R bootstrap samples, each of the groups in a row of `drawn_RG` -> [R]."""

    @abstractmethod
    def support(self, groups: Groups) -> Support:
        """Effective sample size of the metric."""


@dataclass(frozen=True)
class Support:
    """Effective sample size of a metric."""

    clips: float | None
    """Equivalent number of independent right or wrong answers; None for a metric that is not a share (0 to 1)."""
    widened: float | None = None
    """True variance relative to the bootstrap variance; None for a metric with an unbiased bootstrap."""


@dataclass(frozen=True)
class Ratio(Metric):
    """Ratio of two sums over items: means, error rates, micro-averages."""

    over: NDArray[np.float64]
    under: NDArray[np.float64]
    share: bool = False
    """True for a ratio between 0 and 1, such as an accuracy."""

    @classmethod
    def right(cls, correct: Sequence[bool]) -> Ratio:
        """Accuracy."""
        return cls(np.asarray(correct, dtype=float), np.ones(len(correct)), share=True)

    @classmethod
    def mean(cls, values: Sequence[float]) -> Ratio:
        """Mean over the items."""
        return cls(np.asarray(values, dtype=float), np.ones(len(values)))

    def value(self, rows: Rows | None = None) -> float:
        """Ratio of the sums."""
        over, under = (x if rows is None else x[rows] for x in (self.over, self.under))
        total = float(under.sum())
        return float(over.sum()) / total if total else float("nan")

    def subset(self, rows: Rows) -> Ratio:
        """The metric of some items."""
        return Ratio(self.over[rows], self.under[rows], self.share)

    def resampled(self, groups: Groups, drawn_RG: Rows) -> NDArray[np.float64]:
        """Bootstrap values, from the sums of each group."""
        over_G = np.bincount(groups.of_item, weights=self.over)
        under_G = np.bincount(groups.of_item, weights=self.under)
        with np.errstate(invalid="ignore", divide="ignore"):
            ratios: NDArray[np.float64] = over_G[drawn_RG].sum(1) / under_G[drawn_RG].sum(1)
        return ratios

    def support(self, groups: Groups) -> Support:
        """For a share, the number of groups in its denominator."""
        return Support(float(len(np.unique(groups.of_item[self.under > 0]))) if self.share else None)
