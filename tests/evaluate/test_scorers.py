"""Scoring rules against hand-made examples and, for the bootstrap, against the normal approximation."""

import math

import numpy as np
import pytest

from pal.evaluate.score import Accuracy, ItemResult, jsonable
from pal.evaluate.scorers import best_choice, bootstrap_ci, exact_match, normalise


@pytest.mark.parametrize(
    ("prediction", "reference", "same"),
    [
        ("Dog.", "dog", True),
        ("  A dog ", "the dog", True),
        ("high-pitched", "high pitched", True),
        ("dog, then cat", "dog then cat", True),
        ("ｄｏｇ", "dog", True),
        ("dog cat", "cat dog", False),
        ("a dog barks", "a dog", False),
        ("C#", "C", False),
        ("a", "A", True),
        ("a", "the", False),
        ("2.5", "25", False),
        ("", "dog", False),
        ("?", "!", False),
        ("…", " … ", True),
        ("", "?", False),
    ],
)
def test_exact_match(prediction, reference, same):
    assert exact_match(prediction, reference) is same
    assert exact_match(reference, prediction) is same


def test_normalise_is_idempotent():
    for text in ("The  Dog!", "a", "An alarm; a bell", "C# minor"):
        assert normalise(normalise(text)) == normalise(text)


def test_best_choice_takes_the_highest_and_never_nan():
    assert best_choice([-3.0, -1.0, -2.0], ["a", "b", "c"]) == "b"
    assert best_choice([-1.0, -1.0], ["a", "b"]) == "a"
    assert best_choice([math.nan, -9.0], ["a", "b"]) == "b"


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
    for draw in rng.integers(3, size=(1000, 3)):
        names = ["abc"[i] for i in draw]
        means.append(sum(sums[x] for x in names) / sum(counts[x] for x in names))
    expected = np.quantile(means, [0.025, 0.975])
    assert bootstrap_ci(values, groups, resamples=1000, seed=3) == pytest.approx(tuple(expected))


def test_bootstrap_is_seeded_and_degenerate_cases_hold():
    values = [1.0, 0.0, 1.0, 1.0]
    assert bootstrap_ci(values, seed=5) == bootstrap_ci(values, seed=5)
    assert bootstrap_ci([1.0] * 20) == (1.0, 1.0)  # of any numbers; `Accuracy` knows that they are right or wrong
    assert all(math.isnan(end) for end in bootstrap_ci([]))


def test_accuracy_by_hand():
    pairs = [(True, True), (True, False), (True, False), (False, False), (False, True)]
    items = [
        ItemResult(str(i), "q", "r", correct=heard, no_audio_correct=deaf, group=str(i))
        for i, (heard, deaf) in enumerate(pairs)
    ]
    accuracy = Accuracy.of(items)
    assert (accuracy.n, accuracy.score, accuracy.no_audio_score) == (5, 0.6, 0.4)
    assert accuracy.gain == pytest.approx(0.2)
    assert accuracy.gain_ci95 is not None
    assert accuracy.gain_ci95[0] < 0.2 < accuracy.gain_ci95[1]
    # the percentiles of earlier versions
    assert accuracy.ci95 == bootstrap_ci([1.0, 1.0, 1.0, 0.0, 0.0], list("01234"))
    assert accuracy.gain_ci95 == bootstrap_ci([0.0, 1.0, 1.0, 0.0, -1.0], list("01234"))
    items[0].no_audio_correct = None
    assert Accuracy.of(items).no_audio_score is None


def test_an_accuracy_of_one_is_not_certain():
    items = [ItemResult(str(i), "q", "r", correct=True, no_audio_correct=False, group=str(i // 2)) for i in range(20)]
    accuracy = Accuracy.of(items)
    assert accuracy.ci95 == pytest.approx((10 / (10 + 1.959964**2), 1.0), abs=1e-6)  # ten clips
    assert accuracy.no_audio_ci95 == pytest.approx((0.0, 1.959964**2 / (10 + 1.959964**2)), abs=1e-6)


def test_json_has_no_nan():
    assert jsonable({"a": (math.nan, 1.5), "b": [math.inf]}) == {"a": [None, 1.5], "b": [None]}


def test_an_interval_holds_the_mean_added_up_one_by_one():
    for n in range(1, 30):
        for value in (0.1, 0.7, 1 / 3):
            low, high = bootstrap_ci([value] * n, resamples=10)
            assert low <= sum([value] * n) / n <= high
