"""Results of `pal bench`."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pal.bench.closed_form import ClosedForm
from pal.bench.presets import Length, Phase, Preset, Scope

BASELINES = {"plain": "plits", "plain_text": "text"}
"""Baseline (the plain LLM on the same rows) -> the variant that it is compared with."""


@dataclass(frozen=True)
class Measurement:
    """Cost of one variant in one phase on one scene. Seconds and FLOPs of `decode` are those of one token."""

    variant: str
    scope: Scope
    phase: Phase
    audio_tokens: Length
    """Audio tokens of each clip; the variant `text` gets no clip."""
    text_tokens: int
    """Text tokens of the longest conversation."""
    batch: int
    seconds: float | None
    """Median; None where nothing was timed."""
    seconds_spread: float | None
    """Distance between the quartiles."""
    peak_bytes: int
    saved_bytes: int
    flops: int
    flops_closed_form: float
    kv_bytes: int
    """0 in a training step, which keeps no keys and values."""
    parameters: int

    @property
    def place(self) -> tuple[str, str, int, Length]:
        """Scope, phase, batch and length: rows that agree in them can be compared."""
        return self.scope, self.phase, self.batch, self.audio_tokens


@dataclass
class BenchResult:
    """Result of a whole run."""

    preset: Preset
    machine: dict[str, Any]
    rows: list[Measurement] = field(default_factory=list)
    baselines: list[Measurement] = field(default_factory=list)
    """Rows of the plain LLM."""
    paper: dict[tuple[str, tuple[str, str, int, Length]], ClosedForm] = field(default_factory=dict)
    """(variant, place) -> closed form."""
    left_out: list[dict[str, Any]] = field(default_factory=list)
    """Rows that were asked for and are not there, and why."""
    interrupted: bool = False
    """Whether the run was stopped; its rows are complete all the same."""
    complete: bool = False
    """Whether all places were measured or left out."""

    @property
    def rate(self) -> float | None:
        """FLOP/s of one large matrix product on the device; None where it was not measured."""
        found: float | None = self.machine.get("product_flops_per_second")
        return found


def where_it_failed(error: BaseException) -> str:
    """Exception in one line: its message, the last line of this package in its traceback, and the last one."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/pal/" in frame.filename] or list(frames)
    place = f" ({Path(ours[-1].filename).name}:{ours[-1].lineno}, {Path(frames[-1].filename).name}:{frames[-1].lineno})"
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said[:300]}{place if frames else ''}"
