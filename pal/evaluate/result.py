"""From answers to a score: what a rule says of them, with intervals, categories, durations and errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from pal.data.manifest import Turn
from pal.evaluate.figures import INTERVALS, Figure, Groups, Rows, draw
from pal.evaluate.items import Item
from pal.evaluate.rules.base import Rule, Verdict

DURATIONS = ((0.0, 2.0), (2.0, 5.0), (5.0, 10.5), (10.5, 30.5), (30.5, float("inf")))
"""Seconds from and below which clips are put together. 10 and 30 s are usual lengths, give or take a frame."""


@dataclass
class Answered:
    """One item and what became of it: a line of `items.jsonl`."""

    id: str
    clips: list[str]
    category: dict[str, list[str]]
    seconds: float | None
    """Length of the clips; None where no header states it."""
    prompt: str
    references: list[str]
    choices: list[str] | None
    """None, too, where all items have the same; `settings.json` holds them then."""
    output: str | None = None
    """The raw answer; None where the item raised."""
    parsed: Any = None
    correct: bool | None = None
    value: float | None = None
    error: str | None = None
    no_audio_output: str | None = None
    no_audio_parsed: Any = None
    no_audio_correct: bool | None = None
    no_audio_value: float | None = None
    no_audio_error: str | None = None
    before: list[dict[str, str]] = field(default_factory=list)
    """Earlier turns with their reference answers; left out of the line where there are none."""

    def item(self, labels: Sequence[str] | None) -> Item:
        """The question again."""
        choices = self.choices if self.choices is not None else labels
        category = {axis: tuple(values) for axis, values in self.category.items()}
        return Item(
            self.id,
            tuple(self.clips),
            self.prompt,
            tuple(self.references),
            None if choices is None else tuple(choices),
            category,
            tuple(Turn(**turn) for turn in self.before),
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        fields = asdict(self)
        if not self.before:
            del fields["before"]
        return fields


@dataclass
class Measured:
    """A figure with its interval, and beside it the same model's without audio."""

    score: float
    ci95: tuple[float, float] | None = None
    no_audio_score: float | None = None
    no_audio_ci95: tuple[float, float] | None = None
    gain: float | None = None
    """score - no_audio_score"""
    gain_ci95: tuple[float, float] | None = None
    """Paired: both answers of an item are drawn together."""


