"""Metrics: numbers that any selection of items has, such as accuracy or a word error rate."""

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
"""Numbers of items, or of groups of items."""

RESAMPLES = 2000
"""Data sets drawn for a metric that is a ratio of sums."""


class Metric(ABC):
    """A number that any selection of the items has."""

    resamples: int = RESAMPLES

    @property
    def slow(self) -> bool:
        """Whether redrawing takes long, so that parts get no intervals."""
        return False

    @abstractmethod
    def value(self, rows: Rows | None = None) -> float:
        """The metric over the items `rows` (which may repeat), or over all; NaN where it has none."""

    @abstractmethod
    def of_some(self, rows: Rows) -> Metric:
        """The same metric of some items."""

    @abstractmethod
    def redrawn(self, groups: Groups, drawn_RG: Rows) -> NDArray[np.float64]:
        """The metric of each of R data sets made of the groups `drawn_RG` -> [R]."""

    @abstractmethod
    def support(self, groups: Groups) -> Support:
        """How much evidence it stands on."""


@dataclass(frozen=True)
class Support:
    """The evidence behind a metric."""

    clips: float | None
    """Independent right or wrong answers that say as much; None for a metric that is no share of 0 to 1."""
    widened: float | None = None
    """Times that the variance is above what redrawing shows; None for a metric that redrawing does not bias."""


@dataclass(frozen=True)
class Ratio(Metric):
    """The sum of one number an item by the sum of another: means, error rates, micro-averages."""

    over: NDArray[np.float64]
    under: NDArray[np.float64]
    share: bool = False
    """Never below 0 nor above 1, such as the share of right answers."""

    @classmethod
    def right(cls, correct: Sequence[bool]) -> Ratio:
        """Share of right answers."""
        return cls(np.asarray(correct, dtype=float), np.ones(len(correct)), share=True)

    @classmethod
    def mean(cls, values: Sequence[float]) -> Ratio:
        """Plain mean, each item counting once."""
        return cls(np.asarray(values, dtype=float), np.ones(len(values)))

    def value(self, rows: Rows | None = None) -> float:
        """Sum by sum."""
        over, under = (x if rows is None else x[rows] for x in (self.over, self.under))
        total = float(under.sum())
        return float(over.sum()) / total if total else float("nan")

    def of_some(self, rows: Rows) -> Ratio:
        """The items' numbers alone."""
        return Ratio(self.over[rows], self.under[rows], self.share)

    def redrawn(self, groups: Groups, drawn_RG: Rows) -> NDArray[np.float64]:
        """From the groups' sums alone."""
        over_G = np.bincount(groups.of_item, weights=self.over)
        under_G = np.bincount(groups.of_item, weights=self.under)
        with np.errstate(invalid="ignore", divide="ignore"):
            ratios: NDArray[np.float64] = over_G[drawn_RG].sum(1) / under_G[drawn_RG].sum(1)
        return ratios

    def support(self, groups: Groups) -> Support:
        """Of a share, the groups that count."""
        return Support(float(len(np.unique(groups.of_item[self.under > 0]))) if self.share else None)
