"""Parts of a score: durations and categories."""

import pytest

from pal.evaluate.result import DURATIONS, Answered, score
from pal.registry import build


def answered(seconds):
    return [
        Answered(str(n), [f"{n}.wav"], {}, length, "?", ["yes"], None, "yes" if n % 2 else "no")
        for n, length in enumerate(seconds)
    ]


def test_each_clip_is_in_one_duration():
    edges = [edge for pair in DURATIONS for edge in pair if edge not in (0.0, float("inf"))]
    items = answered([0.0, *edges, 1e6, None])
    parts = score("x", items, None, build("rule", "exact"), no_audio=False).durations
    assert sum(part["n"] for part in parts.values()) == len(items)
    assert parts["unknown"]["n"] == 1
    assert parts["0 to 2 s"]["n"] == 1  # 2 s itself is in the next
    assert all(part["no_audio_score"] is None and part["gain"] is None for part in parts.values())


@pytest.mark.parametrize("clips", [1, 4])
def test_a_single_clip_or_a_few_have_scores_with_intervals(clips):
    items = answered([1.0] * clips)
    result = score("x", items, None, build("rule", "exact"), no_audio=False)
    assert result.overall.score == (clips // 2) / clips
    low, high = result.overall.ci95
    assert 0 <= low <= result.overall.score <= high <= 1 and low < high
