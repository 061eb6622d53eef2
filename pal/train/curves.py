"""The log of a run, and its loss curves as a picture."""

from __future__ import annotations

import json
import logging
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

from pal.files import write_text

logger = logging.getLogger(__name__)


class Log:
    """JSON Lines, one for every few steps; what a resumed run does again is taken out first.

    Args:
        path: of the file.
        step: steps done; later lines are dropped.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        lines = [line for line in read_log(path) if line["step"] <= step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        self._file = path.open("a", encoding="utf-8")

    def write(self, **values: Any) -> None:
        """Add a line."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Put everything on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; the last one may be cut off by a kill and is then left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").split("\n"):
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def draw(logs: dict[str, Path], picture: Path) -> bool:
    """Loss over steps, a curve for each run, stages marked; written as PNG.

    Args:
        logs: name of each run -> its `log.jsonl`.

    Returns:
        False, with a line in the log, where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.info("no loss curves: matplotlib is not installed (pip install 'pal-audio[plots]')")
        return False
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, path in logs.items():
        lines = read_log(path)
        steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
        (curve,) = axes.plot(steps, losses, alpha=0.35, linewidth=0.8)
        axes.plot(steps, smooth(losses), color=curve.get_color(), label=name)
    if len(logs) == 1:
        for before, after in pairwise(lines):
            if before["stage"] != after["stage"]:
                axes.axvline(before["step"], color="grey", linewidth=0.6, linestyle="--")
                axes.text(before["step"], axes.get_ylim()[1], f" {after['stage']}", fontsize=7, va="top")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend()
    temporary = picture.with_name(f".{picture.name}")
    figure.savefig(temporary, format="png")
    temporary.replace(picture)
    return True


def smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Running mean that forgets exponentially, without a bias to its start."""
    smooth, total, seen = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        seen = weight * seen + (1 - weight)
        smooth.append(total / seen)
    return smooth
