"""Scoring of answers by a rule: metrics with intervals, over all items and by category and clip length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pal.evaluate.bootstrap import INTERVALS, Groups, draw
from pal.evaluate.metrics import Metric, Rows
from pal.evaluate.result import ItemResult, MetricValue, Result
from pal.evaluate.rules.base import Rule, Verdict

DURATIONS = ((0.0, 2.0), (2.0, 5.0), (5.0, 10.5), (10.5, 30.5), (30.5, float("inf")))
"""Bins of clip lengths, [from, below) in seconds; 10.5 and 30.5 put clips of about 10 and 30 s, usual lengths, in one
bin."""


def score(items: Sequence[ItemResult], rule: Rule, settings: Mapping[str, Any]) -> Result:
    """Score the answers, write each item's score into the item, and compute the metrics.

    Args:
        items: at least one, with the raw answers.
        rule: scoring rule.
        settings: settings of the run. Uses `benchmark`: name; `labels`: choices of items without their own; `seed`:
            seed of the bootstrap; `no_audio`: True if there are answers without audio.
    """
    labels, seed = settings["labels"], settings["seed"]
    questions = [one.item(labels) for one in items]
    verdict = rule.judge(questions, [one.output for one in items])
    for one, parsed, correct, value in zip(items, verdict.parsed, verdict.correct, verdict.value, strict=True):
        one.parsed, one.correct, one.value = parsed, correct, value
    without: Verdict | None = None
    if settings["no_audio"]:
        without = rule.judge(questions, [one.no_audio_output for one in items])
        for one, parsed, correct, value in zip(items, without.parsed, without.correct, without.value, strict=True):
            one.no_audio_parsed, one.no_audio_correct, one.no_audio_value = parsed, correct, value
    keys = [one.group for one in items]
    metrics = {
        name: _measure(metric, None if without is None else without.metrics[name], keys, seed)
        for name, metric in verdict.metrics.items()
    }
    own = next(iter(verdict.metrics))
    both = verdict.metrics[own], None if without is None else without.metrics[own]

    def part(rows: list[int]) -> MetricValue:
        return _measure_some(*both, np.asarray(rows, dtype=np.intp), [keys[row] for row in rows], seed)

    return Result(
        benchmark=settings["benchmark"],
        metric=own,
        overall=metrics[own],
        metrics=metrics,
        single={
            name: {"score": value, "no_audio_score": None if without is None else without.single[name]}
            for name, value in verdict.single.items()
        },
        categories={
            axis: {name: part(rows) for name, rows in sorted(values.items())}
            for axis, values in _by_category(items).items()
        },
        durations={name: part(rows) for name, rows in _by_duration(items).items()},
        errors=[
            {"id": one.id, "error": error}
            for one in items
            for error in (one.error, None if one.no_audio_error is None else f"without audio: {one.no_audio_error}")
            if error is not None
        ],
        facts=verdict.facts,
        rule=rule.describe(),
        intervals=f"{INTERVALS}; {verdict.metrics[own].resamples} resamples, seed {seed}",
        settings=dict(settings),
        items=list(items),
    )


def _measure(metric: Metric, no_audio: Metric | None, keys: Sequence[str], seed: int) -> MetricValue:
    """Metric over all items with intervals; `keys` are the items' clusters."""
    if no_audio is None:
        (whole,) = draw([metric], Groups(keys), seed)
        return MetricValue(len(keys), whole.value, whole.interval())
    whole, without = draw([metric, no_audio], Groups(keys), seed)
    gain = whole - without
    return MetricValue(
        len(keys), whole.value, whole.interval(), without.value, without.interval(), gain.value, gain.interval()
    )


def _measure_some(metric: Metric, no_audio: Metric | None, rows: Rows, keys: Sequence[str], seed: int) -> MetricValue:
    """Metric over some items, without intervals if these would take long."""
    some, other = metric.subset(rows), None if no_audio is None else no_audio.subset(rows)
    if not metric.slow:
        return _measure(some, other, keys, seed)
    value, without = some.value(), None if other is None else other.value()
    gain = None if without is None else value - without
    return MetricValue(len(keys), value, no_audio_score=without, gain=gain)


def _by_category(items: Sequence[ItemResult]) -> dict[str, dict[str, list[int]]]:
    found: dict[str, dict[str, list[int]]] = {}
    for row, one in enumerate(items):
        for axis, values in one.category.items():
            for value in values:
                found.setdefault(axis, {}).setdefault(value, []).append(row)
    return found


def _by_duration(items: Sequence[ItemResult]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for low, high in DURATIONS:
        rows = [row for row, one in enumerate(items) if one.seconds is not None and low <= one.seconds < high]
        if rows:
            found[f"{low:g} s and longer" if high == float("inf") else f"{low:g} to {high:g} s"] = rows
    unknown = [row for row, one in enumerate(items) if one.seconds is None]
    return {**found, "unknown": unknown} if unknown else found
