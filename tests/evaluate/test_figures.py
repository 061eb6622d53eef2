"""Figures and their redrawing, against plain loops."""

import numpy as np
import pytest

from pal.evaluate.figures import Groups, Ratio, Statistic, interval, redraw
from pal.evaluate.scorers import bootstrap_ci

OVER = [1.0, 0.0, 3.0, 2.0, 0.0, 1.0]
UNDER = [2.0, 1.0, 4.0, 2.0, 0.0, 5.0]
KEYS = ["a", "b", "a", "c", "c", "d"]


def ratio():
    return Ratio(np.asarray(OVER), np.asarray(UNDER))


def statistic():
    return Statistic(lambda rows: sum(OVER[r] for r in rows) / sum(UNDER[r] for r in rows), len(OVER))


def test_value_of_all_and_of_some():
    rows = np.asarray([0, 3, 3])
    for figure in (ratio(), statistic()):
        assert figure.value() == pytest.approx(7 / 14)
        assert figure.value(rows) == pytest.approx(5 / 6)
        assert figure.of_some(rows).value() == pytest.approx(5 / 6)
        assert figure.of_some(rows).value(np.asarray([1])) == 1.0
    assert np.isnan(ratio().value(np.asarray([4])))


def test_groups_are_drawn_whole_and_alike_for_all_figures():
    drawn_RF = redraw([ratio(), statistic()], Groups(KEYS), seed=3)
    assert drawn_RF.shape == (200, 2)
    assert drawn_RF[:, 0] == pytest.approx(drawn_RF[:, 1])
    # the same by hand, from the same generator
    members = {"a": [0, 2], "b": [1], "c": [3, 4], "d": [5]}
    for draw, found in zip(np.random.default_rng(3).integers(4, size=(200, 4)), drawn_RF[:, 0], strict=True):
        rows = [row for place in draw for row in members["abcd"[place]]]
        assert found == pytest.approx(sum(OVER[r] for r in rows) / sum(UNDER[r] for r in rows))


def test_the_interval_of_a_mean_is_bootstrap_cis():
    right = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    drawn_RF = redraw([Ratio.mean(right)], Groups(KEYS), seed=7)
    assert interval(drawn_RF[:, 0]) == pytest.approx(bootstrap_ci(right, KEYS, seed=7))


def test_an_interval_leaves_out_draws_without_a_value():
    assert interval(np.asarray([np.nan, 1.0, 1.0])) == (1.0, 1.0)
    assert all(np.isnan(end) for end in interval(np.asarray([np.nan])))
