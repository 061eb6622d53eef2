"""Runs on the same questions against one another, and which are refused."""

import math
from dataclasses import replace

import pytest

from pal.errors import ConfigError
from pal.evaluate import evaluate
from pal.evaluate.benchmark import Benchmark
from pal.evaluate.compare import compare
from pal.evaluate.items import Item
from pal.evaluate.rescoring import rescore
from tests import published
from tests.evaluate.scripted import CHOICES, Scripted


def test_compare(model, benchmark, tmp_path):
    say = Scripted(model, lambda prompt, heard: "yes" if "Is it 1" in prompt else "no")
    evaluate(say, benchmark, tmp_path / "a", progress=False)
    say = Scripted(model, lambda prompt, heard: "yes" if "Is it 0" not in prompt else "no")
    evaluate(say, benchmark, tmp_path / "b", progress=False)
    found = compare([tmp_path / "a", tmp_path / "b", tmp_path / "a"])
    assert [row.score for row in found.rows] == [0.25, 0.75, 0.25]
    second, third = found.rows[1:]
    assert (second.difference, second.only_first, second.only_this) == (0.5, 0, 10)
    assert second.difference_ci95 == (0.5, 0.5)
    # ten that only the second has: the two tails of ten fair coins that all fall alike
    assert second.p_mcnemar == pytest.approx(2 / 2**10)
    assert second.p_bootstrap == 1 / 2000
    assert (third.difference, third.p_mcnemar, third.p_bootstrap) == (0.0, 1.0, 1.0)
    with pytest.raises(ConfigError, match="at least two"):
        compare([tmp_path / "a"])
    evaluate(say, benchmark, tmp_path / "short", progress=False, limit=3)
    with pytest.raises(ConfigError, match="different questions"):
        compare([tmp_path / "a", tmp_path / "short"])
    rescore(tmp_path / "b", {"name": "token_sets"})
    with pytest.raises(ConfigError, match="the rule differs"):
        compare([tmp_path / "a", tmp_path / "b"])


def test_compares_chance_has_two_sides(model, tmp_path):
    """Of six clips the first run knows one and the second the other five: draws that say otherwise, counted exactly."""
    items = []
    for number in range(6):
        path = tmp_path / "audio" / f"{number}.wav"
        published.clip(path, 0.1 + 0.05 * number)
        items.append(Item(str(number), (str(path),), f"Is it {number}?", ("yes",), CHOICES))
    benchmark = Benchmark("made", tuple(items), {"name": "exact"}, tmp_path)
    for name, knows in (("a", "0"), ("b", "12345")):
        say = Scripted(
            model, lambda prompt, heard, knows=knows: "yes" if prompt.split("Is it ")[1][0] in knows else "no"
        )
        evaluate(say, benchmark, tmp_path / name, progress=False, no_audio=False)
    # a draw has the first clip k times: 6 - 2 k is not above 0 from three times on
    tail = sum(math.comb(6, k) * 5 ** (6 - k) for k in range(3, 7)) / 6**6
    for folders, by in (("ab", 4 / 6), ("ba", -4 / 6)):
        row = compare([tmp_path / name for name in folders]).rows[1]
        assert row.difference == pytest.approx(by)
        assert row.p_bootstrap == pytest.approx(2 * tail, abs=0.025)
        assert row.difference_ci95[0] <= by <= row.difference_ci95[1]
        assert row.p_mcnemar == pytest.approx(2 * (1 + 6) / 2**6)  # at most one of six fair coins


def test_runs_of_other_references_are_not_compared(model, benchmark, tmp_path):
    others = replace(benchmark, items=tuple(replace(item, references=("no",)) for item in benchmark.items))
    for name, asked in (("a", benchmark), ("b", others)):
        evaluate(Scripted(model, lambda prompt, heard: "yes"), asked, tmp_path / name, progress=False, no_audio=False)
    with pytest.raises(ConfigError, match="the data differs"):
        compare([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(ConfigError, match="'data_digest' differs"):
        evaluate(Scripted(model, lambda prompt, heard: "yes"), others, tmp_path / "a", progress=False, no_audio=False)
