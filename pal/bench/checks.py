"""What must hold in one run: the baselines are honest, the cost model is true, the goals are reached."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from pal.bench.run import BASELINES, Result, Row

AGREE = 0.10
"""Disagreement of a measurement with its closed form from which on it is flagged."""

Quantity = Literal["seconds", "saved_bytes", "flops", "kv_bytes"]


@dataclass(frozen=True)
class Check:
    """One comparison of two numbers: value / reference against a bound."""

    kind: Literal["baseline", "closed form", "goal"]
    variant: str
    against: str
    scope: str
    phase: str
    audio_tokens: int
    batch: int
    quantity: Quantity
    value: float
    reference: float
    at_least: float | None = None
    at_most: float | None = None
    """Bounds of the ratio."""

    @property
    def ratio(self) -> float:
        """Value by reference."""
        return self.value / self.reference

    @property
    def ok(self) -> bool:
        """Whether the ratio is within the bounds."""
        above = self.at_least is None or self.ratio >= self.at_least
        return above and (self.at_most is None or self.ratio <= self.at_most)


@dataclass(frozen=True)
class Goal:
    """A ratio that the `cpu` preset has to reach."""

    variant: str
    against: str
    phase: str
    quantity: Quantity
    from_tokens: int
    to_tokens: int
    speed: float | None = None
    """At least so many times faster."""
    share: float | None = None
    """At most so much of it."""


_EVERY = 10**9
GOALS = (
    Goal("lal", "plits", "train", "seconds", 750, 750, speed=3.4),
    Goal("lal", "plits", "train", "seconds", 1500, 1500, speed=4.5),
    Goal("lal", "plits", "train", "saved_bytes", 750, 750, share=0.20),
    Goal("lal", "plits", "train", "saved_bytes", 1500, 1500, share=0.12),
    Goal("lal_third", "plits", "train", "seconds", 750, 750, speed=4.0),
    Goal("lal_third", "plits", "train", "seconds", 1500, 1500, speed=6.0),
    Goal("pal", "plits", "train", "seconds", 750, 750, speed=2.0),
    Goal("pal", "plits", "train", "seconds", 1500, 1500, speed=2.1),
    Goal("pal", "plits", "train", "saved_bytes", 750, 750, share=0.55),
    Goal("pal", "plits", "train", "saved_bytes", 1500, 1500, share=0.50),
    Goal("lal", "plits", "decode", "seconds", 0, _EVERY, share=1.10),
    Goal("lal_third", "plits", "decode", "seconds", 1500, _EVERY, speed=1.0),
    Goal("lal", "qwen2audio", "prefill", "seconds", 750, 750, speed=3.0),
    Goal("lal", "mllama", "prefill", "seconds", 750, 750, share=1.15),
)
"""What the project set itself, for the shape, dtype and text of the preset `cpu`, batch 1, the LLM alone."""


def checks(result: Result) -> list[Check]:
    """All that the rows of a run allow."""
    return [*_baselines(result), *_closed_forms(result), *(_goals(result) if result.preset.name == "cpu" else ())]


def _baselines(result: Result) -> Iterator[Check]:
    """PLITS and text against the plain LLM on the same rows."""
    limits = {"plits": 1.05, "text": 1.03}
    for plain in result.baselines:
        ours = _find(result, BASELINES[plain.variant], plain)
        if ours is None:
            continue
        for quantity in ("seconds", "saved_bytes"):
            yield from _compare("baseline", ours, plain, quantity, at_most=limits[ours.variant])


def _closed_forms(result: Result) -> Iterator[Check]:
    """Counted operations, saved bytes of ours, and keys and values, against the cost model."""
    for row in result.rows:
        paper = result.paper[row.variant, row.place]
        most = 1.05 if row.variant.startswith("lal") else 1 + AGREE
        pairs: list[tuple[Quantity, float, float, float]] = [
            ("flops", row.flops, paper.flops, most),
            ("kv_bytes", row.kv_bytes, paper.kv_bytes, 1 + AGREE),
        ]
        if not (row.variant == "qwen2audio" and row.scope == "end_to_end"):
            # whose own loss keeps the logits of every row in a way of its own
            pairs.append(("saved_bytes", row.saved_bytes, paper.saved_bytes, 1 + AGREE))
        for quantity, value, reference, limit in pairs:
            if reference:
                yield _check("closed form", row, "closed form", quantity, value, reference, 1 - AGREE, limit)


def _goals(result: Result) -> Iterator[Check]:
    for goal in GOALS:
        for row in result.rows:
            fits = (row.variant, row.phase, row.scope, row.batch) == (goal.variant, goal.phase, "llm", 1)
            other = _find(result, goal.against, row)
            if not fits or other is None or not goal.from_tokens <= row.audio_tokens <= goal.to_tokens:
                continue
            most = goal.share if goal.speed is None else 1 / goal.speed
            yield from _compare("goal", row, other, goal.quantity, at_most=most)


def _compare(
    kind: Literal["baseline", "goal"], ours: Row, other: Row, quantity: Quantity, at_most: float | None
) -> Iterator[Check]:
    """Nothing where one of them has no number."""
    read: Callable[[Row], float | None] = lambda row: getattr(row, quantity)  # noqa: E731
    value, reference = read(ours), read(other)
    if value is not None and reference:
        yield _check(kind, ours, other.variant, quantity, value, reference, None, at_most)


def _check(
    kind: Literal["baseline", "closed form", "goal"],
    row: Row,
    against: str,
    quantity: Quantity,
    value: float,
    reference: float,
    at_least: float | None,
    at_most: float | None,
) -> Check:
    return Check(
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


def _find(result: Result, variant: str, like: Row) -> Row | None:
    """The row of another variant at the same place."""
    return next((row for row in result.rows if row.variant == variant and row.place == like.place), None)
