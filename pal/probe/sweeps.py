"""Questions of `pal probe time`: synthetic scenes in which one parameter is swept and all others are fixed.

| sweep | clip | question |
|---|---|---|
| `gap` | two sounds of 0.8 s; gap between them in seconds, negative if they overlap | which comes first |
| `length` | two sounds of equal, varying length, 0.4 s apart | which comes first |
| `half` | one sound of 0.8 s, centred before or after the middle of the clip | in which half |
| `third` | one sound of 0.8 s that starts before or after the border of two thirds | beginning, middle or end |

Every clip has a *twin* with the opposite answer: the two sounds are swapped, or the sound lies on the other side of the
border. It has the same waveforms. Questions about order mention the sounds in both orders. So a model that ignores time
for any reason (no use of audio, preference for one sound or for the first one mentioned) gets one of the twins right
and the other wrong: its accuracy is exactly 1/2.

In questions about order, the model is also asked whether it hears each of the sounds, and the sounds of another pair.
Over all pairs the right answer to each of these questions is equally often yes and no.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from pal.data.manifest import Record, Turn
from pal.data.synth.events import KINDS
from pal.data.synth.questions import BORDER, HALVES, PARAPHRASES, THIRDS, Candidate, worded
from pal.data.synth.scene import BACKGROUNDS, LOUD_DB, ONSET_GAP, OVERLAP, REGISTERS, Event, Scene, sound
from pal.data.synth.waves import RATE
from pal.errors import ConfigError

SECONDS = 4.0
"""Length of every clip in seconds, as in training scenes."""
LENGTH = 0.8
"""Length of a sound in seconds, if it is not swept; every kind of sound has it in training."""
GAP = 0.4
"""Gap between two sounds in seconds, if it is not swept."""
PAIRS = 20
"""Default number of pairs of sounds."""
_ROUND = 10
"""Number of pairs drawn together, in which each kind of sound occurs at most once."""


@dataclass(frozen=True)
class Sweep:
    """Sweep of one parameter."""

    title: str
    unit: str
    points: tuple[float, ...]
    """Values of the parameter in seconds, in rising order."""
    trained: tuple[float, float]
    """Range of the parameter in training scenes."""
    named: bool = False
    """True to also ask whether the sounds are present."""


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
    """Pair of sounds, the same in all sweeps."""

    index: int
    kinds: tuple[str, str]
    notes: tuple[int | None, int | None]
    absent: tuple[str, str]
    """Kinds of sound of another pair, which are not in the clip."""
    place: float
    """Onset of the first sound as a share of the free time, from 0 to 1."""
    background: str
    background_db: float


@dataclass(frozen=True)
class SweepQuestion:
    """Question about a clip of a sweep."""

    sweep: str
    point: float
    trial: int
    timed: bool
    """True for a question about time, False for one whether a sound is present."""
    scene: Scene
    record: Record


def trials(count: int, seed: int) -> list[Trial]:
    """Random pairs of different kinds, with each kind about equally often.

    Raises:
        ConfigError: fewer than two pairs.
    """
    if count < 2:
        raise ConfigError(f"--pairs {count}: give at least 2, since each pair needs absent sounds from another pair")
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


def questions(count: int, seed: int, folder: Path, wordings: int = 1) -> list[SweepQuestion]:
    """All questions of all sweeps, twins one after the other.

    Args:
        count: number of pairs of sounds.
        seed: seed of the pairs and their sounds.
        folder: folder of the clips, which are not written here.
        wordings: number of paraphrases of each question.
    """
    drawn = trials(count, seed)
    asked = []
    for name, sweep in SWEEPS.items():
        for place, point in enumerate(sweep.points):
            for trial in drawn:
                for twin, (scene, candidates) in enumerate(twins(name, point, trial, seed)):
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
                            asked.append(SweepQuestion(name, point, trial.index, timed, scene, record))
    return asked


def twins(name: str, point: float, trial: Trial, seed: int) -> Iterator[tuple[Scene, list[Candidate]]]:
    """Scenes of a clip and its twin, each with its questions."""
    if name in ("gap", "length"):
        gap, length = (point, LENGTH) if name == "gap" else (GAP, point)
        start = trial.place * (SECONDS - 2 * length - gap)
        early, late = start, start + length + gap
        for twin, starts in enumerate(((early, late), (late, early))):
            # kinds keep their order in the scene's list, in which sounds are drawn, so both clips have the same sounds
            order = [
                Candidate("order", "earlier", trial.kinds[twin], (a, b), a, b)
                for a, b in (trial.kinds, trial.kinds[::-1])
            ]
            presence = [_presence(trial.kinds[twin], "yes"), _presence(trial.absent[twin], "no")]
            yield _scene(trial, seed, length, starts), [*order, *presence]
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


def render_clips(asked: Sequence[SweepQuestion], progress: bool) -> None:
    """Render and write the clips of some questions."""
    from tqdm import tqdm

    scenes = {question.record.clips[0]: question.scene for question in asked}
    for path, scene in tqdm(scenes.items(), desc="clips", unit="clip", disable=not progress, leave=False):
        samples_N = np.round(sound(scene) * 32767).astype(np.int16)
        soundfile.write(path, samples_N, RATE, subtype="PCM_16")
