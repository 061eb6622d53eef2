"""`pal probe time`: perception of the order and the times of sounds.

It asks the questions of `pal.probe.sweeps`, for which a model that ignores time has an accuracy of exactly 1/2. It also
reports how often answers about a clip and its twin differ (`swapped`), and how often the model knows which sounds are
present (`named`): a low accuracy shows that time is lost only if `named` is high.

Answers are the likelier of two choices; for thirds, the two on both sides of the border. So chance is known exactly,
nothing depends on the wording of answers, and no token is generated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pal.data.synth.scene import LOUD_DB
from pal.errors import ConfigError
from pal.evaluate import evaluate, from_records
from pal.evaluate.bootstrap import bootstrap_ci
from pal.lab.records import SCENES_SEED
from pal.plots import style_of
from pal.probe.probe_result import Plot, ProbeResult, about
from pal.probe.sweeps import LENGTH, PAIRS, SECONDS, SWEEPS, Sweep, SweepQuestion, questions, render_clips
from pal.probe.threshold import LEVEL, Threshold, threshold

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pal.evaluate import ItemResult
    from pal.model import PalModel


class SweepAnswer(NamedTuple):
    """Answer of a model to a question of a sweep."""

    text: str
    right: bool
    no_audio_right: bool
    """True if the answer without audio is right."""
    failed: bool = False
    """True if the question raised an error."""


@dataclass(frozen=True)
class Point:
    """Accuracy of one model at one point of a sweep."""

    accuracy: float
    ci95: tuple[float, float]
    swapped: float
    """Share of the questions with different answers for the twins."""
    named: float | None
    """Accuracy of the questions whether a sound is present; None if the sweep has none."""
    no_audio: float


def judge(asked: Sequence[SweepQuestion], answers: Sequence[SweepAnswer], seed: int = 0) -> dict[str, list[Point]]:
    """Accuracy at each point of each sweep; the bootstrap draws whole pairs of sounds."""
    found = {}
    for name, sweep in SWEEPS.items():
        found[name] = [
            _point([(q, a) for q, a in zip(asked, answers, strict=True) if (q.sweep, q.point) == (name, point)], seed)
            for point in sweep.points
        ]
    return found


def _point(part: Sequence[tuple[SweepQuestion, SweepAnswer]], seed: int) -> Point:
    timed = [(question, answer) for question, answer in part if question.timed]
    named = [answer.right for question, answer in part if not question.timed]
    twins: dict[tuple[int, str], list[str]] = {}
    for question, answer in timed:
        twins.setdefault((question.trial, question.record.turns[0].question), []).append(answer.text)
    right = [float(answer.right) for _, answer in timed]
    return Point(
        accuracy=sum(right) / len(right),
        ci95=bootstrap_ci(right, [question.trial for question, _ in timed], seed=seed),
        swapped=sum(one != two for one, two in twins.values()) / len(twins),
        named=sum(named) / len(named) if named else None,
        no_audio=sum(answer.no_audio_right for _, answer in timed) / len(timed),
    )


def thresholds(asked: Sequence[SweepQuestion], answers: Sequence[SweepAnswer], seed: int = 0) -> dict[str, Threshold]:
    """Threshold of each sweep, where accuracy crosses 75 %."""
    found = {}
    pairs = 1 + max(question.trial for question in asked)
    for name, sweep in SWEEPS.items():
        right_UP, asked_UP = np.zeros((2, pairs, len(sweep.points)))
        for question, answer in zip(asked, answers, strict=True):
            if question.sweep == name and question.timed:
                cell = question.trial, sweep.points.index(question.point)
                asked_UP[cell] += 1
                right_UP[cell] += answer.right
        found[name] = threshold(sweep.points, right_UP, asked_UP, seed)
    return found


@dataclass(frozen=True)
class _ModelTiming:
    """Timing results of one model."""

    points: dict[str, list[Point]]
    thresholds: dict[str, Threshold]
    token_seconds: float
    """Token length of the encoder with the shortest tokens."""
    failures: int
    about: Mapping[str, Any]


def probe_time(
    models: Iterable[tuple[str, PalModel]],
    pairs: int = PAIRS,
    wordings: int = 1,
    seed: int = SCENES_SEED,
    batch: int = 64,
    progress: bool = False,
) -> ProbeResult:
    """Test each model's perception of order and time.

    Args:
        models: (name, model) of each.
        pairs: number of pairs of sounds.
        wordings: number of paraphrases of each question; the first one is that of training scenes.
        seed: seed of the pairs and their sounds.
        batch: rows of a forward pass.
        progress: show progress bars.

    Raises:
        ConfigError: fewer than two pairs, less than one wording.
        PalError: every question raised an error.
    """
    started = time.perf_counter()
    if wordings < 1:
        raise ConfigError(f"--wordings {wordings}: give at least 1")
    results: dict[str, _ModelTiming] = {}
    with TemporaryDirectory(prefix="pal-") as folder:
        asked = questions(pairs, seed, Path(folder), wordings)
        render_clips(asked, progress)
        for label, model in models:
            results[label] = _evaluate(model, asked, seed, batch, progress)
    trained = {name: sweep.trained for name, sweep in SWEEPS.items()}
    return ProbeResult(
        probe="time",
        model=_about(results),
        settings={
            "pairs": pairs,
            "wordings": wordings,
            "seed": seed,
            "clip_seconds": SECONDS,
            "level_db": LOUD_DB,
            "scoring": "the likelier of two answers",
            "sweeps": {name: sweep.points for name, sweep in SWEEPS.items()},
            "in_training": trained,
            "intervals": "percentile bootstrap over pairs of sounds",
        },
        reading=_reading(results),
        tables={
            **_over_seeds(results),
            "Where accuracy crosses 75 %": [row for label, one in results.items() for row in _crossings(label, one)],
            **{
                sweep.title: [row for label, one in results.items() for row in _rows(label, sweep, one.points[name])]
                for name, sweep in SWEEPS.items()
            },
        },
        details={
            label: {"seconds_per_token": one.token_seconds, "errors": one.failures} for label, one in results.items()
        },
        pictures={name: _picture(name, results) for name in SWEEPS},
        seconds=time.perf_counter() - started,
    )


def _evaluate(model: PalModel, asked: Sequence[SweepQuestion], seed: int, batch: int, progress: bool) -> _ModelTiming:
    records = [question.record for question in asked]
    ranked = from_records(records, rule={"name": "rank"})
    result = evaluate(model, ranked, batch=batch, progress=progress, seed=seed)
    answers = [_answered(item) for item in result.items]
    encoders = range(len(model.ears.encoders))
    return _ModelTiming(
        judge(asked, answers, seed),
        thresholds(asked, answers, seed),
        min(model.ears.encoder(i).seconds_per_token for i in encoders),
        sum(answer.failed for answer in answers),
        about(model),
    )


def _answered(item: ItemResult) -> SweepAnswer:
    return SweepAnswer(item.output or "", bool(item.correct), bool(item.no_audio_correct), item.error is not None)


def _about(results: Mapping[str, _ModelTiming]) -> dict[str, Any]:
    if len(results) == 1:
        return dict(next(iter(results.values())).about)
    return {"source": ", ".join(results), "models": {label: one.about for label, one in results.items()}}


def _rows(label: str, sweep: Sweep, points: Sequence[Point]) -> Iterator[dict[str, Any]]:
    for at, point in zip(sweep.points, points, strict=True):
        row = {"model": label, "seconds": at, "accuracy": point.accuracy, "ci95": point.ci95, "swapped": point.swapped}
        if sweep.named:
            row["named"] = point.named
        inside = sweep.trained[0] <= at <= sweep.trained[1]
        yield row | {"no_audio": point.no_audio, "trained": "yes" if inside else "no"}


def _over_seeds(results: Mapping[str, _ModelTiming]) -> dict[str, list[dict[str, Any]]]:
    """Table of means over models whose labels differ only after the last slash, such as seeds of one recipe."""
    groups: dict[str, list[_ModelTiming]] = {}
    for label, one in results.items():
        groups.setdefault(label.rpartition("/")[0], []).append(one)
    rows = []
    for group, members in groups.items():
        for name, sweep in SWEEPS.items():
            inside = [sweep.trained[0] <= at <= sweep.trained[1] for at in sweep.points]
            for where, wanted in (("yes", True), ("no", False)):
                kept = [place for place, within in enumerate(inside) if within == wanted]
                if not group or len(members) < 2 or not kept:
                    continue
                means = [float(np.mean([one.points[name][place].accuracy for place in kept])) for one in members]
                rows.append(
                    {
                        "models": f"{group} ({len(members)})",
                        "sweep": name,
                        "trained": where,
                        "accuracy": float(np.mean(means)),
                        "lowest": min(means),
                        "highest": max(means),
                    }
                )
    return {"Mean over the points of each sweep and the models of a folder": rows} if rows else {}


def _crossings(label: str, one: _ModelTiming) -> Iterator[dict[str, Any]]:
    for name, found in one.thresholds.items():
        yield {
            "model": label,
            "sweep": name,
            "seconds": found.at,
            "ci95": found.ci95,
            "resamples_that_cross": found.crossing,
            "says": found.says,
        }


def _reading(results: Mapping[str, _ModelTiming]) -> list[str]:
    sentences = []
    for label, one in results.items():
        if one.failures:
            sentences.append(f"{label}: {one.failures} questions raised an error and count as wrong.")
        for name, sweep in SWEEPS.items():
            points, found = one.points[name], one.thresholds[name]
            mean = sum(point.accuracy for point in points) / len(points)
            swapped = sum(point.swapped for point in points) / len(points)
            text = f"{label}, {sweep.title.lower()}: {mean:.0%} right over the sweep (chance 50 %), "
            text += f"{swapped:.0%} of the answers differ between twins; "
            if found.at is None or found.ci95 is None:
                text += f"{found.says.replace('no crossing: ', '')} s."
            else:
                text += f"{LEVEL:.0%} is crossed at {found.at:.2f} s ({found.ci95[0]:.2f} to {found.ci95[1]:.2f})"
                text += f", where onsets are {found.at + LENGTH:.2f} s apart." if name == "gap" else "."
            sentences.append(text)
            lost = [at for at, point in zip(sweep.points, points, strict=True) if _present_but_unordered(point)]
            if lost:
                where = ", ".join(f"{at:g}" for at in lost)
                sentences.append(
                    f"{label}, {sweep.title.lower()}: at {where} s the model knows which sounds are present, but "
                    "not their order."
                )
    return sentences


def _present_but_unordered(point: Point) -> bool:
    return point.named is not None and point.named >= 0.9 and point.ci95[0] <= 0.5


def _picture(name: str, results: Mapping[str, _ModelTiming]) -> Plot:
    sweep = SWEEPS[name]
    caption = "Accuracy with its interval; a diamond marks where the fitted curve crosses 75 %. "
    if sweep.named:
        caption += "Dotted: accuracy of the questions whether a sound is present. "
    caption += (
        "Grey area: range of the parameter in training scenes. Vertical dashes: length of an encoder token; finer "
        "differences can only be told from the content of tokens, not from their order."
    )
    return Plot(sweep.title, caption, lambda figure: _draw(figure, name, results), size=(8.0, 4.8))


def _draw(figure: Figure, name: str, results: Mapping[str, _ModelTiming]) -> None:
    sweep = SWEEPS[name]
    axes: Axes = figure.add_subplot()
    low, high = sweep.points[0], sweep.points[-1]
    margin = (high - low) * 0.03
    axes.axvspan(max(low - margin, sweep.trained[0]), min(high + margin, sweep.trained[1]), color="0.93", zorder=0)
    axes.axhline(0.5, color="0.5", lw=1)
    axes.text(high + margin, 0.5, " chance", va="center", ha="left", color="0.35", fontsize=9)
    axes.axhline(LEVEL, color="0.5", lw=0.8, ls=":")
    axes.text(high + margin, LEVEL, " 75 %", va="center", ha="left", color="0.35", fontsize=9)
    for token in sorted({one.token_seconds for one in results.values()}):
        marks = {token: "one token"}
        if name == "gap":
            marks |= {token - LENGTH: "onsets one token apart"}
        for at, words in marks.items():
            if not low - margin <= at <= high + margin:
                continue
            axes.axvline(at, color="0.35", lw=1, ls="--")
            axes.text(at, 0.32, f" {words}", rotation=90, va="bottom", ha="left", color="0.35", fontsize=8)
    for place, (label, one) in enumerate(results.items()):
        points, style = one.points[name], style_of(place)
        y = np.array([point.accuracy for point in points])
        # percentiles of resampled means may miss the mean by round-off
        ends = np.abs(np.clip([[y[i] - p.ci95[0], p.ci95[1] - y[i]] for i, p in enumerate(points)], 0, None)).T
        axes.errorbar(sweep.points, y, yerr=ends, label=label, capsize=2, lw=1.8, ms=5, **style)
        if sweep.named:
            named = [float(point.named or 0.0) for point in points]
            axes.plot(sweep.points, named, lw=1, ls=":", color=style["color"])
        found = one.thresholds[name]
        if found.at is not None:
            axes.plot([found.at], [LEVEL], marker="D", ms=9, mfc="white", mew=1.8, color=style["color"], ls="none")
    axes.set_xlim(low - margin, high + margin)
    axes.set_ylim(0.3, 1.03)
    axes.set_xlabel(sweep.unit)
    axes.set_ylabel("accuracy")
    axes.set_title(sweep.title)
    axes.legend(loc="lower right", fontsize=9, framealpha=0.95)
    if name == "gap":
        onsets = axes.secondary_xaxis("top", functions=(_shifted(LENGTH), _shifted(-LENGTH)))
        onsets.set_xlabel("between the onsets (s)", fontsize=9)


def _shifted(by: float) -> Callable[[Any], Any]:
    return lambda seconds: seconds + by
