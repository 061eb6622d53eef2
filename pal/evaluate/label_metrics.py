"""Macro-averages over the labels that occur, such as mAP and macro F1."""

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
"""Number of bootstrap samples; each of them ranks the items of each label again."""
MOST_WIDENED = 4.0
"""Maximum of `Support.widened`; labels of a single clip have no spread in bootstrap samples."""
_SLOW = 200_000
"""Items times labels above which a thousand bootstrap samples take some seconds."""
_CHUNK = 1_000_000
"""Maximum number of item counts of bootstrap samples in memory."""


class LabelMetric(Metric):
    """Macro-average: mean of a metric of each label, over the labels that occur in the items.

    A label that does not occur in a selection of items, such as a category or a bootstrap sample, is left out of the
    mean. So a selection is not penalised for labels that it does not have.
    """

    resamples = RESAMPLES

    @abstractmethod
    def present(self) -> Bools:
        """Mask of the items that count for each label [N, L]."""

    @abstractmethod
    def by_label(self, times_RN: Floats) -> Floats:
        """Metric of each label [R, L], with each item repeated `times_RN` times; NaN for labels that do not occur."""

    @property
    def slow(self) -> bool:
        """True if resampling takes long, by the number of items and labels."""
        return self.present().size > _SLOW

    def value(self, rows: Rows | None = None) -> float:
        """The metric over all items, or over `rows`."""
        n = len(self.present())
        times_N = np.ones(n) if rows is None else np.bincount(rows, minlength=n).astype(float)
        return float(mean_over_labels(self.by_label(times_N[None]))[0])

    def resampled(self, groups: Groups, drawn_RG: Rows) -> Floats:
        """Bootstrap values, from the number of times that each group was drawn."""
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
        """Effective sample size, from the clips of each label."""
        return evidence(self.present(), groups)


@dataclass(frozen=True)
class MeanAveragePrecision(LabelMetric):
    """Mean average precision (mAP) over the labels that occur.

    Average precision is scikit-learn's `average_precision_score`, which is undefined without a positive.
    """

    truth_NL: Bools
    scores_NL: Floats

    def present(self) -> Bools:
        """Labels of the items."""
        return self.truth_NL

    def subset(self, rows: Rows) -> MeanAveragePrecision:
        """The metric of some items."""
        return MeanAveragePrecision(self.truth_NL[rows], self.scores_NL[rows])

    def by_label(self, times_RN: Floats) -> Floats:
        """Average precision of each label."""
        columns = zip(self.scores_NL.T, self.truth_NL.T, strict=True)
        return np.stack([average_precision(score_N, truth_N, times_RN) for score_N, truth_N in columns], axis=1)


@dataclass(frozen=True)
class MacroF1(LabelMetric):
    """Macro F1 over the labels that are true or predicted: scikit-learn's `f1_score` with zero_division=nan."""

    truth_NL: Bools
    predicted_NL: Bools

    def present(self) -> Bools:
        """Labels that are true or predicted."""
        return self.truth_NL | self.predicted_NL

    def subset(self, rows: Rows) -> MacroF1:
        """The metric of some items."""
        return MacroF1(self.truth_NL[rows], self.predicted_NL[rows])

    def by_label(self, times_RN: Floats) -> Floats:
        """F1 of each label: 2 TP / (true + predicted)."""
        hits_NL = (self.truth_NL & self.predicted_NL).astype(float)
        both_NL = self.truth_NL.astype(float) + self.predicted_NL
        with np.errstate(invalid="ignore", divide="ignore"):
            f1_RL: Floats = 2 * (times_RN @ hits_NL) / (times_RN @ both_NL)
        return f1_RL


def evidence(present_NL: Bools, groups: Groups) -> Support:
    """Effective sample size of a mean over labels of equal variance, and a factor for its bootstrap variance.

    The factor is what the bootstrap underestimates the variance by. The size is the harmonic mean of the labels' clips.
    The score of a label with n clips has variance v / n, of which resampling shows the share (n - 1) / n (nothing for
    one clip).
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
    """Mean of each row without NaN -> [R]; NaN if all are NaN."""
    there_RL = ~np.isnan(values_RL)
    with np.errstate(invalid="ignore", divide="ignore"):
        means_R: Floats = np.where(there_RL, values_RL, 0.0).sum(1) / there_RL.sum(1)
    return means_R


def average_precision(score_N: Floats, truth_N: Bools, times_RN: Floats) -> Floats:
    """Average precision of one label, with each item repeated `times_RN` times -> [R]; NaN without a positive.

    As scikit-learn's with `sample_weight`; equal scores are one step.
    """
    order_N = np.argsort(-score_N, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(score_N[order_N])), len(order_N) - 1)
    sorted_RN = times_RN[:, order_N]
    hits_RS = np.cumsum(sorted_RN * truth_N[order_N], axis=1)[:, ends]
    all_RS = np.cumsum(sorted_RN, axis=1)[:, ends]
    gained_RS = np.diff(hits_RS, axis=1, prepend=0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        # before the first drawn item precision is 0 / 0, and its weight (the gain in recall) is 0
        precision_RS = np.where(all_RS > 0, hits_RS / all_RS, 0.0)
        found_R: Floats = (gained_RS * precision_RS).sum(1) / hits_RS[:, -1]
    return found_R
