"""`pal probe time`: whether a model keeps the order of sounds and when they begin.

Made-up scenes in which one thing is swept and all else stays, sample for sample:

| sweep | clip | question |
|---|---|---|
| `gap` | two sounds of 0.8 s; seconds of silence between them, negative where they overlap | which comes first |
| `length` | two short or long sounds with 0.4 s between them | which comes first |
| `half` | one sound of 0.8 s whose own middle is before or after that of the clip | in which half |
| `third` | one sound of 0.8 s that starts before or after a border of two thirds | beginning, middle or end |

Every clip has a *twin* in which time is the other way round: the two sounds change places, or the sound lies on the
border's other side. It holds the same waveforms and its right answer is the other one. Order is asked in both orders
of mention. So whatever ignores time, be it deaf, fond of one kind of sound or of the first one mentioned, gets one of
the twins right and the other wrong: exactly 1/2. Whether the twins' answers differ at all is reported beside the
accuracy.

Where order is asked, the model is also asked whether it hears each of the sounds, and the sounds of another pair; over
all pairs each question is as often to be answered yes as no. What is not heard cannot be put in order: only where
`named` is high does a low accuracy mean that time was lost.

Answers are taken by likelihood, of two (of the three thirds those on both sides of the border): then chance is known
exactly, nothing depends on how a model words its answer, and no token is generated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import soundfile

from pal.data.manifest import Record, Turn
from pal.data.synth.events import KINDS
from pal.data.synth.questions import BORDER, HALVES, PARAPHRASES, THIRDS, Candidate, worded
from pal.data.synth.scene import BACKGROUNDS, LOUD_DB, ONSET_GAP, OVERLAP, REGISTERS, Event, Scene, sound
from pal.data.synth.waves import RATE
from pal.errors import ConfigError
from pal.evaluate.runner import evaluate
from pal.evaluate.scorers import bootstrap_ci
from pal.plots import style_of
from pal.probe.finding import Finding, Plot, about
from pal.probe.material import SCENES_SEED
from pal.probe.threshold import LEVEL, Threshold, threshold

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pal.evaluate.score import ItemResult
    from pal.model import PalModel

SECONDS = 4.0
"""Length of every clip, that of the scenes that recipes train on."""
LENGTH = 0.8
"""Of a sound, where it is not what is swept: one that every kind has in training."""
GAP = 0.4
"""Between two sounds, where it is not what is swept."""
PAIRS = 20
_ROUND = 10
"""Pairs that are drawn together, of different kinds throughout."""


@dataclass(frozen=True)
class Sweep:
    """One thing that is varied."""

    title: str
    unit: str
    points: tuple[float, ...]
    """In seconds, rising."""
    trained: tuple[float, float]
    """The part of the sweep that scenes have in training."""
    named: bool = False
    """Whether the model is also asked if it hears the sounds."""


SWEEPS: dict[str, Sweep] = {
    "gap": Sweep(
        "Order against the gap",
        "gap between two sounds (s)",
        (-0.75, -0.7, -0.6, -0.5, -0.3, 0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6),
        (-min(OVERLAP * LENGTH, LENGTH - ONSET_GAP), SECONDS - 2 * LENGTH),
        named=True,
    ),
    "length": Sweep(
        "Order against length",
        "length of each of two sounds (s)",
        (0.1, 0.2, 0.4, 0.8, 1.2),
        (max(kind.shortest for kind in KINDS.values()), min(kind.longest for kind in KINDS.values())),
        named=True,
    ),
    "half": Sweep(
        "First or second half",
        "from the sound's middle to the clip's (s)",
        (0.05, 0.1, 0.2, 0.4, 0.6, 1.0),
        (LENGTH / 2 + BORDER, SECONDS / 2 - LENGTH / 2),
    ),
    "third": Sweep(
        "Beginning, middle or end",
        "from the onset to the border of two thirds (s)",
        (0.02, 0.05, 0.1, 0.2, 0.35, 0.5),
        (BORDER, SECONDS / 6),
    ),
}


@dataclass(frozen=True)
class Trial:
    """What stays the same through all sweeps."""

    index: int
    kinds: tuple[str, str]
    notes: tuple[int | None, int | None]
    absent: tuple[str, str]
    """The kinds of another pair."""
    place: float
    """Where in the time that is free the first sound begins, from 0 to 1."""
    background: str
    background_db: float


@dataclass(frozen=True)
class Asked:
    """One question, and what it is for."""

    sweep: str
    point: float
    trial: int
    timed: bool
    """About time; else whether a sound is heard."""
    scene: Scene
    record: Record


class Answered(NamedTuple):
    """What a model made of a question."""

    text: str
    right: bool
    deaf_right: bool
    """Without the audio."""
    failed: bool = False


@dataclass(frozen=True)
class Point:
    """One model at one point of a sweep."""

    accuracy: float
    ci95: tuple[float, float]
    swapped: float
    """Share of the questions that got different answers about the twins, as they should."""
    named: float | None
    """Share of right answers to whether a sound is heard."""
    no_audio: float


def trials(count: int, seed: int) -> list[Trial]:
    """Pairs of different kinds, each kind about equally often; the absent ones are those of another pair.

    Raises:
        ConfigError: fewer than two pairs.
    """
    if count < 2:
        raise ConfigError(f"{count} pairs are too few; the sounds of one are the absent ones of another: give two")
    rng = np.random.default_rng(seed)
    pairs: list[tuple[str, str]] = []
    absent: list[tuple[str, str]] = []
    for part in np.array_split(np.arange(count), -(-count // _ROUND)):
        kinds = [list(KINDS)[i] for i in rng.permutation(len(KINDS))]
        drawn = [(kinds[2 * i], kinds[2 * i + 1]) for i in range(len(part))]
        pairs += drawn
        absent += [*drawn[1:], drawn[0]]
    return [
        Trial(
            index=index,
            kinds=pair,
            notes=(_note(pair[0], rng), _note(pair[1], rng)),
            absent=other,
            place=float(rng.random()),
            background=BACKGROUNDS[rng.integers(len(BACKGROUNDS))],
            background_db=float(rng.uniform(-70, -42)),
        )
        for index, (pair, other) in enumerate(zip(pairs, absent, strict=True))
    ]


def _note(kind: str, rng: np.random.Generator) -> int | None:
    if not KINDS[kind].musical:
        return None
    low, high = list(REGISTERS.values())[rng.integers(len(REGISTERS))]
    return int(rng.integers(low, high + 1))


def questions(count: int, seed: int, folder: Path, wordings: int = 1) -> list[Asked]:
    """All questions of all sweeps; the twins of a clip follow each other.

    Args:
        count: pairs of sounds.
        seed: of the pairs and their sounds.
        folder: where the clips will be.
        wordings: how many ways of asking each question.
    """
    drawn = trials(count, seed)
    asked = []
    for name, sweep in SWEEPS.items():
        for place, point in enumerate(sweep.points):
            for trial in drawn:
                for twin, (scene, candidates) in enumerate(_twins(name, point, trial, seed)):
                    clip = folder / f"{name}-{place}-{trial.index}-{twin}.wav"
                    for number, candidate in enumerate(candidates):
                        for wording in range(min(wordings, len(PARAPHRASES[candidate.form]))):
                            question = worded(candidate, wording)
                            record = Record(
                                id=f"{clip.stem}-{number}-{wording}",
                                clips=(str(clip),),
                                turns=(Turn(question.text, question.answer),),
                                task=name,
                                dataset="synth",
                                choices=question.choices,
                            )
                            timed = candidate.form != "presence"
                            asked.append(Asked(name, point, trial.index, timed, scene, record))
    return asked


def _twins(name: str, point: float, trial: Trial, seed: int) -> Iterator[tuple[Scene, list[Candidate]]]:
    """A clip and its twin, each with what is asked about it."""
    if name in ("gap", "length"):
        gap, length = (point, LENGTH) if name == "gap" else (GAP, point)
        start = trial.place * (SECONDS - 2 * length - gap)
        early, late = start, start + length + gap
        for twin, starts in enumerate(((early, late), (late, early))):
            # each kind keeps its place in the scene's list: sounds are drawn in that order, so both clips have the same
            order = [
                Candidate("order", "earlier", trial.kinds[twin], (a, b), a, b)
                for a, b in (trial.kinds, trial.kinds[::-1])
            ]
            heard = [_presence(trial.kinds[twin], "yes"), _presence(trial.absent[twin], "no")]
            yield _scene(trial, seed, length, starts), [*order, *heard]
    elif name == "half":
        kind, centred = trial.kinds[0], (SECONDS - LENGTH) / 2
        for start, answer in zip((centred - point, centred + point), HALVES, strict=True):
            yield _scene(trial, seed, LENGTH, (start,)), [Candidate("timing", "half", answer, HALVES, kind)]
    else:
        kind, border = trial.kinds[0], 1 + trial.index % 2
        sides = THIRDS[border - 1 : border + 1]
        for start, answer in zip((-point, point), sides, strict=True):
            scene = _scene(trial, seed, LENGTH, (SECONDS * border / 3 + start,))
            yield scene, [Candidate("timing", "third", answer, sides, kind)]


def _presence(kind: str, answer: str) -> Candidate:
    return Candidate("presence", "presence", answer, ("yes", "no"), kind)


def _scene(trial: Trial, seed: int, length: float, starts: Sequence[float]) -> Scene:
    events = tuple(
        Event(kind, start, start + length, True, LOUD_DB, note)
        for kind, note, start in zip(trial.kinds, trial.notes, starts, strict=False)
    )
    return Scene(seed, trial.index, SECONDS, events, trial.background, trial.background_db)


def judge(asked: Sequence[Asked], answers: Sequence[Answered], seed: int = 0) -> dict[str, list[Point]]:
    """Answers as figures: for each sweep its points in order. The intervals draw whole pairs of sounds."""
    found = {}
    for name, sweep in SWEEPS.items():
        found[name] = [
            _point([(q, a) for q, a in zip(asked, answers, strict=True) if (q.sweep, q.point) == (name, point)], seed)
            for point in sweep.points
        ]
    return found


def _point(part: Sequence[tuple[Asked, Answered]], seed: int) -> Point:
    timed = [(question, answer) for question, answer in part if question.timed]
    heard = [answer.right for question, answer in part if not question.timed]
    twins: dict[tuple[int, str], list[str]] = {}
    for question, answer in timed:
        twins.setdefault((question.trial, question.record.turns[0].question), []).append(answer.text)
    right = [float(answer.right) for _, answer in timed]
    return Point(
        accuracy=sum(right) / len(right),
        ci95=bootstrap_ci(right, [question.trial for question, _ in timed], seed=seed),
        swapped=sum(one != two for one, two in twins.values()) / len(twins),
        named=sum(heard) / len(heard) if heard else None,
        no_audio=sum(answer.deaf_right for _, answer in timed) / len(timed),
    )


def thresholds(asked: Sequence[Asked], answers: Sequence[Answered], seed: int = 0) -> dict[str, Threshold]:
    """For each sweep, where accuracy crosses 75 %."""
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
class _Seen:
    """What was found of one model."""

    points: dict[str, list[Point]]
    thresholds: dict[str, Threshold]
    token_seconds: float
    """Of its finest encoder."""
    failures: int
    about: Mapping[str, Any]


def probe(
    models: Iterable[tuple[str, PalModel]],
    pairs: int = PAIRS,
    wordings: int = 1,
    seed: int = SCENES_SEED,
    batch: int = 64,
    progress: bool = False,
) -> Finding:
    """Ask each model when things happen.

    Args:
        models: what each is called, and the model.
        pairs: of sounds, in every sweep.
        wordings: how many ways of asking each question; the first is that of recipes' evaluations.
        seed: of the pairs and their sounds.
        batch: rows in a forward pass.
        progress: show how far it is.

    Raises:
        ConfigError: fewer than two pairs, less than one wording.
        PalError: every single question raised.
    """
    started = time.perf_counter()
    if wordings < 1:
        raise ConfigError(f"{wordings} wordings ask nothing; give 1 or more")
    seen: dict[str, _Seen] = {}
    with TemporaryDirectory(prefix="pal-") as folder:
        asked = questions(pairs, seed, Path(folder), wordings)
        _render(asked, progress)
        for label, model in models:
            seen[label] = _see(model, asked, seed, batch, progress)
    trained = {name: sweep.trained for name, sweep in SWEEPS.items()}
    return Finding(
        probe="time",
        model=_about(seen),
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
        reading=_reading(seen),
        tables={
            **_over_seeds(seen),
            "Where accuracy crosses 75 %": [row for label, one in seen.items() for row in _crossings(label, one)],
            **{
                sweep.title: [row for label, one in seen.items() for row in _rows(label, sweep, one.points[name])]
                for name, sweep in SWEEPS.items()
            },
        },
        details={
            label: {"seconds_per_token": one.token_seconds, "errors": one.failures} for label, one in seen.items()
        },
        pictures={name: _picture(name, seen) for name in SWEEPS},
        seconds=time.perf_counter() - started,
    )


def _render(asked: Sequence[Asked], progress: bool) -> None:
    from tqdm import tqdm

    scenes = {question.record.clips[0]: question.scene for question in asked}
    for path, scene in tqdm(scenes.items(), desc="clips", unit="clip", disable=not progress, leave=False):
        samples_N = np.round(sound(scene) * 32767).astype(np.int16)
        soundfile.write(path, samples_N, RATE, subtype="PCM_16")


def _see(model: PalModel, asked: Sequence[Asked], seed: int, batch: int, progress: bool) -> _Seen:
    records = [question.record for question in asked]
    score = evaluate(model, records, scoring="rank", batch=batch, progress=progress, seed=seed)
    answers = [_answered(item) for item in score.items]
    encoders = range(len(model.ears.encoders))
    return _Seen(
        judge(asked, answers, seed),
        thresholds(asked, answers, seed),
        min(model.ears.encoder(i).seconds_per_token for i in encoders),
        sum(answer.failed for answer in answers),
        about(model),
    )


def _answered(item: ItemResult) -> Answered:
    return Answered(item.prediction, item.correct, bool(item.no_audio_correct), item.error is not None)


def _about(seen: Mapping[str, _Seen]) -> dict[str, Any]:
    if len(seen) == 1:
        return dict(next(iter(seen.values())).about)
    return {"source": ", ".join(seen), "models": {label: one.about for label, one in seen.items()}}


def _rows(label: str, sweep: Sweep, points: Sequence[Point]) -> Iterator[dict[str, Any]]:
    for at, point in zip(sweep.points, points, strict=True):
        row = {"model": label, "seconds": at, "accuracy": point.accuracy, "ci95": point.ci95, "swapped": point.swapped}
        if sweep.named:
            row["named"] = point.named
        inside = sweep.trained[0] <= at <= sweep.trained[1]
        yield row | {"no_audio": point.no_audio, "trained": "yes" if inside else "no"}


def _over_seeds(seen: Mapping[str, _Seen]) -> dict[str, list[dict[str, Any]]]:
    """Models whose labels differ after the last slash alone, such as seeds of one recipe, side by side."""
    groups: dict[str, list[_Seen]] = {}
    for label, one in seen.items():
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
    return {"Over the points of each sweep, mean of the models of a folder": rows} if rows else {}


def _crossings(label: str, one: _Seen) -> Iterator[dict[str, Any]]:
    for name, found in one.thresholds.items():
        yield {
            "model": label,
            "sweep": name,
            "seconds": found.at,
            "ci95": found.ci95,
            "resamples_that_cross": found.crossing,
            "says": found.says,
        }


def _reading(seen: Mapping[str, _Seen]) -> list[str]:
    said = []
    for label, one in seen.items():
        if one.failures:
            said.append(f"{label}: {one.failures} questions raised an error and count as wrong.")
        for name, sweep in SWEEPS.items():
            points, found = one.points[name], one.thresholds[name]
            mean = sum(point.accuracy for point in points) / len(points)
            swapped = sum(point.swapped for point in points) / len(points)
            text = f"{label}, {sweep.title.lower()}: {mean:.0%} right over the sweep (chance 50 %), "
            text += f"{swapped:.0%} of the answers turn round when time does; "
            if found.at is None or found.ci95 is None:
                text += f"{found.says.replace('no crossing: ', '')} s."
            else:
                text += f"{LEVEL:.0%} is crossed at {found.at:.2f} s ({found.ci95[0]:.2f} to {found.ci95[1]:.2f})"
                text += f", where onsets are {found.at + LENGTH:.2f} s apart." if name == "gap" else "."
            said.append(text)
            lost = [at for at, point in zip(sweep.points, points, strict=True) if _heard_but_unordered(point)]
            if lost:
                where = ", ".join(f"{at:g}" for at in lost)
                said.append(
                    f"{label}, {sweep.title.lower()}: at {where} s the sounds are named but their order is not told "
                    f"from chance: what fails there is time, not hearing."
                )
    return said


def _heard_but_unordered(point: Point) -> bool:
    return point.named is not None and point.named >= 0.9 and point.ci95[0] <= 0.5


def _picture(name: str, seen: Mapping[str, _Seen]) -> Plot:
    sweep = SWEEPS[name]
    caption = "Share of right answers with its interval; a diamond where the fitted curve crosses 75 %. "
    if sweep.named:
        caption += "Thin and dotted: whether each sound is heard at all. "
    caption += (
        "Grey ground: what made-up scenes have in training. Dashes up and down: the length of the encoder's token; "
        "finer differences can only be told from what a token says, not from which token says it."
    )
    return Plot(sweep.title, caption, lambda figure: _draw(figure, name, seen), size=(8.0, 4.8))


def _draw(figure: Figure, name: str, seen: Mapping[str, _Seen]) -> None:
    sweep = SWEEPS[name]
    axes: Axes = figure.add_subplot()
    low, high = sweep.points[0], sweep.points[-1]
    margin = (high - low) * 0.03
    axes.axvspan(max(low - margin, sweep.trained[0]), min(high + margin, sweep.trained[1]), color="0.93", zorder=0)
    axes.axhline(0.5, color="0.5", lw=1)
    axes.text(high + margin, 0.5, " chance", va="center", ha="left", color="0.35", fontsize=9)
    axes.axhline(LEVEL, color="0.5", lw=0.8, ls=":")
    axes.text(high + margin, LEVEL, " 75 %", va="center", ha="left", color="0.35", fontsize=9)
    for token in sorted({one.token_seconds for one in seen.values()}):
        marks = {token: "one token"}
        if name == "gap":
            marks |= {token - LENGTH: "onsets one token apart"}
        for at, words in marks.items():
            if not low - margin <= at <= high + margin:
                continue
            axes.axvline(at, color="0.35", lw=1, ls="--")
            axes.text(at, 0.32, f" {words}", rotation=90, va="bottom", ha="left", color="0.35", fontsize=8)
    for place, (label, one) in enumerate(seen.items()):
        points, style = one.points[name], style_of(place)
        y = np.array([point.accuracy for point in points])
        # a resampled mean's percentiles may miss the mean itself by a hair
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
    axes.set_ylabel("share of right answers")
    axes.set_title(sweep.title)
    axes.legend(loc="lower right", fontsize=9, framealpha=0.95)
    if name == "gap":
        onsets = axes.secondary_xaxis("top", functions=(_shifted(LENGTH), _shifted(-LENGTH)))
        onsets.set_xlabel("between the onsets (s)", fontsize=9)


def _shifted(by: float) -> Callable[[Any], Any]:
    return lambda seconds: seconds + by
