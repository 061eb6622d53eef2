"""Plots with matplotlib, an optional dependency that no other module imports (`pip install 'pal-audio[plots]'`).

A plot is a function that draws into an empty figure. `render` makes a PNG of it: equal data give equal bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

Draw = Callable[["Figure"], None]
"""Function that draws a plot into an empty matplotlib figure."""

MISSING = "plots need matplotlib: pip install 'pal-audio[plots]'"
TIME = "time"
"""Group id (`set_gid`) of axes whose x axis is the time of a clip in seconds; `Rendered.time_axes` locates them."""
DPI = 120

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's palette for colour-blind readers, without the colours too light for lines."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""Marker of each colour, for prints in grey."""
_DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Rendered:
    """Rendered plot."""

    png: bytes
    time_axes: list[dict[str, float]]
    """For each axes with the group id `TIME`: `left`, `right`, `top` and `bottom` as fractions of the picture's width
    or height from the upper left corner, and `start` and `end`, the seconds at its left and right side."""


def render(draw: Draw, size: tuple[float, float] = (8.0, 4.5)) -> Rendered | None:
    """Render a plot as PNG; without matplotlib, log a warning and return None.

    Args:
        draw: the plot.
        size: width and height in inches.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("%s", MISSING)
        return None
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    draw(figure)
    file = BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return Rendered(file.getvalue(), _time_axes(figure))


def colour_of(index: int) -> str:
    """Colour of a plot's series, by its index."""
    return COLOURS[index % len(COLOURS)]


def style_of(index: int) -> dict[str, Any]:
    """Arguments of matplotlib's `plot` for a series, by its index: colour, marker and dashes."""
    dashes = _DASHES[index // len(COLOURS) % len(_DASHES)]
    return {"color": colour_of(index), "marker": MARKERS[index % len(MARKERS)], "ls": dashes}


def escape_label(text: str) -> str:
    """Escape text as a label: matplotlib parses `$` as mathematics, and legends omit labels that begin with `_`."""
    shown = printable(text).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def printable(text: str) -> str:
    """The text with a dot for each control character, for which fonts have no glyph."""
    return "".join(letter if letter.isprintable() else "·" for letter in text)


def _time_axes(figure: Figure) -> list[dict[str, float]]:
    """`Rendered.time_axes` of a figure; drawing it first fixes its layout."""
    found = []
    for axes in figure.axes:
        if axes.get_gid() == TIME:
            box, (start, end) = axes.get_position(), axes.get_xlim()
            sides = {"left": box.x0, "right": box.x1, "top": 1 - box.y1, "bottom": 1 - box.y0}
            found.append({name: float(value) for name, value in {**sides, "start": start, "end": end}.items()})
    return found
