"""Figures and their redrawing, against plain loops."""

import numpy as np
import pytest

from pal.evaluate.figures import Drawn, Groups, Ratio, Support, draw, interval, redraw, wilson
from pal.evaluate.scorers import bootstrap_ci

OVER = [1.0, 0.0, 3.0, 2.0, 0.0, 1.0]
UNDER = [2.0, 1.0, 4.0, 2.0, 0.0, 5.0]
KEYS = ["a", "b", "a", "c", "c", "d"]


def ratio():
    return Ratio(np.asarray(OVER), np.asarray(UNDER))


def test_value_of_all_and_of_some():
    rows = np.asarray([0, 3, 3])
    assert ratio().value() == pytest.approx(7 / 14)
    assert ratio().value(rows) == pytest.approx(5 / 6)
    assert ratio().of_some(rows).value() == pytest.approx(5 / 6)
    assert ratio().of_some(rows).value(np.asarray([1])) == 1.0
    assert np.isnan(ratio().value(np.asarray([4])))


def test_groups_are_drawn_whole_and_alike_for_all_figures():
    drawn_RF = redraw([ratio(), ratio()], Groups(KEYS), seed=3, resamples=200)
    assert drawn_RF.shape == (200, 2)
    assert drawn_RF[:, 0].tolist() == drawn_RF[:, 1].tolist()
    # the same by hand, from the same generator
    members = {"a": [0, 2], "b": [1], "c": [3, 4], "d": [5]}
    for order, found in zip(np.random.default_rng(3).integers(4, size=(200, 4)), drawn_RF[:, 0], strict=True):
        rows = [row for place in order for row in members["abcd"[place]]]
        assert found == pytest.approx(sum(OVER[r] for r in rows) / sum(UNDER[r] for r in rows))


def test_the_interval_of_a_mean_is_bootstrap_cis():
    right = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    drawn_RF = redraw([Ratio.mean(right)], Groups(KEYS), seed=7)
    assert interval(drawn_RF[:, 0], 4 / 6) == pytest.approx(bootstrap_ci(right, KEYS, seed=7))


def test_an_interval_leaves_out_draws_without_a_value():
    assert interval(np.asarray([np.nan, 1.0, 1.0]), 1.0) == (1.0, 1.0)
    assert interval(np.asarray([np.nan]), 0.5) == (0.5, 0.5)
    assert all(np.isnan(end) for end in interval(np.asarray([np.nan]), np.nan))


def test_an_interval_holds_what_it_is_of():
    assert interval(np.linspace(0, 1, 101), 0.5) == pytest.approx((0.025, 0.975))
    assert interval(np.linspace(0, 1, 101), 1.5) == pytest.approx((0.025, 1.5))
    # a mean of equal numbers misses them by a rounding
    values = [0.1] * 3
    for groups in (None, ["a", "a", "b"]):
        low, high = bootstrap_ci(values, groups)
        assert low <= sum(values) / 3 <= high and low <= np.mean(values) <= high
    (drawn,) = draw([Ratio.mean(values)], Groups(range(3)))
    assert drawn.interval()[0] <= drawn.value <= drawn.interval()[1]


@pytest.mark.parametrize(("right", "n"), [(0, 5), (3, 7), (19, 20), (20, 20)])
def test_wilson_is_statsmodels_formula(right, n):
    scipy = pytest.importorskip("scipy.stats")
    known = scipy.binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert wilson(right / n, n) == pytest.approx((known.low, known.high), abs=1e-12)


@pytest.mark.parametrize("clips", [1, 20])
def test_all_right_is_not_certain(clips):
    """Wilson's for as many clips, whatever the number of questions."""
    keys = [str(clip) for clip in range(clips) for _ in range(3)]
    for value in (1, 0):
        (drawn,) = draw([Ratio.right([bool(value)] * len(keys))], Groups(keys))
        low, high = drawn.interval()
        assert (low, high) == pytest.approx(wilson(value, clips))
        assert low < high and value in (low, high)
    # an error rate has no highest value, and a difference no such rule
    (drawn,) = draw([Ratio(np.zeros(len(keys)), np.ones(len(keys)))], Groups(keys))
    assert drawn.interval() == (0.0, 0.0) and (drawn - drawn).interval() == (0.0, 0.0)


def test_some_right_has_the_percentiles():
    right = [True] * 9 + [False]
    (drawn,) = draw([Ratio.right(right)], Groups(range(10)), seed=4)
    assert drawn.interval() == bootstrap_ci([float(one) for one in right], seed=4)


def test_a_biased_figure_reaches_from_its_correction_to_itself():
    # by hand on angles: draws have a mean of 0.9, the figure 0.7; so it is biased by 0.2, and 0.5 is the corrected one
    angles_R = 0.9 + 0.1 * np.linspace(-1, 1, 201)
    drawn = Drawn(np.sin(0.7) ** 2, np.sin(angles_R) ** 2, Support(1000.0, 1.0))
    low, high = np.arcsin(np.sqrt(drawn.interval()))
    assert (low, high) == pytest.approx((0.5 - 0.095, 0.7 + 0.095))
    wider = Drawn(drawn.value, drawn.values_R, Support(1000.0, 4.0))
    low, high = np.arcsin(np.sqrt(wider.interval()))
    assert (low, high) == pytest.approx((0.5 - 0.19, 0.7 + 0.19))
    # the other way round
    drawn = Drawn(np.sin(1.1) ** 2, np.sin(angles_R) ** 2, Support(1000.0, 1.0))
    low, high = np.arcsin(np.sqrt(drawn.interval()))
    assert (low, high) == pytest.approx((1.1 - 0.095, 1.3 + 0.095))


def test_few_that_are_wrong_are_not_believed():
    drawn_R = np.full(50, 0.97)
    assert Drawn(0.97, drawn_R, Support(100.0, 1.0)).interval() == pytest.approx(wilson(0.97, 100))
    low, high = Drawn(0.9, np.linspace(0.88, 0.92, 50), Support(100.0, 1.0)).interval()
    assert 0.87 < low < 0.9 < high < 0.93


def test_chance_has_two_sides_and_fits_the_interval():
    draws_R = np.concatenate([np.full(10, -0.1), np.full(190, 0.3)])
    for sign in (1, -1):
        assert Drawn(0.28 * sign, draws_R * sign, Support(None)).chance() == pytest.approx(2 * 10 / 200)
    assert Drawn(0.3, np.full(200, 0.3), Support(None)).chance() == 1 / 200
    assert Drawn(0.0, np.zeros(200), Support(None)).chance() == 1.0
    # biased by 0.1: from 0.1, the corrected one, 20 of 200 draws reach 0; from 0.2 none does
    spread_R = 0.2 * np.where(np.arange(200) % 10 == 0, -1.0, 1 / 9)
    biased = Drawn(0.2, 0.3 + spread_R, Support(None, 1.0))
    assert biased.chance() == pytest.approx(2 * 20 / 200)
    assert biased.interval()[0] <= 0 < biased.interval()[1]
