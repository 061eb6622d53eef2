"""Plots of pages in numbers: where marks and labels stand; and that the page's colours can be read."""

import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from pal.plots import DPI, TIME, colour_of
from pal.report import page, plots
from pal.train.curves import draw_losses, loss_size

STYLE = Path(page.__file__).with_name("look") / "style.css"


def drawn(draw, size=(8.0, 4.5), **numbers):
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    draw(figure, **numbers)
    figure.canvas.draw()
    return figure


@pytest.mark.parametrize("count", [2, 9, 40])
def test_every_curve_is_named_beside_the_plot(count):
    curves = {f"run-{i}": [(1, 2.0), (50, 0.1), (100, 0.001 * i)] for i in range(count)}
    figure = drawn(draw_losses, loss_size(count), curves=curves, borders={})
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.texts] == list(curves)
    box, whole = legend.get_window_extent(), figure.bbox
    assert box.y0 >= 0 and box.y1 <= whole.y1 and box.x1 <= whole.x1
    assert figure.axes[0].get_window_extent().x1 <= box.x0 + 2


def test_stages_that_all_share_are_lines_and_others_marks():
    curves = {"a": [(10, 1.0), (20, 0.5)], "b": [(10, 1.0), (20, 0.7)], "not begun": []}
    figure = drawn(draw_losses, curves=curves, borders={"a": [(10, "join")], "b": [(10, "join")]})
    assert [text.get_text() for text in figure.axes[0].texts] == [" join"]
    assert [line.get_xdata() for line in figure.axes[0].lines if line.get_color() == "grey"] == [[10, 10]]
    figure = drawn(draw_losses, curves=curves, borders={"a": [(10, "join")], "b": []})
    (mark,) = (line for line in figure.axes[0].lines if len(line.get_xdata()) == 1)
    assert (mark.get_color(), list(mark.get_xdata()), list(mark.get_ydata())) == (colour_of(0), [10], [1.0])


def test_nothing_logged_yet_is_an_empty_plot():
    assert not drawn(draw_losses, curves={"a": []}, borders={"a": []}).axes[0].lines


def test_scores_stand_where_they_belong():
    scores = {
        "presence": {"b": {"score": 0.75, "ci95": None}},
        "all": {"a": {"score": 0.5, "ci95": (0.25, 1.0), "no_audio_score": 0.0}, "b": {"score": None, "ci95": None}},
    }
    figure = drawn(plots.draw_scores, plots.score_size(scores), scores=scores)
    (axes,) = figure.axes
    labels = {label.get_text(): label.get_weight() for label in axes.get_yticklabels()}
    assert labels == {"presence": "normal", "all": "bold"}
    lines = {
        (line.get_color(), tuple(line.get_xdata())): list(line.get_ydata())
        for line in axes.lines
        if len(line.get_xdata())
    }
    (b, a), (low, high) = (colour_of(0), colour_of(1)), axes.get_ylim()
    assert low > high  # the first row stands above
    assert set(lines) == {(a, (0.5,)), (a, (0.25, 1.0)), (a, (0.0,)), (b, (0.75,))}
    assert {round(lines[a, x][0], 3) for x in ((0.5,), (0.25, 1.0), (0.0,))} == {1.175}
    assert round(lines[b, (0.75,)][0], 3) == -0.175
    assert [label.get_text() for label in axes.get_xticklabels()][-1].endswith("%")
    assert [text.get_text() for text in figure.legends[0].texts] == ["b", "a", "the same model without audio"]


def test_a_metric_beyond_one_has_an_axis_of_its_own():
    scores = {"all": {"a": {"score": 1.7, "ci95": (1.2, 2.2)}}}
    (axes,) = drawn(plots.draw_scores, plots.score_size(scores), scores=scores).axes
    assert not any("%" in label.get_text() for label in axes.get_xticklabels())
    assert axes.get_xlim()[1] >= 2.2 and axes.get_xlim()[0] == 0


def test_rows_have_room_for_all_series():
    many = {f"row {i}": {f"run {k}": {"score": 0.5, "ci95": None} for k in range(8)} for i in range(3)}
    (axes,) = drawn(plots.draw_scores, plots.score_size(many), scores=many).axes
    heights = np.diff(sorted(axes.transData.transform((0.5, line.get_ydata()[0]))[1] for line in axes.lines[:8]))
    assert heights.min() > 0.08 * DPI


def test_a_spectrogram_shows_a_tone_at_its_pitch_and_time():
    rate = 16_000
    samples_N = np.zeros(2 * rate, np.float32)
    samples_N[rate:] = np.sin(2 * np.pi * 1000 * np.arange(rate) / rate)
    figure = drawn(
        plots.draw_spectrogram, samples_N=samples_N, rate=rate, events=[("tone", 1.0, 2.0), ("beep", 1.5, 1.6)]
    )
    upper, lower = figure.axes
    assert upper.get_gid() == TIME and upper.get_xlim() == (0, 2)
    (mesh,) = upper.collections
    level_FX = mesh.get_array()
    corners = mesh.get_coordinates()
    f, x = np.unravel_index(level_FX.argmax(), level_FX.shape)
    assert corners[f, x, 1] <= 1000 <= corners[f + 1, x, 1]
    assert corners[f, x, 0] > 0.98
    loud_X = level_FX[f] > level_FX.max() - 20
    begins = corners[0, np.flatnonzero(loud_X)[0], 0]
    assert begins == pytest.approx(1.0, abs=0.02)
    assert [(bar.get_x(), round(bar.get_width(), 3), round(bar.get_y() + 0.4)) for bar in lower.patches] == [
        (1.0, 1.0, 0),
        (1.5, 0.1, 1),
    ]
    assert [text.get_text().strip() for text in lower.texts] == ["tone", "beep"]


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_can_be_read(mode):
    """WCAG 2.2, 1.4.3: 4.5 to 1 for text."""
    light, dark = re.findall(r":root \{(.*?)\}", STYLE.read_text(), re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", light if mode == "light" else dark))
    pairs = [(ink, paper) for ink in ("ink", "soft", "link", "right", "wrong") for paper in ("paper", "ground")]
    for ink, paper in [*pairs, ("warn", "warn-paper")]:
        high, low = sorted((luminance(colours[ink]), luminance(colours[paper])), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, paper)
