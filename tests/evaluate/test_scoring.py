"""From answers to a result: the whole, its categories and durations, and what is read back."""

import pytest

from pal.evaluate.bootstrap import bootstrap_ci
from pal.evaluate.result import ItemResult, Result
from pal.evaluate.scoring import DURATIONS, score
from pal.registry import build


def answered(seconds):
    return [
        ItemResult(str(n), [f"{n}.wav"], {}, length, "?", ["yes"], None, "yes" if n % 2 else "no")
        for n, length in enumerate(seconds)
    ]


def scored(items, no_audio=False, labels=None, rule="exact"):
    settings = {"benchmark": "x", "labels": labels, "seed": 0, "no_audio": no_audio}
    return score(items, build("rule", rule), settings)


def test_each_clip_is_in_one_duration():
    edges = [edge for pair in DURATIONS for edge in pair if edge not in (0.0, float("inf"))]
    items = answered([0.0, *edges, 1e6, None])
    parts = scored(items).durations
    assert sum(part.n for part in parts.values()) == len(items)
    assert parts["unknown"].n == 1
    assert parts["0 to 2 s"].n == 1  # 2 s itself is in the next
    assert all(part.no_audio_score is None and part.gain is None for part in parts.values())


@pytest.mark.parametrize("clips", [1, 4])
def test_a_single_clip_or_a_few_have_scores_with_intervals(clips):
    items = answered([1.0] * clips)
    result = scored(items)
    assert result.overall.score == (clips // 2) / clips
    low, high = result.overall.ci95
    assert 0 <= low <= result.overall.score <= high <= 1 and low < high


def pairs(*correct, clip=str):
    """Items that are right or wrong with their audio and without it."""
    return [
        ItemResult(
            str(n),
            [clip(n)],
            {},
            1.0,
            "?",
            ["yes"],
            None,
            "yes" if right else "no",
            no_audio_output="yes" if no else "no",
        )
        for n, (right, no) in enumerate(correct)
    ]


def test_accuracy_by_hand():
    items = pairs((True, True), (True, False), (True, False), (False, False), (False, True))
    accuracy = scored(items, no_audio=True).overall
    assert (accuracy.n, accuracy.score, accuracy.no_audio_score) == (5, 0.6, 0.4)
    assert accuracy.gain == pytest.approx(0.2)
    assert accuracy.gain_ci95[0] < 0.2 < accuracy.gain_ci95[1]
    # the percentiles of earlier versions
    assert accuracy.ci95 == bootstrap_ci([1.0, 1.0, 1.0, 0.0, 0.0], list("01234"))
    assert accuracy.gain_ci95 == bootstrap_ci([0.0, 1.0, 1.0, 0.0, -1.0], list("01234"))
    assert scored(items).overall.no_audio_score is None


def test_an_accuracy_of_one_is_not_certain():
    accuracy = scored(pairs(*[(True, False)] * 20, clip=lambda n: str(n // 2)), no_audio=True).overall
    assert accuracy.ci95 == pytest.approx((10 / (10 + 1.959964**2), 1.0), abs=1e-6)  # ten clips
    assert accuracy.no_audio_ci95 == pytest.approx((0.0, 1.959964**2 / (10 + 1.959964**2)), abs=1e-6)


def test_what_is_saved_is_read_back(tmp_path):
    items = pairs((True, False), (False, False))
    items[1].category, items[1].before = {"asks": ["how"]}, [{"question": "What?", "answer": "a dog"}]
    result = scored(items, no_audio=True, labels=["yes", "no"])
    result.save(tmp_path / "deep" / "score.json")
    assert Result.load(tmp_path / "deep" / "score.json") == result
