"""Metrics that are means over labels, such as mAP and macro F1: of the labels that are there."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pal.evaluate.bootstrap import Groups
from pal.evaluate.metrics import Metric, Rows, Support

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

RESAMPLES = 1000
"""Data sets drawn; each label is ranked anew in each of them."""
MOST_WIDENED = 4.0
"""Most that a variance is raised for labels of a single clip, which say nothing of their own spread."""
_SLOW = 200_000
"""Items times labels, of which a thousand data sets take some seconds."""
_CHUNK = 1_000_000
"""Numbers of items in data sets held at once."""


class LabelMetric(Metric):
    """Mean of what each label has, over the labels that the items have.

    A label that is not there has no value and does not count: not in the whole, not in a part of the items, not in a
    redrawn data set. So a part is not charged for labels that it does not have.
    """

    resamples = RESAMPLES

    @abstractmethod
    def present(self) -> Bools:
        """Which items give a label a value [N, L]."""

    @abstractmethod
    def by_label(self, times_RN: Floats) -> Floats:
        """Each label's value [R, L] where the items are there so many times; NaN where it has none."""

    @property
    def slow(self) -> bool:
        """Whether there are so many items and labels that redrawing takes long."""
        return self.present().size > _SLOW

    def value(self, rows: Rows | None = None) -> float:
        """Over all items, or over `rows`."""
        n = len(self.present())
        times_N = np.ones(n) if rows is None else np.bincount(rows, minlength=n).astype(float)
        return float(mean_over_labels(self.by_label(times_N[None]))[0])

    def redrawn(self, groups: Groups, drawn_RG: Rows) -> Floats:
        """From how many times each group was drawn."""
        size = max(1, _CHUNK // len(groups.of_item))
        found = []
        for first in range(0, len(drawn_RG), size):
            some_SG = drawn_RG[first : first + size]
            S, G = len(some_SG), len(groups)
            places_SG = some_SG + G * np.arange(S)[:, None]
            times_SG = np.bincount(places_SG.ravel(), minlength=S * G).reshape(S, G)
            found.append(mean_over_labels(self.by_label(times_SG[:, groups.of_item].astype(float))))
        return np.concatenate(found)

    def support(self, groups: Groups) -> Support:
        """The clips of its labels."""
        return evidence(self.present(), groups)


@dataclass(frozen=True)
class MeanAveragePrecision(LabelMetric):
    """Mean over the labels that some item has of average precision.

    Of each label it is scikit-learn's `average_precision_score`, which is not defined without a positive.
    """

    truth_NL: Bools
    scores_NL: Floats

    def present(self) -> Bools:
        """The labels of the items."""
        return self.truth_NL

    def of_some(self, rows: Rows) -> MeanAveragePrecision:
        """Of their labels alone."""
        return MeanAveragePrecision(self.truth_NL[rows], self.scores_NL[rows])

    def by_label(self, times_RN: Floats) -> Floats:
        """One label after the other."""
        columns = zip(self.scores_NL.T, self.truth_NL.T, strict=True)
        return np.stack([average_precision(score_N, truth_N, times_RN) for score_N, truth_N in columns], axis=1)


@dataclass(frozen=True)
class MacroF1(LabelMetric):
    """Mean over the labels that are held or said of F1: scikit-learn's `f1_score` with zero_division=nan."""

    truth_NL: Bools
    said_NL: Bools

    def present(self) -> Bools:
        """Held or said."""
        return self.truth_NL | self.said_NL

    def of_some(self, rows: Rows) -> MacroF1:
        """Of what they hold and say alone."""
        return MacroF1(self.truth_NL[rows], self.said_NL[rows])

    def by_label(self, times_RN: Floats) -> Floats:
        """Twice the hits by what is held and what is said."""
        hits_NL = (self.truth_NL & self.said_NL).astype(float)
        both_NL = self.truth_NL.astype(float) + self.said_NL
        with np.errstate(invalid="ignore", divide="ignore"):
            f1_RL: Floats = 2 * (times_RN @ hits_NL) / (times_RN @ both_NL)
        return f1_RL


def evidence(present_NL: Bools, groups: Groups) -> Support:
    """As of equally uncertain labels: the harmonic mean of their clips, and what single ones fail to show.

    A label of n clips has a variance of v / n, and redrawing shows (n - 1) / n of it (of one clip, nothing).
    """
    held_GL = np.zeros((len(groups), present_NL.shape[1]), bool)
    np.logical_or.at(held_GL, groups.of_item, present_NL)
    clips_L = held_GL.sum(0)
    clips_L = clips_L[clips_L > 0].astype(float)
    if not len(clips_L):
        return Support(0.0, 1.0)
    shown = ((clips_L - 1) / clips_L**2).sum()
    widened = min(MOST_WIDENED, (1 / clips_L).sum() / shown) if shown > 0 else MOST_WIDENED
    return Support(float(len(clips_L) ** 2 / (1 / clips_L).sum()), float(widened))


def mean_over_labels(values_RL: Floats) -> Floats:
    """Mean of the numbers of a row that are there -> [R]; NaN where there are none."""
    there_RL = ~np.isnan(values_RL)
    with np.errstate(invalid="ignore", divide="ignore"):
        means_R: Floats = np.where(there_RL, values_RL, 0.0).sum(1) / there_RL.sum(1)
    return means_R


def average_precision(score_N: Floats, truth_N: Bools, times_RN: Floats) -> Floats:
    """Average precision of one label with each item there so many times -> [R]; NaN without a positive.

    It is scikit-learn's with `sample_weight`; equal scores are one step.
    """
    order_N = np.argsort(-score_N, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(score_N[order_N])), len(order_N) - 1)
    sorted_RN = times_RN[:, order_N]
    hits_RS = np.cumsum(sorted_RN * truth_N[order_N], axis=1)[:, ends]
    all_RS = np.cumsum(sorted_RN, axis=1)[:, ends]
    gained_RS = np.diff(hits_RS, axis=1, prepend=0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        # where nothing was drawn yet there is no precision, and nothing gained to weigh with it
        precision_RS = np.where(all_RS > 0, hits_RS / all_RS, 0.0)
        found_R: Floats = (gained_RS * precision_RS).sum(1) / hits_RS[:, -1]
    return found_R
