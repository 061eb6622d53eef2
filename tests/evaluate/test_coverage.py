"""95 % intervals hold the truth: few of `coverage`'s cases and data sets, enough to notice a method that does not."""

import pytest

from tests.evaluate.coverage import CASES, EVEN, ONE_OF, SOME_OF, Case, accuracy, macro_f1, mean_ap, measured

HARD = [
    Case("accuracy, near perfect", accuracy(0.99), 20),
    Case("accuracy, several questions a clip", accuracy(0.6), 50, 5),
    Case("macro F1, rare labels", macro_f1(0.8, ONE_OF), 100),
    Case("macro F1, near perfect, several questions a clip", macro_f1(0.97, ONE_OF), 60, 2),
    Case("mAP, rare labels", mean_ap(2.5, SOME_OF), 100),
    Case("mAP, near perfect", mean_ap(5.0, EVEN), 50),
    Case("mAP, several questions a clip", mean_ap(2.5, EVEN), 50, 3),
]


@pytest.mark.parametrize("case", HARD, ids=lambda case: case.name)
def test_intervals_hold_the_truth(case, monkeypatch):
    monkeypatch.setattr("pal.evaluate.label_metrics.LabelMetric.resamples", 100)
    sets = 60
    found = measured(case, sets)
    assert found.holds_own == 1.0
    # of 60 intervals that hold it 95 times in a hundred, 52 or fewer do with a chance of one in a hundred
    assert found.holds_population > 52 / 60
    assert found.holds_mean > 52 / 60


@pytest.mark.parametrize("of", [accuracy(1.0), macro_f1(1.0, ONE_OF), mean_ap(50.0, SOME_OF)])
def test_a_perfect_models_intervals_hold_one(of, monkeypatch):
    monkeypatch.setattr("pal.evaluate.label_metrics.LabelMetric.resamples", 100)
    found = measured(Case("perfect", of, 30), 8)
    assert (found.population, found.mean) == pytest.approx((1.0, 1.0))
    assert found.holds_own == 1.0 and found.width > 0.05


def test_the_full_simulation_has_all_kinds():
    kinds = {(case.name.split(",")[0].split()[0], case.questions > 1) for case in CASES}
    assert kinds == {(kind, several) for kind in ("accuracy", "macro", "mAP") for several in (True, False)}
