"""Checks of one run: baselines against the plain LLM, closed forms against measurements, goals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pal.bench.goals import BY_PRESET, RATE, Quantity
from pal.bench.presets import Length
from pal.bench.result import BASELINES, BenchResult, Measurement

AGREE = 0.10
"""Largest relative difference between a measurement and its closed form that is not flagged."""
AGREE_WITHOUT_ROWS = 0.05
"""The same for operations above the closed form, where a clip adds no rows to the sequence.

Rows are given more room, since packed summary rows bring unused queries with them."""


@dataclass(frozen=True)
class RatioCheck:
    """One comparison of two numbers: value / reference against a bound."""

    kind: Literal["baseline", "closed form", "goal"]
    variant: str
    against: str
    scope: str
    phase: str
    audio_tokens: Length
    batch: int
    quantity: Quantity
    value: float
    reference: float
    at_least: float | None = None
    at_most: float | None = None
    """Bounds of the ratio."""

    @property
    def ratio(self) -> float:
        """Value divided by reference."""
        return self.value / self.reference

    @property
    def ok(self) -> bool:
        """Whether the ratio is within the bounds."""
        above = self.at_least is None or self.ratio >= self.at_least
        return above and (self.at_most is None or self.ratio <= self.at_most)


def checks(result: BenchResult) -> list[RatioCheck]:
    """All checks for which a run has rows."""
    return [*_baselines(result), *_closed_forms(result), *_goals(result)]


def _baselines(result: BenchResult) -> Iterator[RatioCheck]:
    """PLITS and text against the plain LLM on the same rows."""
    limits = {"plits": 1.05, "text": 1.03}
    for plain in result.baselines:
        ours = _find(result, BASELINES[plain.variant], plain)
        if ours is None:
            continue
        for quantity in ("seconds", "saved_bytes"):
            yield from _compare("baseline", ours, plain, quantity, at_most=limits[ours.variant])


def _closed_forms(result: BenchResult) -> Iterator[RatioCheck]:
    """Counted operations, saved bytes, and bytes of keys and values against their closed forms."""
    for row in result.rows:
        if row.audio_tokens == "ragged" or row.phase == "decode_graph":
            continue  # ragged batches compute padding, too, and in CUDA graphs nothing can be counted
        paper = result.paper[row.variant, row.place]
        most = 1 + (AGREE if paper.rows else AGREE_WITHOUT_ROWS)
        pairs: list[tuple[Quantity, float, float, float]] = [
            ("flops", row.flops, paper.flops, most),
            ("kv_bytes", row.kv_bytes, paper.kv_bytes, 1 + AGREE),
        ]
        if not (row.variant == "qwen2audio" and row.scope == "end_to_end"):
            # transformers' own loss keeps the logits of every row
            pairs.append(("saved_bytes", row.saved_bytes, paper.saved_bytes, 1 + AGREE))
        for quantity, value, reference, limit in pairs:
            if reference:
                yield _check("closed form", row, "closed form", quantity, value, reference, 1 - AGREE, limit)


def _goals(result: BenchResult) -> Iterator[RatioCheck]:
    for goal in BY_PRESET.get(result.preset.name, ()):
        for row in result.rows:
            if (row.variant, row.phase, row.scope, row.batch) != (goal.variant, goal.phase, "llm", goal.batch):
                continue
            if goal.lengths is not None and row.audio_tokens not in goal.lengths:
                continue
            least, most = goal.bounds
            if goal.against == RATE:
                if row.seconds is not None and result.rate:
                    yield _check("goal", row, RATE, "rate", row.flops / row.seconds, result.rate, least, most)
                continue
            other = _find(result, goal.against, row, goal.against_phase)
            if other is not None:
                yield from _compare("goal", row, other, goal.quantity, most)


def _compare(
    kind: Literal["baseline", "goal"], ours: Measurement, other: Measurement, quantity: Quantity, at_most: float | None
) -> Iterator[RatioCheck]:
    """Check of one quantity of two rows; none where one of them has no number."""
    value: float | None = getattr(ours, quantity)
    reference: float | None = getattr(other, quantity)
    if value is not None and reference:
        yield _check(kind, ours, other.variant, quantity, value, reference, None, at_most)


def _check(
    kind: Literal["baseline", "closed form", "goal"],
    row: Measurement,
    against: str,
    quantity: Quantity,
    value: float,
    reference: float,
    at_least: float | None,
    at_most: float | None,
) -> RatioCheck:
    return RatioCheck(
        kind=kind,
        variant=row.variant,
        against=against,
        scope=row.scope,
        phase=row.phase,
        audio_tokens=row.audio_tokens,
        batch=row.batch,
        quantity=quantity,
        value=value,
        reference=reference,
        at_least=at_least,
        at_most=at_most,
    )


def _find(result: BenchResult, variant: str, like: Measurement, phase: str | None = None) -> Measurement | None:
    """The row of another variant at the same place, or in another phase of it."""
    place = (like.scope, phase or like.phase, like.batch, like.audio_tokens)
    rows = (*result.rows, *result.baselines)
    return next((row for row in rows if row.variant == variant and row.place == place), None)
