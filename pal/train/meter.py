"""What a run counts: steps, time, rows, clips, tokens; and when it looks at what the device has computed."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any, NamedTuple

import torch

from pal.train.objectives import MicroBatch
from pal.train.sources import trained_tokens
from pal.train.step import StepResult

_SHOWN = 8
"""Records that a message names."""


def new_totals() -> dict[str, float]:
    """Of a stage that begins; they go into checkpoints and `train.json`."""
    return {"steps": 0, "seconds": 0.0, "rows": 0, "clips": 0, "audio_seconds": 0.0, "tokens": 0, "loss": 0.0}


class StepInputs(NamedTuple):
    """What one step was given, as far as anyone asks once it is done; counts are those of this process."""

    rows: int
    """Repeated ones included, that only keep processes in step."""
    totals: dict[str, float]
    """What it adds to the stage's."""
    records: list[str]
    """Names of the first few records, for a message."""
    more: int
    """How many others there were."""
    operations: float = 0.0
    """Floating-point operations by the cost model."""


def step_inputs(micro_batches: list[MicroBatch], rate: int, unit: str, operations: float = 0.0) -> StepInputs:
    """What is kept of the works of a step; not their sound, which is large.

    Args:
        works: of the step.
        rate: Hz of the waveforms.
        unit: of the objective's items.
        operations: of the step.
    """
    counted = [micro_batch.batch for micro_batch in micro_batches if micro_batch.counts]
    totals: dict[str, float] = {
        "steps": 1,
        "rows": sum(len(batch.conversations) for batch in counted),
        "clips": sum(len(batch.clips) for batch in counted),
        "audio_seconds": sum(batch.seconds(rate) for batch in counted),
        "tokens": sum(trained_tokens(batch) for batch in counted) if unit == "tokens" else 0,
    }
    records = [record for micro_batch in micro_batches for record in micro_batch.batch.records]
    rows = sum(len(micro_batch.batch.conversations) for micro_batch in micro_batches)
    return StepInputs(rows, totals, records[:_SHOWN], max(0, len(records) - _SHOWN), operations)


class StepMetrics(NamedTuple):
    """What came of one step, over all processes."""

    loss: float
    """Mean over the items."""
    items: int
    """Trained tokens, or clips."""
    gradient_norm: float
    """Before it was clipped."""
    hits: int = 0
    tries: int = 0
    """What an objective counts as right, of how many; see `LossOutput`."""


class NonFiniteStep(NamedTuple):
    """The first step whose loss or gradient was not finite."""

    what: str
    given: StepInputs
    undone: int
    """Steps that were begun and changed nothing: it, and all after it."""


class Meter:
    """Takes note of each step, and reads from the device what came of those since the last time.

    Args:
        unit: what the items are.
        total: the stage's totals, to which steps are added when they are read.
        peak: operations a second that the card can do, where that is known.
    """

    def __init__(self, unit: str, total: dict[str, float], peak: float | None = None) -> None:
        self.unit = unit
        self.total = total
        self.peak = peak
        self.seconds: list[float] = []
        """Of every step that was read, without the wait for its data."""
        self._pending: list[tuple[StepResult, StepInputs]] = []
        self._busy = 0.0
        self._lost = 0.0
        self._began = time.monotonic()
        self._start()

    def _start(self) -> None:
        self._steps: list[StepMetrics] = []
        self._rows = 0
        self._waited = 0.0
        self._operations = 0.0

    def add(self, told: StepResult, given: StepInputs, began: float, ready: float) -> None:
        """Take note of a step that ends now.

        Args:
            told: what it left on the device.
            given: what it was given.
            began: time of the clock at which its data were there.
            ready: time at which it began to wait for them.
        """
        self._pending.append((told, given))
        self._busy += time.monotonic() - began
        self._lost += began - ready

    def read(self) -> NonFiniteStep | None:
        """Wait for the steps that were begun and count them; the first that was not finite, where there is one.

        All are read at once. A step's seconds are then those of all of them, by their number.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return None
        began = time.monotonic()
        told_X4: list[list[float]] = torch.stack([told.numbers_4 for told, _ in pending]).tolist()
        now = time.monotonic()
        busy, passed = self._busy + now - began, now - self._began
        for i, ((told, given), (loss, norm, hits, tries)) in enumerate(zip(pending, told_X4, strict=True)):
            for what, number in (("the loss", loss), ("the gradient", norm)):
                if not math.isfinite(number):
                    return NonFiniteStep(what, given, len(pending) - i)
            self._count(given, busy / len(pending), passed / len(pending))
            self._steps.append(StepMetrics(loss / max(1.0, told.items), told.items, norm, int(hits), int(tries)))
        self._waited += self._lost
        self._busy, self._lost, self._began = 0.0, 0.0, now
        return None

    def _count(self, given: StepInputs, busy: float, passed: float) -> None:
        self.seconds.append(busy)
        self.total["seconds"] += passed
        for name, count in given.totals.items():
            self.total[name] += count
        self._rows += given.rows
        self._operations += given.operations

    def line(self) -> dict[str, Any]:
        """Means over the steps that were read since the last line."""
        steps = self._steps
        passed = sum(self.seconds[-len(steps) :]) + self._waited
        items = sum(step.items for step in steps)
        tries = sum(step.tries for step in steps)
        line = {
            "loss": sum(step.loss * step.items for step in steps) / max(1, items),
            "gradient_norm": max(step.gradient_norm for step in steps),
            self.unit: items,
            f"{self.unit}_per_second": round(items / passed, 1),
            "rows_per_second": round(self._rows / passed, 1),
            "step_seconds": round(self.median(len(steps)), 5),
            "wait_seconds": round(self._waited / len(steps), 5),
            "wait_share": round(self._waited / passed, 4),
        }
        if self.peak is not None:
            line["mfu"] = round(self._operations / passed / self.peak, 4)
        if tries:
            line["accuracy"] = round(sum(step.hits for step in steps) / tries, 4)
        self._start()
        return line

    def median(self, last: int | None = None) -> float:
        """Seconds of a step: the median over all steps, or the last few."""
        seconds = self.seconds[-last:] if last else self.seconds
        return statistics.median(seconds) if seconds else 0.0
