"""Figures in numbers: where marks and labels stand, and that their colours can be read."""

import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pal.report import figures

STYLE = Path(figures.__file__).with_name("look") / "style.css"


def parsed(svg):
    return ElementTree.fromstring(svg)


@pytest.mark.parametrize("count", [2, 9, 40])
def test_labels_of_curves_that_end_alike_do_not_cover_each_other(count):
    curves = {f"run-{i}": [(1, 2.0), (50, 0.1), (100, 0.001 * i)] for i in range(count)}
    root = parsed(figures.loss_curves(curves))
    height = float(root.get("viewBox").split()[3])
    at = sorted(float(e.get("y")) for e in root.iter("text") if "own" in (e.get("class") or ""))
    assert len(at) == count
    assert all(b - a >= 14.9 for a, b in pairwise(at))
    assert at[0] > 0 and at[-1] < height


def test_stages_that_all_share_are_lines_and_others_marks():
    curves = {"a": [(10, 1.0), (20, 0.5)], "b": [(10, 1.0), (20, 0.7)]}
    shared = figures.loss_curves(curves, {"a": [(10, "join")], "b": [(10, "join")]})
    assert [e.text for e in parsed(shared).iter("text")].count("join") == 1
    assert "begins" not in shared
    apart = figures.loss_curves(curves, {"a": [(10, "join")], "b": []})
    assert [e.text for e in parsed(apart).iter("title")] == ["a: join begins"]


def test_long_curves_are_drawn_by_means():
    (line, _) = parsed(figures.loss_curves({"a": [(i, float(i % 2)) for i in range(2000)]})).iter("polyline")
    points = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
    assert len(points) == 500
    assert len({y for _, y in points}) == 1  # four points of 0, 1, 0, 1 each


def test_scores_stand_where_they_belong():
    scores = {
        "all": {"a": {"score": 0.5, "ci95": (0.25, 1.0), "no_audio_score": 0.0}, "b": {"score": 1.0, "ci95": None}}
    }
    root = parsed(figures.score_intervals(scores, "label"))
    ticks = {e.text: float(e.get("x")) for e in root.iter("text") if (e.text or "").endswith("%")}
    group = next(g for g in root.iter("g") if g.find("title") is not None)
    interval, deaf = group.findall("line")
    assert group.find("title").text == "a, all: 0.500 (0.250 to 1.000), without audio 0.000"
    assert float(interval.get("x1")) == pytest.approx(ticks["25%"], abs=0.1)
    assert float(interval.get("x2")) == pytest.approx(ticks["100%"], abs=0.1)
    assert float(group.find("circle").get("cx")) == pytest.approx(ticks["50%"], abs=0.1)
    assert float(deaf.get("x1")) == pytest.approx(ticks["0%"], abs=0.1)


def test_a_metric_beyond_one_has_an_axis_of_its_own():
    root = parsed(figures.score_intervals({"all": {"a": {"score": 1.7, "ci95": (1.2, 2.2)}}}, "CIDEr-D"))
    labels = [e.text for e in root.iter("text")]
    assert "2.5" in labels and not any("%" in (text or "") for text in labels)


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_and_series_can_be_read(mode):
    """WCAG 2.2, 1.4.3: 4.5 to 1 for text."""
    light, dark = re.findall(r":root \{(.*?)\}", STYLE.read_text(), re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", light if mode == "light" else dark))
    assert {f"s{i}" for i in range(figures.COLOURS)} < set(colours)
    pairs = [(ink, paper) for ink in ("ink", "soft", "link", "right", "wrong") for paper in ("paper", "ground")]
    pairs += [(f"s{i}", "paper") for i in range(figures.COLOURS)] + [("warn", "warn-paper"), ("ink", "event")]
    for ink, paper in pairs:
        high, low = sorted((luminance(colours[ink]), luminance(colours[paper])), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, paper)
