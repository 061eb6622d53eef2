"""Sections on results of `pal eval`: scores by category and duration, comparison of runs, and example answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pal.errors import ConfigError
from pal.evaluate.compare import compare
from pal.evaluate.folder import SETTINGS, load_result
from pal.evaluate.result import ItemResult, MetricValue, Result
from pal.lab.numbers import format_value, p_value
from pal.report.embed import MediaEmbedder
from pal.report.page import AnsweredQuestion, Fold, Part, Points, Prose, Section, Sound, Table, TableCell
from pal.report.plots import Scores, draw_scores, score_size, series_of

TITLE = "Scores"
DESCRIPTION = "evaluations (score.json, with or without settings.json and items.jsonl)"

_SHOWN = 12
"""Number of questions of a set shown with their answers."""
_ROWS = 40
"""Maximum number of rows of a plot; with more, there is only a table."""
_ERRORS = 20
"""Maximum number of errors shown of a run."""


@dataclass(frozen=True)
class EvaluationRun:
    """One evaluation, read from a folder or a file."""

    path: Path
    benchmark: str
    metric: str
    model: str
    n: int
    overall: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, Any]]
    """Further metrics of the rule."""
    parts: Mapping[str, Mapping[str, Mapping[str, Any]]]
    """Axis -> value -> the benchmark's own metric over the items of that value."""
    errors: Sequence[str]
    intervals: str
    items: Sequence[ItemResult]
    roots: Sequence[Path]
    """Folders that names of clips may be relative to."""
    key: str
    """Equal for runs on the same questions by the same rule."""
    settings: Mapping[str, Any]


def find(path: Path) -> list[Path]:
    """The path itself if it is a run folder or a file of `pal eval --json`, else files `score*.json` in the folder."""
    if path.is_dir():
        if _is_run(path):
            return [path]
        return [file for file in sorted(path.glob("score*.json")) if file.is_file()]
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return []
    if not isinstance(found, dict) or not {"benchmark", "metric"} <= set(found):
        return []
    return [path] if "intervals" in found else []


def read(path: Path) -> EvaluationRun:
    """Read a run folder or file of `pal eval`.

    Raises:
        BundleError: the run is incomplete, or a file is damaged.
    """
    return _of_result(path, load_result(path))


def chapter(
    found: Sequence[tuple[str, EvaluationRun]], embed: MediaEmbedder
) -> tuple[list[Section], list[dict[str, Any]]]:
    """One section for each set of questions, with all runs on it."""
    sets: dict[str, dict[str, EvaluationRun]] = {}
    for name, run in found:
        sets.setdefault(run.key, {})[name] = run
    sections = []
    for runs in sets.values():
        first = next(iter(runs.values()))
        sections.append(Section(f"{first.benchmark}: {first.n:,} questions", _parts(runs, embed)))
    facts = [
        {
            "benchmark": run.benchmark,
            "metric": run.metric,
            "n": run.n,
            **{key: run.overall[key] for key in ("score", "ci95", "no_audio_score", "gain", "gain_ci95")},
            "errors": len(run.errors),
        }
        for _, run in found
    ]
    return sections, facts


# Reading


def _is_run(path: Path) -> bool:
    """True for a folder of `pal eval --out`: its settings.json names a benchmark, or is damaged."""
    file = path / SETTINGS
    if not file.is_file():
        return False
    try:
        return "benchmark" in json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return True


def _of_result(path: Path, result: Result) -> EvaluationRun:
    others = {name: asdict(one) for name, one in result.metrics.items() if name != result.metric}
    others |= {name: {**dict.fromkeys(_KEYS), **pair} for name, pair in result.single.items()}
    parts = {axis: _parts_of(values) for axis, values in result.categories.items()}
    parts["duration of the clips"] = _parts_of(result.durations)
    settings = result.settings
    return EvaluationRun(
        path=path,
        benchmark=result.benchmark,
        metric=result.metric,
        model=", ".join(_list(settings.get("model"))),
        n=result.n,
        overall=asdict(result.overall),
        metrics=others,
        parts={axis: of for axis, of in parts.items() if of},
        errors=[f"{one['id']}: {one['error']}" for one in result.errors],
        intervals=result.intervals,
        items=result.items,
        roots=[Path(one) for one in _list(settings.get("root"))],
        key=_key(result),
        settings=settings,
    )