@dataclass
class Result:
    """All that `score.json` says."""

    benchmark: str
    metric: str
    n: int
    overall: Measured
    figures: dict[str, Measured]
    """All figures that the rule gives, the headline first."""
    single: dict[str, dict[str, float | None]]
    """Figures without interval: {"score", "no_audio_score"}."""
    categories: dict[str, dict[str, dict[str, Any]]]
    """Axis -> value -> the headline over its items, with their number n."""
    durations: dict[str, dict[str, Any]]
    errors: list[dict[str, str]]
    facts: dict[str, Any]
    rule: dict[str, Any]
    intervals: str
    items: list[Answered] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The content of `score.json`; the items are in a file of their own."""
        return {
            "benchmark": self.benchmark,
            "metric": self.metric,
            "n": self.n,
            **asdict(self.overall),
            "figures": {name: asdict(figure) for name, figure in self.figures.items()},
            "single": self.single,
            "categories": self.categories,
            "durations": self.durations,
            "errors": {"count": len(self.errors), "items": self.errors},
            "facts": self.facts,
            "rule": self.rule,
            "intervals": self.intervals,
        }


def score(
    benchmark: str,
    answered: Sequence[Answered],
    labels: Sequence[str] | None,
    rule: Rule,
    seed: int = 0,
    no_audio: bool = True,
) -> Result:
    """Judge the answers, write what was found into them, and sum up.

    Args:
        benchmark: its name, for the score.
        answered: at least one.
        labels: choices of items that have none of their own.
        rule: how answers are judged.
        seed: of the bootstrap.
        no_audio: whether the answers without audio are there.
    """
    items = [one.item(labels) for one in answered]
    heard = rule.judge(items, [one.output for one in answered])
    for one, parsed, correct, value in zip(answered, heard.parsed, heard.correct, heard.value, strict=True):
        one.parsed, one.correct, one.value = parsed, correct, value
    deaf: Verdict | None = None
    if no_audio:
        deaf = rule.judge(items, [one.no_audio_output for one in answered])
        for one, parsed, correct, value in zip(answered, deaf.parsed, deaf.correct, deaf.value, strict=True):
            one.no_audio_parsed, one.no_audio_correct, one.no_audio_value = parsed, correct, value
    keys = ["\n".join(one.clips) for one in answered]
    figures = {
        name: measure(figure, None if deaf is None else deaf.figures[name], keys, seed)
        for name, figure in heard.figures.items()
    }
    metric = next(iter(heard.figures))
    headline = heard.figures[metric], None if deaf is None else deaf.figures[metric]

    def part(rows: list[int]) -> dict[str, Any]:
        some = np.asarray(rows, dtype=np.intp)
        return {"n": len(rows), **asdict(_part(*headline, some, [keys[row] for row in rows], seed))}

    errors = [
        {"id": one.id, "error": error}
        for one in answered
        for error in (one.error, None if one.no_audio_error is None else f"without audio: {one.no_audio_error}")
        if error is not None
    ]
    return Result(
        benchmark=benchmark,
        metric=metric,
        n=len(answered),
        overall=figures[metric],
        figures=figures,
        single={
            name: {"score": value, "no_audio_score": None if deaf is None else deaf.single[name]}
            for name, value in heard.single.items()
        },
        categories={
            axis: {name: part(rows) for name, rows in sorted(values.items())}
            for axis, values in _by_category(answered).items()
        },
        durations={name: part(rows) for name, rows in _by_duration(answered).items()},
        errors=errors,
        facts=heard.facts,
        rule=rule.describe(),
        intervals=f"{INTERVALS}; {heard.figures[metric].resamples} resamples, seed {seed}",
        items=list(answered),
    )


def measure(figure: Figure, deaf: Figure | None, keys: Sequence[str], seed: int) -> Measured:
    """A figure over all its items with intervals; `keys` say which items belong together."""
    if deaf is None:
        (heard,) = draw([figure], Groups(keys), seed)
        return Measured(heard.value, heard.interval())
    heard, guessed = draw([figure, deaf], Groups(keys), seed)
    gain = heard - guessed
    return Measured(heard.value, heard.interval(), guessed.value, guessed.interval(), gain.value, gain.interval())


def _part(figure: Figure, deaf: Figure | None, rows: Rows, keys: Sequence[str], seed: int) -> Measured:
    """Of some items; without intervals where they would take long."""
    some, other = figure.of_some(rows), None if deaf is None else deaf.of_some(rows)
    if not figure.slow:
        return measure(some, other, keys, seed)
    value, guessed = some.value(), None if other is None else other.value()
    return Measured(value, no_audio_score=guessed, gain=None if guessed is None else value - guessed)


def _by_category(answered: Sequence[Answered]) -> dict[str, dict[str, list[int]]]:
    found: dict[str, dict[str, list[int]]] = {}
    for row, one in enumerate(answered):
        for axis, values in one.category.items():
            for value in values:
                found.setdefault(axis, {}).setdefault(value, []).append(row)
    return found


def _by_duration(answered: Sequence[Answered]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for low, high in DURATIONS:
        rows = [row for row, one in enumerate(answered) if one.seconds is not None and low <= one.seconds < high]
        if rows:
            found[f"{low:g} s and longer" if high == float("inf") else f"{low:g} to {high:g} s"] = rows
    unknown = [row for row, one in enumerate(answered) if one.seconds is None]
    return {**found, "unknown": unknown} if unknown else found
