"""The one way to plot: PNG, the same bytes for the same numbers, and nothing where matplotlib is missing."""

import sys

import pytest

from pal import plots


def line(figure):
    figure.subplots().plot([1, 2], [3, 4])


def test_the_same_plot_is_the_same_file():
    one, two = plots.render(line), plots.render(line)
    assert one.png.startswith(b"\x89PNG") and one == two
    assert one.time_axes == []


def test_size_is_in_inches():
    rendered = plots.render(line, (2.0, 1.0))
    width, height = (int.from_bytes(rendered.png[at : at + 4], "big") for at in (16, 20))
    assert (width, height) == (2 * plots.DPI, plots.DPI)


def test_without_matplotlib_there_is_none_and_a_line_says_so(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plots.render(line) is None
    assert "pip install 'pal-audio[plots]'" in caplog.text


def test_series_differ_in_more_than_colour():
    styles = [tuple(plots.style_of(place).values()) for place in range(4 * len(plots.COLOURS))]
    assert len(set(styles)) == len(styles)
    assert len({style[:2] for style in styles[: len(plots.COLOURS)]}) == len(plots.COLOURS)


@pytest.mark.parametrize("text", ["$x", "$a$ and $b", "_run", "a\x00b", "a\\$"])
def test_any_name_can_be_a_label(text):

    def draw(figure):
        figure.subplots().plot([1], [1], label=plots.escape_label(text))
        figure.legend()
        assert len(figure.legends[0].texts) == 1

    assert plots.render(draw)