def _parts_of(values: Mapping[str, MetricValue]) -> dict[str, dict[str, Any]]:
    return {name: asdict(value) for name, value in values.items()}


def _list(value: str | Sequence[str | None] | None) -> list[str]:
    """A setting as a list; joined runs have one value for each run."""
    return [one for one in ([value] if value is None or isinstance(value, str) else value) if one is not None]


def _key(result: Result) -> str:
    its = result.settings
    ids = [one.id for one in result.items]
    same = [result.benchmark, result.metric, result.n, its.get("rule"), its.get("data_digest"), ids]
    return hashlib.sha256(json.dumps(same).encode()).hexdigest()


# Sections


_KEYS = ("n", "score", "ci95", "no_audio_score", "no_audio_ci95", "gain", "gain_ci95")


def _parts(runs: Mapping[str, EvaluationRun], embed: MediaEmbedder) -> list[Part]:
    first = next(iter(runs.values()))
    alt = f"{first.metric} of each run, with interval and without audio; numbers are in the table"
    rows = [[name, *_cells(run.overall), f"{len(run.errors)}", run.model] for name, run in runs.items()]
    parts: list[Part] = [
        Prose(f"{first.metric}, with the baseline of the same model without audio. Intervals: {first.intervals}."),
        Table.of("The score of each run", ["run", *_HEADINGS, "errors", "model"], rows),
    ]
    if len(runs) > 1:
        parts += _compared(runs)
    parts += _axis("overall", {"all": {name: run.overall for name, run in runs.items()}}, alt, embed)[:1]
    others: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name, run in runs.items():
        for metric, one in run.metrics.items():
            others.setdefault(metric, {})[name] = one
    if others:
        parts.append(Fold("Other metrics", [_table("Other metrics of the same answers", others)]))
    for axis in dict.fromkeys(axis for run in runs.values() for axis in run.parts):
        values = dict.fromkeys(value for run in runs.values() for value in run.parts.get(axis, {}))
        by_value = {
            value: {name: run.parts[axis][value] for name, run in runs.items() if value in run.parts.get(axis, {})}
            for value in values
        }
        parts += _axis(axis, by_value, f"{first.metric} by {axis}; the numbers are in the table below", embed)
    for name, run in runs.items():
        if run.errors:
            points = list(run.errors[:_ERRORS])
            more = len(run.errors) - len(points)
            points += [f"and {more} more, in {run.path.name}"] if more else []
            parts.append(Fold(f"{name}: {len(run.errors)} errors, which count as wrong", [Points(points)]))
    return parts + _sample(runs, embed)


_HEADINGS = ("score", "95 % interval", "without audio", "gain", "its 95 % interval")


def _cells(one: Mapping[str, Any]) -> list[str]:
    return [format_value(one[key]) for key in ("score", "ci95", "no_audio_score", "gain", "gain_ci95")]


def _axis(axis: str, by_value: Scores, alt: str, embed: MediaEmbedder) -> list[Part]:
    table = Fold(f"By {axis}, in numbers", [_table(f"Score by {axis}", by_value)])
    if len(by_value) > _ROWS or not series_of(by_value):
        return [table]
    title = "" if axis == "overall" else f"By {axis}"
    return [embed.plot(alt, partial(draw_scores, scores=by_value), score_size(by_value), title=title), table]


