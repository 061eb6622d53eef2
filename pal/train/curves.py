"""The log of a run, and its loss curves as a plot."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pal.files import write_bytes, write_text
from pal.plots import colour_of, escape_label, render, style_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pal.train.tracking import TrackedRun, Trackers

Curve = Sequence[tuple[float, float]]
"""Points (step, loss)."""
Borders = Sequence[tuple[float, str]]
"""(last step before the stage, name of the stage) for each stage after the first."""


class Log:
    """JSON Lines training log. Opening it drops the lines of steps that a resumed run repeats.

    Args:
        path: path of the file.
        step: number of completed steps; lines of later steps are dropped.
        trackers: get all lines, too.
        run: that the trackers are told of.
    """

    def __init__(self, path: Path, step: int, trackers: Trackers | None = None, run: TrackedRun | None = None) -> None:
        self.path = path
        self.trackers = trackers
        lines = [line for line in read_log(path) if line["step"] <= step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        self._file = path.open("a", encoding="utf-8")
        if trackers is not None and run is not None:
            trackers.start(run, lines)

    def write(self, **values: Any) -> None:
        """Add a line."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        if self.trackers is not None:
            self.trackers.log(values)

    def close(self) -> None:
        """Flush to disk and close."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if self.trackers is not None:
            self.trackers.finish()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Lines of a log, without an incomplete last line."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_bytes().split(b"\n"):
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def log_fault(path: Path) -> str | None:
    """Where a log is damaged before its last line, so that `read_log` ends there; None where it is whole."""
    if not path.exists():
        return None
    lines = path.read_bytes().splitlines()
    read = len(read_log(path))
    return None if read >= len(lines) - 1 else f"{path.name} is damaged in line {read + 1} of {len(lines)}"


def draw(logs: Mapping[str, Path], picture: Path) -> bool:
    """Plot the loss of each run over the steps, as PNG.

    Args:
        logs: name of each run -> its `log.jsonl`.
        picture: the file to write.

    Returns:
        False, with a warning, if matplotlib is missing.
    """
    runs = {name: read_log(path) for name, path in logs.items()}
    curves = {name: loss_curve(lines) for name, lines in runs.items()}
    borders = {name: stage_borders(lines) for name, lines in runs.items()}
    rendered = render(partial(draw_losses, curves=curves, borders=borders), loss_size(len(curves)))
    if rendered is None:
        return False
    write_bytes(picture, rendered.png)
    return True


def loss_curve(lines: Sequence[Mapping[str, Any]]) -> Curve:
    """The loss of each line of a log."""
    return [(line["step"], line["loss"]) for line in lines]


def stage_borders(lines: Sequence[Mapping[str, Any]]) -> Borders:
    """Borders between the stages of a log."""
    return [(one["step"], two["stage"]) for one, two in pairwise(lines) if one["stage"] != two["stage"]]


def loss_size(runs: int) -> tuple[float, float]:
    """Width and height in inches of the plot of `draw_losses`, for this number of runs."""
    return 8.0, max(4.5, 0.6 + 0.17 * runs)


def draw_losses(figure: Figure, curves: Mapping[str, Curve], borders: Mapping[str, Borders]) -> None:
    """Plot losses over steps: logged values (pale) and their running mean (bold).

    Args:
        figure: an empty one.
        curves: name of each run -> its curve; those without points are left out.
        borders: name of each run -> borders of its stages. Borders that all runs share are vertical lines, the others
            are markers on their run's curve.
    """
    axes: Axes = figure.subplots()
    curves = {name: curve for name, curve in curves.items() if curve}
    shared = set.intersection(*(set(borders.get(name, ())) for name in curves)) if curves else set()
    for place, (name, curve) in enumerate(curves.items()):
        steps, losses = zip(*curve, strict=True)
        mean, colour = smooth(losses), colour_of(place)
        axes.plot(steps, losses, color=colour, alpha=0.35, lw=0.8)
        axes.plot(steps, mean, color=colour, ls=style_of(place)["ls"], lw=1.6, label=escape_label(name))
        own = [(step, stage) for step, stage in borders.get(name, ()) if (step, stage) not in shared]
        for step, stage in own:
            at = min(range(len(steps)), key=lambda i: abs(steps[i] - step))
            axes.plot([steps[at]], [mean[at]], color=colour, marker=style_of(place)["marker"])
            axes.annotate(
                escape_label(stage), (steps[at], mean[at]), xytext=(3, 3), textcoords="offset points", fontsize=7
            )
    for step, stage in sorted(shared):
        axes.axvline(step, color="grey", lw=0.6, ls="--")
        axes.text(step, 0.985, f" {escape_label(stage)}", transform=axes.get_xaxis_transform(), fontsize=7, va="top")
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.grid(alpha=0.25)
    if curves:
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average with bias correction."""
    smooth, total, seen = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        seen = weight * seen + (1 - weight)
        smooth.append(total / seen)
    return smooth
