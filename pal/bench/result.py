"""What a run of `pal bench` gives."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pal.bench.closed_form import ClosedForm
from pal.bench.presets import Length, Phase, Preset, Scope

BASELINES = {"plain": "plits", "plain_text": "text"}
"""The plain LLM on the same rows -> the variant that it checks."""


@dataclass(frozen=True)
class Measurement:
    """One variant in one phase on one scene. Seconds and FLOPs of `decode` are those of one token."""

    variant: str
    scope: Scope
    phase: Phase
    audio_tokens: Length
    """Of a clip; `text` hears none of them."""
    text_tokens: int
    """Of the longest text."""
    batch: int
    seconds: float | None
    """Median; None where nothing was timed."""
    seconds_spread: float | None
    """Between the quartiles."""
    peak_bytes: int
    saved_bytes: int
    flops: int
    flops_closed_form: float
    kv_bytes: int
    """0 in a training step, which keeps none."""
    parameters: int

    @property
    def place(self) -> tuple[str, str, int, Length]:
        """What rows that can be compared have in common."""
        return self.scope, self.phase, self.batch, self.audio_tokens


@dataclass
class BenchResult:
    """All of a run."""

    preset: Preset
    machine: dict[str, Any]
    rows: list[Measurement] = field(default_factory=list)
    baselines: list[Measurement] = field(default_factory=list)
    """Of the plain LLM."""
    paper: dict[tuple[str, tuple[str, str, int, Length]], ClosedForm] = field(default_factory=dict)
    """(variant, place) -> closed forms, those of saved bytes and of keys and values too."""
    left_out: list[dict[str, Any]] = field(default_factory=list)
    """Rows that were asked for and are not there, and why."""
    interrupted: bool = False
    """Whether it was stopped; what is there is whole all the same."""
    complete: bool = False
    """Whether all places had their turn."""

    @property
    def rate(self) -> float | None:
        """Operations a second of the device's matrix products, where it was measured."""
        found: float | None = self.machine.get("product_flops_per_second")
        return found


def where_it_failed(error: BaseException) -> str:
    """An exception in one line: what it says and the last line of ours that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/pal/" in frame.filename] or list(frames)
    place = f" ({Path(ours[-1].filename).name}:{ours[-1].lineno}, {Path(frames[-1].filename).name}:{frames[-1].lineno})"
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said[:300]}{place if frames else ''}"