def _table(caption: str, by_value: Scores) -> Table:
    several = any(len(by_run) > 1 for by_run in by_value.values())
    groups = []
    lines: list[list[str]] = []
    for value, by_run in by_value.items():
        of_value = [
            [name if several else value, format_value(one.get("n")), *_cells(one)] for name, one in by_run.items()
        ]
        if several:
            groups.append((value, of_value))
        else:
            lines += of_value
    return Table(caption, ["", "n", *_HEADINGS], groups if several else [("", lines)])


def _compared(runs: Mapping[str, EvaluationRun]) -> list[Part]:
    """Comparison of each run with the first one, paired by question."""
    names = list(runs)
    headings = ["run", "difference", "95 % interval"]
    title = f"Each run against {names[0]}, paired by question"
    if not all(run.items for run in runs.values()):
        return []
    try:
        found = compare([run.path for run in runs.values()])
    except ConfigError as error:
        return [Prose(f"No comparison: {error}", "warning")]
    cells = [
        [
            name,
            format_value(row.difference),
            format_value(row.difference_ci95),
            p_value(row.p_bootstrap),
            format_value(row.only_first),
            format_value(row.only_this),
            p_value(row.p_mcnemar),
        ]
        for name, row in zip(names, found.rows, strict=True)
    ]
    more = ["p, bootstrap", f"only {names[0]} right", "only this right", "p, McNemar"]
    return [Table.of(title, [*headings, *more], cells[1:])]


def _sample(runs: Mapping[str, EvaluationRun], embed: MediaEmbedder) -> list[Part]:
    """Example questions with the answers of all runs, sampled evenly from each pattern of right and wrong answers."""
    with_items = {name: run for name, run in runs.items() if run.items}
    if not with_items:
        return []
    first = next(iter(with_items.values()))
    patterns: dict[tuple[bool | None, ...], list[int]] = {}
    for row in range(len(first.items)):
        patterns.setdefault(tuple(run.items[row].correct for run in with_items.values()), []).append(row)
    chosen = _evenly(sorted(patterns.values(), key=len), _SHOWN)
    questions = [_question(row, with_items, embed) for row in sorted(chosen)]
    note = Prose(
        "Chosen to include right and wrong answers, not in their true proportion. “Without audio” is the same model "
        "without audio."
    )
    return [Fold(f"{len(chosen)} of {len(first.items):,} questions with their answers", [note, *questions])]


def _evenly(groups: Sequence[Sequence[int]], count: int) -> list[int]:
    """`count` members of the groups, spread as evenly as possible; the smallest group comes first."""
    chosen: list[int] = []
    for place, group in enumerate(groups):
        take = min(len(group), (count - len(chosen)) // (len(groups) - place)) if count > len(chosen) else 0
        chosen += [group[i * len(group) // take] for i in range(take)]
    return chosen


def _question(row: int, runs: Mapping[str, EvaluationRun], embed: MediaEmbedder) -> AnsweredQuestion:
    item = next(iter(runs.values())).items[row]
    roots = [*embed.roots, *dict.fromkeys(root for run in runs.values() for root in run.roots)]
    answers = []
    for name, run in runs.items():
        asked = run.items[row]
        mark = "" if asked.correct is None else "right" if asked.correct else "wrong"
        text = f"error: {asked.error}" if asked.output is None else asked.output
        if asked.correct is None and asked.value is not None:
            text += f" ({format_value(asked.value)})"
        who, without = (name, f"{name}, without audio") if len(runs) > 1 else ("answer", "without audio")
        answers.append((who, TableCell(text, mark)))
        if asked.no_audio_output is not None:
            answers.append((without, TableCell(asked.no_audio_output)))
    sounds = [_sound(clip, roots, embed) for clip in item.clips]
    return AnsweredQuestion(item.prompt, sounds, " | ".join(item.references), answers)


def _sound(clip: str, roots: Sequence[Path], embed: MediaEmbedder) -> Sound:
    for path in (Path(clip), *(root / clip for root in roots)):
        if path.is_file():
            return embed.sound(path)
    return Sound(clip, None, f"{clip} is missing; give the folder of the clips by --data")
