"""How the probes' pictures tell lines apart: by colour and by marker, readable to colour-blind eyes and in grey."""

from typing import Any

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's palette, the ones that are dark enough for lines."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def style_of(place: int) -> dict[str, Any]:
    """Colour and marker of the line at `place` of a picture, as matplotlib's `plot` takes them."""
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}
