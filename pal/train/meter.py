"""Metering of a run: steps, time, rows, clips, tokens, and deferred reads of losses from the device."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any, NamedTuple

import torch

from pal.train.objectives import MicroBatch
from pal.train.sources import trained_tokens
from pal.train.step import StepResult


def new_totals() -> dict[str, float]:
    """Zero totals of a new stage, for checkpoints and `train.json`."""
    counts = dict.fromkeys(("rows", "left_out", "skipped_steps", "clips"), 0)
    return {"steps": 0, "seconds": 0.0, **counts, "audio_seconds": 0.0, "tokens": 0, "loss": 0.0}


class StepInputs(NamedTuple):
    """Counts and record ids of this process's inputs of one step."""

    rows: int
    """Number of rows, including those repeated with weight 0 to give every process a batch."""
    totals: dict[str, float]
    """Added to the stage's totals."""
    records: list[str]
    """Ids of the records."""
    operations: float = 0.0
    """Floating-point operations by the cost model."""


def step_inputs(
    micro_batches: list[MicroBatch], rate: int, unit: str, operations: float = 0.0, left_out: int = 0
) -> StepInputs:
    """Counts and record ids of a step's micro-batches, without the audio, which is large.

    Args:
        micro_batches: micro-batches of the step.
        rate: sampling rate of the waveforms in Hz.
        unit: unit of the objective's items.
        operations: FLOPs of the step.
        left_out: number of records left out of the step for their clips.
    """
    counted = [micro_batch.batch for micro_batch in micro_batches if micro_batch.counts]
    totals: dict[str, float] = {
        "steps": 1,
        "rows": sum(len(batch.conversations) for batch in counted),
        "left_out": left_out,
        "clips": sum(len(batch.clips) for batch in counted),
        "audio_seconds": sum(batch.seconds(rate) for batch in counted),
        "tokens": sum(trained_tokens(batch) for batch in counted) if unit == "tokens" else 0,
    }
    records = [record for micro_batch in micro_batches for record in micro_batch.batch.records]
    rows = sum(len(micro_batch.batch.conversations) for micro_batch in micro_batches)
    return StepInputs(rows, totals, records, operations)


class StepMetrics(NamedTuple):
    """Loss, gradient norm and accuracy of one step, over all processes."""

    loss: float
    """Mean over the items."""
    items: int
    """Trained tokens, or clips."""
    gradient_norm: float
    """Before clipping."""
    hits: int = 0
    tries: int = 0
    """Denominator of the accuracy, with `hits` as numerator; see `LossOutput.hits`."""


class NonFiniteStep(NamedTuple):
    """A step with a NaN or infinite loss or gradient."""

    what: str
    """"the loss" or "the gradient"."""
    inputs: StepInputs
    back: int
    """Number of steps from this one on: 1 for the last one started."""
    ends: bool
    """True if it is one too many, so that neither it nor the steps after it changed anything."""


class Meter:
    """Throughput and loss of the steps of a stage. Results stay on the device until `read`.

    Args:
        unit: unit of the loss's items: "tokens", "answers" or "clips".
        total: totals of the stage; `read` adds to them.
        peak: peak FLOP/s of the device; None if unknown.
        skips: number of further steps that may be non-finite, as `Update` counts them.
    """

    def __init__(self, unit: str, total: dict[str, float], peak: float | None = None, skips: int = 0) -> None:
        self.unit = unit
        self.total = total
        self.peak = peak
        self.skips = skips
        self.seconds: list[float] = []
        """Seconds of each step read so far, without the wait for its data."""
        self._pending: list[tuple[StepResult, StepInputs]] = []
        self._busy = 0.0
        self._lost = 0.0
        self._began = time.monotonic()
        self._start()

    def _start(self) -> None:
        self._steps: list[StepMetrics] = []
        self._read = 0
        self._left_out = 0
        self._rows = 0
        self._waited = 0.0
        self._operations = 0.0

    def add(self, result: StepResult, inputs: StepInputs, began: float, ready: float) -> None:
        """Record a step that ends now.

        Args:
            result: results of the step, on the device.
            inputs: counts and records of the step.
            began: `time.monotonic()` when its data were loaded.
            ready: `time.monotonic()` when the wait for its data began.
        """
        self._pending.append((result, inputs))
        self._busy += time.monotonic() - began
        self._lost += began - ready

    def read(self) -> list[NonFiniteStep]:
        """Wait for all pending steps and count them, up to one that ends the run; returns the non-finite ones.

        All steps are read at once, and their total time is divided equally among them.
        """
        pending, self._pending = self._pending, []
        faults: list[NonFiniteStep] = []
        if not pending:
            return faults
        began = time.monotonic()
        numbers_X4: list[list[float]] = torch.stack([result.numbers_4 for result, _ in pending]).tolist()
        now = time.monotonic()
        busy, passed = self._busy + now - began, now - self._began
        for i, ((result, inputs), (loss, norm, hits, tries)) in enumerate(zip(pending, numbers_X4, strict=True)):
            if math.isfinite(loss) and math.isfinite(norm):
                items = result.items
                if items:  # a step without usable clips has no loss
                    self._steps.append(StepMetrics(loss / items, items, norm, int(hits), int(tries)))
            else:
                what = "the gradient" if math.isfinite(loss) else "the loss"
                faults.append(NonFiniteStep(what, inputs, len(pending) - i, len(faults) == self.skips))
                if faults[-1].ends:
                    return faults
                inputs.totals["skipped_steps"] = 1
            self._count(inputs, busy / len(pending), passed / len(pending))
        self.skips -= len(faults)
        self._waited += self._lost
        self._busy, self._lost, self._began = 0.0, 0.0, now
        return faults

    def restart(self) -> None:
        """Leave out of the next step's time what passed since the last `read`, in which all steps were read."""
        self._began = time.monotonic()

    @property
    def has_line(self) -> bool:
        """True if a step with a loss, and a finite one, was read since the last line."""
        return bool(self._steps)

    def _count(self, inputs: StepInputs, busy: float, passed: float) -> None:
        self.seconds.append(busy)
        self.total["seconds"] += passed
        for name, count in inputs.totals.items():
            self.total[name] = self.total.get(name, 0) + count
        self._read += 1
        self._left_out += int(inputs.totals.get("left_out", 0))
        self._rows += inputs.rows
        self._operations += inputs.operations

    def line(self) -> dict[str, Any]:
        """Means over the steps read since the last line; times and rates include steps that were skipped."""
        steps = self._steps
        passed = sum(self.seconds[-self._read :]) + self._waited
        items = sum(step.items for step in steps)
        tries = sum(step.tries for step in steps)
        line = {
            "loss": sum(step.loss * step.items for step in steps) / max(1, items),
            "gradient_norm": max(step.gradient_norm for step in steps),
            self.unit: items,
            f"{self.unit}_per_second": round(items / passed, 1),
            "rows_per_second": round(self._rows / passed, 1),
            "step_seconds": round(self.median(self._read), 5),
            "wait_seconds": round(self._waited / self._read, 5),
            "wait_share": round(self._waited / passed, 4),
        }
        if self._left_out:
            line["left_out"] = self._left_out
        if self.peak is not None:
            line["mfu"] = round(self._operations / passed / self.peak, 4)
        if tries:
            line["accuracy"] = round(sum(step.hits for step in steps) / tries, 4)
        self._start()
        return line

    def median(self, last: int | None = None) -> float:
        """Median seconds of a step, over all steps or the last `last` steps."""
        seconds = self.seconds[-last:] if last else self.seconds
        return statistics.median(seconds) if seconds else 0.0
