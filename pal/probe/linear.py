"""Linear probes: accuracy of linear classifiers that predict labels from features, on held-out clips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pal.errors import ConfigError
from pal.evaluate.bootstrap import DrawnMetric, Groups
from pal.evaluate.label_metrics import average_precision, evidence, mean_over_labels

FOLDS, INNER_FOLDS = 4, 2
STRENGTHS = (1e-3, 1e-2, 1e-1)
"""Values of scikit-learn's C, from strong to weak regularisation."""
RESAMPLES = 1000
ROUND_OFF = 1e-5
"""Features that vary by less than this share of their size count as constant, since round-off alone varies as much."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ProbeLabels:
    """Labels of N clips."""

    title: str
    names: tuple[str, ...]
    """Names of the K labels."""
    truth_NK: NDArray[np.bool_]
    exclusive: bool
    """True if each clip has exactly one label."""

    @property
    def metric(self) -> str:
        """Name of the metric."""
        return "balanced accuracy" if self.exclusive else "macro average precision"

    @property
    def chance(self) -> float:
        """Expected score of an uninformative probe."""
        return 1 / len(self.names) if self.exclusive else float(self.truth_NK.mean(0).mean())

    def shuffled(self, seed: int) -> ProbeLabels:
        """The same labels, shuffled among the clips."""
        order_N = np.random.default_rng(seed).permutation(len(self.truth_NK))
        return ProbeLabels(self.title, self.names, self.truth_NK[order_N], self.exclusive)


@dataclass(frozen=True)
class ProbeScore:
    """Score of a linear probe on held-out clips."""

    score: float
    ci95: tuple[float, float]
    """Bootstrap interval over clips, as in `pal.evaluate.bootstrap` for means over labels."""
    by_label: tuple[float, ...]
    """Score of each label: recall if labels are exclusive, else average precision."""


def check() -> None:
    """Raise ConfigError if scikit-learn is missing."""
    try:
        import sklearn.linear_model  # noqa: F401
    except ImportError:
        raise ConfigError("linear probes need scikit-learn: pip install 'pal-audio[scores]'") from None


def score_probe(x_ND: NDArray[Any], labels: ProbeLabels, groups: Sequence[str], seed: int = 0) -> ProbeScore:
    """Train and score linear probes (logistic regression, one for each label), with whole groups held out.

    Features are standardised and the regularisation is chosen within the training folds. A probe's score is its logit
    without the intercept: it does not depend on the frequency of the label in the fold, and is exactly at chance for
    uninformative features.

    Args:
        x_ND: features of N clips.
        labels: their labels.
        groups: group of each clip; clips of a group are held out together.
        seed: seed of the bootstrap.
    """
    scores_NK = held_out(x_ND, labels, groups)
    by_label_K = label_scores(scores_NK, labels, np.ones((1, len(x_ND))))[0]
    weights_RN = (
        np.random.default_rng(seed)
        .multinomial(len(x_ND), np.full(len(x_ND), 1 / len(x_ND)), size=RESAMPLES)
        .astype(float)
    )
    score = float(mean_over_labels(by_label_K[None])[0])
    drawn_R = mean_over_labels(label_scores(scores_NK, labels, weights_RN))
    drawn = DrawnMetric(score, drawn_R, evidence(labels.truth_NK, Groups(range(len(x_ND)))))
    return ProbeScore(score, drawn.interval(), tuple(by_label_K.tolist()))


def held_out(x_ND: NDArray[Any], labels: ProbeLabels, groups: Sequence[str]) -> Floats:
    """Scores of each clip for each label [N, K], by probes trained without its group."""
    from sklearn.model_selection import GroupKFold

    truth_NK, group_N = labels.truth_NK, np.asarray(groups)
    scores_NK = np.zeros(truth_NK.shape)
    for train, test in GroupKFold(FOLDS).split(x_ND, groups=group_N):
        best, best_score = STRENGTHS[0], -np.inf
        for strength in STRENGTHS:
            inner_NK = np.zeros((len(train), truth_NK.shape[1]))
            for fit, hold in GroupKFold(INNER_FOLDS).split(train, groups=group_N[train]):
                inner_NK[hold] = _fitted(x_ND[train[fit]], truth_NK[train[fit]], x_ND[train[hold]], strength)
            part = ProbeLabels(labels.title, labels.names, truth_NK[train], labels.exclusive)
            score = float(np.nanmean(label_scores(inner_NK, part, np.ones((1, len(train))))))
            if score > best_score:
                best, best_score = strength, score
        scores_NK[test] = _fitted(x_ND[train], truth_NK[train], x_ND[test], best)
    return scores_NK


def _fitted(x_ND: NDArray[Any], truth_NK: NDArray[np.bool_], new_MD: NDArray[Any], strength: float) -> Floats:
    """Scores [M, K] of new clips by probes trained on others."""
    from sklearn.linear_model import LogisticRegression

    x_ND, new_MD = x_ND.astype(np.float64), new_MD.astype(np.float64)
    mean_D, spread_D = x_ND.mean(0), x_ND.std(0)
    varying_D = spread_D > ROUND_OFF * np.sqrt(np.mean(x_ND**2))
    scores_MK = np.zeros((len(new_MD), truth_NK.shape[1]))
    if not varying_D.any():
        return scores_MK
    x_ND = ((x_ND - mean_D) / np.where(varying_D, spread_D, 1.0))[:, varying_D]
    new_MD = ((new_MD - mean_D) / np.where(varying_D, spread_D, 1.0))[:, varying_D]
    for k, truth_N in enumerate(truth_NK.T):
        if truth_N.any() and not truth_N.all():
            probe = LogisticRegression(C=strength, max_iter=1000).fit(x_ND, truth_N)
            scores_MK[:, k] = new_MD @ probe.coef_[0]
    return scores_MK


def label_scores(scores_NK: Floats, labels: ProbeLabels, weights_RN: Floats) -> Floats:
    """Score of each label [R, K], with clips weighted by `weights_RN`; NaN if no clip has the label."""
    if labels.exclusive:
        return _recall(scores_NK, labels.truth_NK, weights_RN)
    return np.stack(
        [average_precision(s, t, weights_RN) for s, t in zip(scores_NK.T, labels.truth_NK.T, strict=True)], axis=1
    )


def _recall(scores_NK: Floats, truth_NK: NDArray[np.bool_], weights_RN: Floats) -> Floats:
    """Recall of each label [R, K], predicting the label of highest score; ties count as the expected recall."""
    best_NK = scores_NK == scores_NK.max(1, keepdims=True)
    hit_N = (best_NK & truth_NK).sum(1) / best_NK.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        recall_RK: Floats = ((weights_RN * hit_N) @ truth_NK) / (weights_RN @ truth_NK)
    return recall_RK
