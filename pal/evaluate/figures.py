"""Numbers over many items, and how far they would move with other clips: the bootstrap."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.intp]

RESAMPLES = 2000
"""Data sets drawn for a figure that is a ratio of sums."""
SLOW_RESAMPLES = 200
"""Data sets drawn for a figure that must be computed anew for each."""

_CHUNK = 4_000_000
"""Drawn indices held at once, to bound the memory at 32 MB."""


class Figure(ABC):
    """A number that any selection of the items has."""

    resamples: int = RESAMPLES

    @abstractmethod
    def value(self, rows: Rows | None = None) -> float:
        """The figure over the items `rows` (which may repeat), or over all; NaN where it has none."""

    @abstractmethod
    def of_some(self, rows: Rows) -> Figure:
        """The same figure of some items."""

    @abstractmethod
    def redrawn(self, groups: Groups, drawn_RG: Rows) -> NDArray[np.float64]:
        """The figure of each of R data sets made of the groups `drawn_RG` -> [R]."""


@dataclass(frozen=True)
class Ratio(Figure):
    """The sum of one number an item by the sum of another: means, error rates, micro-averages."""

    over: NDArray[np.float64]
    under: NDArray[np.float64]

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
        return Ratio(self.over[rows], self.under[rows])

    def redrawn(self, groups: Groups, drawn_RG: Rows) -> NDArray[np.float64]:
        """From the groups' sums alone."""
        over_G = np.bincount(groups.of_item, weights=self.over)
        under_G = np.bincount(groups.of_item, weights=self.under)
        with np.errstate(invalid="ignore", divide="ignore"):
            ratios: NDArray[np.float64] = over_G[drawn_RG].sum(1) / under_G[drawn_RG].sum(1)
        return ratios


@dataclass(frozen=True)
class Statistic(Figure):
    """Any function of the items, such as mean average precision; slow to redraw."""

    of: Callable[[Rows], float]
    n: int
    resamples: int = SLOW_RESAMPLES

    def value(self, rows: Rows | None = None) -> float:
        """The function itself."""
        return float(self.of(np.arange(self.n) if rows is None else rows))

    def of_some(self, rows: Rows) -> Statistic:
        """The function on a part of the items."""
        return Statistic(lambda some: self.of(rows[some]), len(rows), self.resamples)

    def redrawn(self, groups: Groups, drawn_RG: Rows) -> NDArray[np.float64]:
        """The function of each data set."""
        return np.asarray([self.of(np.concatenate([groups.members[g] for g in drawn])) for drawn in drawn_RG])


class Groups:
    """Which items belong together. Questions about one clip are not independent, so they are drawn together."""

    def __init__(self, keys: Sequence[Hashable]) -> None:
        places: dict[Hashable, int] = {}
        self.of_item = np.asarray([places.setdefault(key, len(places)) for key in keys], dtype=np.intp)
        self.members = np.split(np.argsort(self.of_item, kind="stable"), np.cumsum(np.bincount(self.of_item))[:-1])

    def __len__(self) -> int:
        return len(self.members)


def redraw(figures: Sequence[Figure], groups: Groups, seed: int = 0) -> NDArray[np.float64]:
    """The figures over data sets drawn from the groups with replacement, the same for all of them -> [R, F].

    Since all figures see the same data sets, their differences are paired.
    """
    resamples = min(figure.resamples for figure in figures)
    rng = np.random.default_rng(seed)
    per_draw = max(1, _CHUNK // len(groups))
    parts = []
    for first in range(0, resamples, per_draw):
        drawn_RG = rng.integers(len(groups), size=(min(per_draw, resamples - first), len(groups)))
        parts.append(np.stack([figure.redrawn(groups, drawn_RG) for figure in figures], axis=1))
    return np.concatenate(parts)


def interval(values: NDArray[np.float64], level: float = 0.95) -> tuple[float, float]:
    """Percentile interval (Efron & Tibshirani 1993, section 13.3); NaN, a draw without value, is left out."""
    kept = values[~np.isnan(values)]
    if not len(kept):
        return float("nan"), float("nan")
    tail = (1 - level) / 2
    low, high = np.quantile(kept, [tail, 1 - tail])
    return float(low), float(high)
