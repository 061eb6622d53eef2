"""Linear probes against scikit-learn, planted directions and cases by hand."""

import sys

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, balanced_accuracy_score

from pal.errors import ConfigError
from pal.probe import linear
from pal.probe.linear import ProbeLabels, check, label_scores, score_probe

RNG = np.random.default_rng(0)
N, D = 60, 6
GROUPS = [f"clip {i}" for i in range(N)]


def tags():
    truth = RNG.random((N, 2)) < 0.4
    return ProbeLabels("t", ("dog", "bell"), truth, exclusive=False)


def classes():
    return ProbeLabels("c", ("a", "b", "c"), np.eye(3, dtype=bool)[np.arange(N) % 3], exclusive=True)


def test_average_precision_is_scikit_learns_with_ties_and_weights():
    labels = tags()
    scores = RNG.integers(0, 5, (N, 2)).astype(float)  # many ties
    weights = RNG.integers(0, 4, (3, N)).astype(float)
    found = label_scores(scores, labels, weights)
    for r in range(3):
        for k in range(2):
            known = average_precision_score(labels.truth_NK[:, k], scores[:, k], sample_weight=weights[r])
            assert found[r, k] == pytest.approx(known, abs=1e-12)


def test_recall_is_that_of_balanced_accuracy():
    labels, scores = classes(), RNG.standard_normal((N, 3))
    known = balanced_accuracy_score(labels.truth_NK.argmax(1), scores.argmax(1))
    assert label_scores(scores, labels, np.ones((1, N))).mean() == pytest.approx(known)


@pytest.mark.parametrize("labels", [tags(), classes()], ids=["tags", "classes"])
def test_features_that_tell_nothing_are_exactly_at_chance(labels):
    row = RNG.standard_normal(D)
    constant = np.tile(row, (N, 1))
    assert score_probe(constant, labels, GROUPS).score == pytest.approx(labels.chance, abs=1e-12)
    noisy = (constant * (1 + 1e-7 * RNG.standard_normal((N, D)))).astype(np.float32)
    assert np.ptp(noisy, axis=0).max() > 0
    assert score_probe(noisy, labels, GROUPS) == score_probe(constant, labels, GROUPS)


@pytest.mark.parametrize("labels", [tags(), classes()], ids=["tags", "classes"])
def test_a_planted_direction_is_read_and_shuffled_labels_are_not(labels):
    planted = labels.truth_NK @ RNG.standard_normal((labels.truth_NK.shape[1], D))
    x = planted + 0.1 * RNG.standard_normal((N, D)) + 50.0
    found, control = score_probe(x, labels, GROUPS), score_probe(x, labels.shuffled(1), GROUPS)
    assert found.score > 0.95
    assert found.ci95[0] <= found.score <= found.ci95[1] + 1e-9
    assert control.ci95[1] < found.ci95[0]
    assert score_probe(x, labels, GROUPS) == found


def test_a_group_is_never_on_both_sides():
    """Each group has a direction of its own that says the label of its clips, which are known by nothing else."""
    truth = np.repeat(RNG.random((N // 4, 1)) < 0.5, 4, axis=0)
    labels = ProbeLabels("g", ("x",), truth, exclusive=False)
    x = np.repeat(np.eye(N // 4), 4, axis=0)
    together = score_probe(x, labels, [f"{i // 4}" for i in range(N)]).score
    apart = score_probe(x, labels, GROUPS).score
    assert together < 0.7
    assert apart > 0.95


def test_shuffled_labels_are_the_same_ones():
    labels = tags()
    assert (labels.shuffled(1).truth_NK.sum(0) == labels.truth_NK.sum(0)).all()
    assert (labels.shuffled(1).truth_NK != labels.truth_NK).any()


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ConfigError, match=r"pip install 'pal-audio\[scores\]'"):
        check()
    assert linear.FOLDS > 1
