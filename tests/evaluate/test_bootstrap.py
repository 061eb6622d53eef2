"""Metrics and their redrawing, against plain loops."""

import math

import numpy as np
import pytest

from pal.evaluate.bootstrap import DrawnMetric, Groups, bootstrap_ci, draw, interval, resample, wilson
from pal.evaluate.metrics import Ratio, Support

OVER = [1.0, 0.0, 3.0, 2.0, 0.0, 1.0]
UNDER = [2.0, 1.0, 4.0, 2.0, 0.0, 5.0]
KEYS = ["a", "b", "a", "c", "c", "d"]


def ratio():
    return Ratio(np.asarray(OVER), np.asarray(UNDER))


def test_value_of_all_and_of_some():
    rows = np.asarray([0, 3, 3])
    assert ratio().value() == pytest.approx(7 / 14)
    assert ratio().value(rows) == pytest.approx(5 / 6)
    assert ratio().subset(rows).value() == pytest.approx(5 / 6)
    assert ratio().subset(rows).value(np.asarray([1])) == 1.0
    assert np.isnan(ratio().value(np.asarray([4])))


def test_groups_are_drawn_whole_and_alike_for_all_metrics():
    drawn_RM = resample([ratio(), ratio()], Groups(KEYS), seed=3, resamples=200)
    assert drawn_RM.shape == (200, 2)
    assert drawn_RM[:, 0].tolist() == drawn_RM[:, 1].tolist()
    # the same by hand, from the same generator
    members = {"a": [0, 2], "b": [1], "c": [3, 4], "d": [5]}
    for order, found in zip(np.random.default_rng(3).integers(4, size=(200, 4)), drawn_RM[:, 0], strict=True):
        rows = [row for place in order for row in members["abcd"[place]]]
        assert found == pytest.approx(sum(OVER[r] for r in rows) / sum(UNDER[r] for r in rows))


def test_the_interval_of_a_mean_is_bootstrap_cis():
    right = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    drawn_RM = resample([Ratio.mean(right)], Groups(KEYS), seed=7)
    assert interval(drawn_RM[:, 0], 4 / 6) == pytest.approx(bootstrap_ci(right, KEYS, seed=7))


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
    # by hand on angles: draws have a mean of 0.9, the metric 0.7; so it is biased by 0.2, and 0.5 is the corrected one
    angles_R = 0.9 + 0.1 * np.linspace(-1, 1, 201)
    drawn = DrawnMetric(np.sin(0.7) ** 2, np.sin(angles_R) ** 2, Support(1000.0, 1.0))
    low, high = np.arcsin(np.sqrt(drawn.interval()))
    assert (low, high) == pytest.approx((0.5 - 0.095, 0.7 + 0.095))
    wider = DrawnMetric(drawn.value, drawn.values_R, Support(1000.0, 4.0))
    low, high = np.arcsin(np.sqrt(wider.interval()))
    assert (low, high) == pytest.approx((0.5 - 0.19, 0.7 + 0.19))
    # the other way round
    drawn = DrawnMetric(np.sin(1.1) ** 2, np.sin(angles_R) ** 2, Support(1000.0, 1.0))
    low, high = np.arcsin(np.sqrt(drawn.interval()))
    assert (low, high) == pytest.approx((1.1 - 0.095, 1.3 + 0.095))


def test_few_that_are_wrong_are_not_believed():
    drawn_R = np.full(50, 0.97)
    assert DrawnMetric(0.97, drawn_R, Support(100.0, 1.0)).interval() == pytest.approx(wilson(0.97, 100))
    low, high = DrawnMetric(0.9, np.linspace(0.88, 0.92, 50), Support(100.0, 1.0)).interval()
    assert 0.87 < low < 0.9 < high < 0.93


def test_chance_has_two_sides_and_fits_the_interval():
    draws_R = np.concatenate([np.full(10, -0.1), np.full(190, 0.3)])
    for sign in (1, -1):
        assert DrawnMetric(0.28 * sign, draws_R * sign, Support(None)).chance() == pytest.approx(2 * 10 / 200)
    assert DrawnMetric(0.3, np.full(200, 0.3), Support(None)).chance() == 1 / 200
    assert DrawnMetric(0.0, np.zeros(200), Support(None)).chance() == 1.0
    # biased by 0.1: from 0.1, the corrected one, 20 of 200 draws reach 0; from 0.2 none does
    spread_R = 0.2 * np.where(np.arange(200) % 10 == 0, -1.0, 1 / 9)
    biased = DrawnMetric(0.2, 0.3 + spread_R, Support(None, 1.0))
    assert biased.chance() == pytest.approx(2 * 20 / 200)
    assert biased.interval()[0] <= 0 < biased.interval()[1]


# Of plain means


@pytest.mark.parametrize(("n", "p"), [(400, 0.9), (2000, 0.5)])
def test_bootstrap_agrees_with_the_binomial(n, p):
    right = [1.0] * round(n * p) + [0.0] * (n - round(n * p))
    low, high = bootstrap_ci(right, seed=1)
    half = 1.959964 * math.sqrt(p * (1 - p) / n)
    assert low == pytest.approx(p - half, abs=0.15 * half)
    assert high == pytest.approx(p + half, abs=0.15 * half)


def test_questions_about_one_clip_are_drawn_together():
    # every clip has ten questions that are all right or all wrong: only 50 independent draws
    groups = [clip for clip in range(50) for _ in range(10)]
    right = [float(clip % 2) for clip in groups]
    low, high = bootstrap_ci(right, groups)
    half = 1.959964 * math.sqrt(0.25 / 50)
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.2 * half)
    assert high - low > 2.5 * np.subtract(*reversed(bootstrap_ci(right)))


def test_bootstrap_of_unequal_groups_is_that_of_a_ratio():
    # drawn by hand in plain Python with the same numbers
    values, groups = [1.0, 0.0, 0.0, 1.0, 1.0], ["a", "a", "a", "b", "c"]
    rng = np.random.default_rng(3)
    sums, counts = {"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 3, "b": 1, "c": 1}
    means = []
    for drawn in rng.integers(3, size=(1000, 3)):
        names = ["abc"[i] for i in drawn]
        means.append(sum(sums[x] for x in names) / sum(counts[x] for x in names))
    expected = np.quantile(means, [0.025, 0.975])
    assert bootstrap_ci(values, groups, resamples=1000, seed=3) == pytest.approx(tuple(expected))


def test_bootstrap_is_seeded_and_degenerate_cases_hold():
    values = [1.0, 0.0, 1.0, 1.0]
    assert bootstrap_ci(values, seed=5) == bootstrap_ci(values, seed=5)
    assert bootstrap_ci([1.0] * 20) == (1.0, 1.0)  # of any numbers; `Ratio.right` knows that they are right or wrong
    assert all(math.isnan(end) for end in bootstrap_ci([]))


def test_an_interval_holds_the_mean_added_up_one_by_one():
    for n in range(1, 30):
        for value in (0.1, 0.7, 1 / 3):
            low, high = bootstrap_ci([value] * n, resamples=10)
            assert low <= sum([value] * n) / n <= high
