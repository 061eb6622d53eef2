import numpy as np
import pytest

from pal.probe.threshold import threshold

POINTS = (0.0, 0.1, 0.2, 0.4, 0.8, 1.6)


def counts(accuracy, units=40, each=10):
    """Each unit's right answers at their expectation, dithered so that the whole is exact."""
    asked = np.full((units, len(POINTS)), float(each))
    return np.round(np.linspace(0, 1, units, endpoint=False)[:, None] + each * np.asarray(accuracy) - 0.5), asked


def logistic(at, slope, lapse):
    x = np.asarray(POINTS)
    share = 0.25 / (0.5 - lapse)
    return 0.5 + (0.5 - lapse) / (1 + np.exp(-((x - at) / slope + np.log(share / (1 - share)))))


@pytest.mark.parametrize("at", [0.15, 0.3, 0.6])
@pytest.mark.parametrize("lapse", [0.01, 0.1])
def test_the_planted_threshold_is_found(at, lapse):
    found = threshold(POINTS, *counts(logistic(at, 0.08, lapse)))
    assert found.at == pytest.approx(at, abs=0.05)
    step = 2 * (POINTS[-1] - POINTS[0]) / 180  # of the grid; the units are nearly alike, so intervals are narrow
    assert found.ci95[0] - step <= at <= found.ci95[1] + step
    assert found.ci95[1] - found.ci95[0] < 0.4


def test_fewer_questions_give_a_wider_interval():
    few = threshold(POINTS, *counts(logistic(0.3, 0.08, 0.01), units=8, each=2))
    many = threshold(POINTS, *counts(logistic(0.3, 0.08, 0.01)))
    assert many.ci95[1] - many.ci95[0] < few.ci95[1] - few.ci95[0]


def test_a_step_is_crossed_in_its_middle():
    found = threshold(POINTS, *counts([0.5, 0.5, 0.5, 0.5, 1.0, 1.0]))
    assert found.at == pytest.approx(0.6, abs=0.05)
    # nothing was asked between 0.4 and 0.8, so nothing there is known, however many answers there are
    assert found.ci95[0] == pytest.approx(0.45, abs=0.06) and found.ci95[1] == pytest.approx(0.75, abs=0.06)


@pytest.mark.parametrize(("accuracy", "side"), [(1.0, "above"), (0.9, "above"), (0.5, "below"), (0.6, "below")])
def test_no_crossing_is_said(accuracy, side):
    found = threshold(POINTS, *counts([accuracy] * len(POINTS)))
    assert (found.at, found.ci95) == (None, None)
    assert found.says == f"no crossing: {side} 75% from 0 to 1.6"
    assert found.crossing < 0.05


def test_the_same_seed_gives_the_same_interval():
    data = counts(logistic(0.3, 0.2, 0.06), units=10)
    assert threshold(POINTS, *data, seed=3) == threshold(POINTS, *data, seed=3)


def test_an_interval_holds_its_threshold(monkeypatch):
    """Whatever is drawn: few units, answered by chance, and a single draw, which may lie on one side."""
    monkeypatch.setattr("pal.probe.threshold.RESAMPLES", 1)
    rng, crossed = np.random.default_rng(0), 0
    for seed in range(40):
        units = int(rng.integers(1, 4))
        asked = np.full((units, len(POINTS)), 2.0)
        found = threshold(POINTS, rng.integers(0, 3, asked.shape).astype(float), asked, seed)
        if found.at is not None:
            crossed += 1
            assert found.ci95[0] <= found.at <= found.ci95[1]
    assert crossed > 5
