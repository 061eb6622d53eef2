"""What a run counts: steps, time, rows, clips, tokens."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

from pal.train.objectives import Work
from pal.train.sources import trained_tokens


def new_totals() -> dict[str, float]:
    """Of a stage that begins; they go into checkpoints and `train.json`."""
    return {"steps": 0, "seconds": 0.0, "rows": 0, "clips": 0, "audio_seconds": 0.0, "tokens": 0, "loss": 0.0}


def count_in(total: dict[str, float], works: list[Work], seconds: float, rate: int, unit: str) -> None:
    """Add a step of `seconds` to the totals; rows, clips and tokens are those of this process."""
    total["steps"] += 1
    total["seconds"] += seconds
    for work in works:
        if work.counts:
            total["rows"] += len(work.batch.rows)
            total["clips"] += len(work.batch.clips)
            total["audio_seconds"] += work.batch.seconds(rate)
            total["tokens"] += trained_tokens(work.batch) if unit == "tokens" else 0


class Step(NamedTuple):
    """What came of one step, over all processes."""

    loss: float
    """Mean over the items."""
    items: int
    """Trained tokens, or clips."""
    gradient_norm: float
    """Before it was clipped."""
    hits: int = 0
    tries: int = 0
    """What an objective counts as right, of how many; see `Outcome`."""


class Meter:
    """What the log says about the steps since its last line."""

    def __init__(self, unit: str) -> None:
        self.unit = unit
        """What the items are."""
        self.seconds: list[float] = []
        """Of every step, without the wait for its data."""
        self._start()

    def _start(self) -> None:
        self.steps: list[Step] = []
        self.rows = 0
        self.waited = 0.0

    def add(self, step: Step, seconds: float, waited: float, works: list[Work]) -> None:
        """Add a step, its seconds and those of the wait for its data."""
        self.steps.append(step)
        self.seconds.append(seconds)
        self.waited += waited
        self.rows += sum(len(work.batch.rows) for work in works)

    def line(self) -> dict[str, Any]:
        """Means since the last line."""
        recent = self.seconds[-len(self.steps) :]
        passed = sum(recent) + self.waited
        items = sum(step.items for step in self.steps)
        tries = sum(step.tries for step in self.steps)
        line = {
            "loss": sum(step.loss * step.items for step in self.steps) / max(1, items),
            "gradient_norm": max(step.gradient_norm for step in self.steps),
            self.unit: items,
            f"{self.unit}_per_second": round(items / passed, 1),
            "rows_per_second": round(self.rows / passed, 1),
            "step_seconds": round(self.median(len(self.steps)), 5),
            "wait_seconds": round(self.waited / len(self.steps), 5),
        }
        if tries:
            line["accuracy"] = round(sum(step.hits for step in self.steps) / tries, 4)
        self._start()
        return line

    def median(self, last: int | None = None) -> float:
        """Seconds of a step: the median over all steps, or the last few."""
        seconds = self.seconds[-last:] if last else self.seconds
        return statistics.median(seconds) if seconds else 0.0
