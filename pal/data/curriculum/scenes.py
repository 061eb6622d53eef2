"""Environmental scenes of ESC-10's recordings: single ones, and two or three joined or laid over each other.

The length of a mixture is drawn before the number of its sounds, and its parts share it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pal.data.augment import loudness
from pal.data.curriculum import effects
from pal.data.curriculum.effects import Bounds, Effects, Samples, faded
from pal.data.curriculum.questions import COUNTS, Asker, Deck, Presence, Question, Rng, Tally
from pal.data.curriculum.recordings import Recording, by_turns, read
from pal.data.synth.waves import RATE

BOUNDS = Bounds(probability=0.35, lowpass_hz=(4000.0, 7500.0), noise_db=(20.0, 40.0))
"""Noise stays low: it must not be taken for rain or for the sea."""
COUNT_CHOICES = COUNTS[:3]
MIXTURE_SECONDS = (4.0, 5.6)
_WHOLE = 5.0
"""Length of ESC-10's clips in seconds."""
_FADE = 0.03
"""Seconds over which each part of a mixture fades in and out."""
_PAUSES = (0.0, 0.25)
_KEEP = 0.8
"""Least energy of a cut-out window, as a share of that of the loudest window."""
NAMED = {
    "chainsaw": "a chainsaw",
    "clock tick": "a ticking clock",
    "crackling fire": "a crackling fire",
    "crying baby": "a crying baby",
    "dog": "a dog",
    "helicopter": "a helicopter",
    "rooster": "a rooster",
    "sea waves": "sea waves",
    "sneezing": "sneezing",
}
"""Labels with their articles; others are named as they are."""


@dataclass(frozen=True)
class ScenePart:
    """A piece of a recording in a scene."""

    recording: Recording
    start: float
    """Seconds from the start of the scene."""
    seconds: float
    """Length of the piece; the whole recording if it is no longer."""
    seed: int
    """Of the choice among the recording's loud pieces."""
    level_db: float = 0.0


@dataclass(frozen=True)
class Soundscape:
    """Parts of a scene in order of their starts."""

    parts: tuple[ScenePart, ...]
    joined: bool
    """Whether the parts follow each other; else they sound at once."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Label of each part."""
        return tuple(part.recording.label for part in self.parts)


@dataclass(frozen=True)
class SceneClip:
    """A scene with its questions."""

    content: Soundscape
    effects: Effects
    questions: tuple[Question, ...]


def plan(
    rng: Rng, recordings: list[Recording], labels: tuple[str, ...], singles: int, mixtures: int, plain: bool = False
) -> list[SceneClip]:
    """Plan scenes.

    Args:
        rng: all randomness.
        recordings: of the folds to use.
        labels: all labels of the data set, sorted: the choices.
        singles: clips of one recording; each comes about equally often, the first time whole and without changes.
        mixtures: clips of two or three recordings.
        plain: no changes of the clip, and the plain wording.
    """
    asker, presence = Asker(rng, plain), Presence(rng)
    clips = []
    order = by_turns(recordings, rng)
    for at in range(singles):
        one, first_time = order[at % len(order)], at < len(order)
        cut = _WHOLE if first_time or rng.random() < 0.4 else float(rng.uniform(2.0, 4.5))
        changes = Effects(0, None) if first_time else effects.draw(rng, None if plain else BOUNDS)
        questions = asker.ask_ways(3, "classification", one.label, labels)
        questions += _presence(asker, presence, (one.label,), labels)
        content = Soundscape((ScenePart(one, 0.0, cut, int(rng.integers(2**31))),), True)
        clips.append(SceneClip(content, changes, tuple(questions)))
    if mixtures and len(labels) >= len(COUNT_CHOICES):
        clips += _mixtures(rng, recordings, labels, mixtures, plain, asker, presence)
    return clips


def _mixtures(
    rng: Rng,
    recordings: list[Recording],
    labels: tuple[str, ...],
    count: int,
    plain: bool,
    asker: Asker,
    presence: Presence,
) -> list[SceneClip]:
    present = sorted({one.label for one in recordings})
    found = {label: Deck([one for one in recordings if one.label == label], rng) for label in present}
    counts, draw_labels = Deck(COUNT_CHOICES, rng), {joined: _Labels(rng, present) for joined in (True, False)}
    clips = []
    for _ in range(count):
        different = COUNTS.index(counts.deal()) + 1
        joined = different == 3 or rng.random() < 0.6
        size = 3 if different == 3 or (joined and rng.random() < 0.5) else 2
        chosen = draw_labels[joined].draw(different)
        while len(chosen) < size:
            # repeat one, next to itself: the first and the last sound stay
            at = int(rng.integers(len(chosen)))
            chosen.insert(at, chosen[at])
        content = _scene(rng, [found[label].deal() for label in chosen], joined)
        questions = _about(asker, content, labels)
        questions += _presence(asker, presence, content.labels, labels)
        clips.append(SceneClip(content, effects.draw(rng, None if plain else BOUNDS), tuple(questions)))
    return clips


class _Labels:
    """Draws the labels of mixtures so that each is first, and last, about equally often."""

    def __init__(self, rng: Rng, labels: list[str]) -> None:
        self.labels = labels
        self.first, self.last, self.middle = Tally[str](rng), Tally[str](rng), Tally[str](rng)

    def draw(self, different: int) -> list[str]:
        """One to three different labels in order."""
        if different == 1:
            # the least frequent at either end
            fewest = min(self.first.picked[one] + self.last.picked[one] for one in self.labels)
            rare = [one for one in self.labels if self.first.picked[one] + self.last.picked[one] == fewest]
            chosen = [self.first.least(rare)]
        else:
            first = self.first.least(self.labels)
            chosen = [first, self.last.least([one for one in self.labels if one != first])]
        self.first.add(chosen[0])
        self.last.add(chosen[-1])
        if different > 2:
            middle = self.middle.least([one for one in self.labels if one not in chosen])
            self.middle.add(middle)
            chosen.insert(1, middle)
        return chosen


def _scene(rng: Rng, recordings: list[Recording], joined: bool) -> Soundscape:
    seconds = float(rng.uniform(*MIXTURE_SECONDS))
    levels = rng.uniform(-3, 3, len(recordings))
    seeds = rng.integers(2**31, size=len(recordings))
    if joined:
        pauses = rng.uniform(*_PAUSES, len(recordings) - 1)
        shares = 1 + 0.25 * rng.uniform(-1, 1, len(recordings))
        lengths = (seconds - pauses.sum()) * shares / shares.sum()
        starts = np.cumsum([0.0, *(lengths[:-1] + pauses)])
    else:
        lengths, starts = np.full(len(recordings), seconds), np.zeros(len(recordings))
    parts = [
        ScenePart(one, float(start), float(length), int(seed), float(level))
        for one, start, length, seed, level in zip(recordings, starts, lengths, seeds, levels, strict=True)
    ]
    return Soundscape(tuple(parts), joined)


def _about(asker: Asker, scene: Soundscape, labels: tuple[str, ...]) -> list[Question]:
    different = sorted(set(scene.labels))
    questions = asker.ask_ways(2, "sound count", COUNTS[len(different) - 1], COUNT_CHOICES)
    if scene.joined:
        questions += asker.ask_ways(1, "sounds in order", ", ".join(dict.fromkeys(scene.labels)))
        questions.append(asker.ask("first sound", scene.labels[0], labels))
        questions.append(asker.ask("last sound", scene.labels[-1], labels))
    elif len(different) > 1:
        questions += asker.ask_ways(2, "sounds at once", ", ".join(different))
    return questions


def _presence(asker: Asker, presence: Presence, present: tuple[str, ...], labels: tuple[str, ...]) -> list[Question]:
    questions: list[Question] = []
    absent = [label for label in labels if label not in present]
    for _ in range(min(2, len(set(present)))):
        taken = [question.about for question in questions if question.about]
        about, answer = presence.pick(sorted(set(present)), absent, taken)
        if about not in taken:
            questions.append(asker.ask("sound present", answer, ("yes", "no"), about, NAMED.get(about, about)))
    return questions


def render(content: Soundscape) -> Samples:
    """The scene [N]: each part at the same loudness but for its `level_db`, faded at its ends."""
    if len(content.parts) == 1 and content.parts[0].seconds >= _WHOLE:
        return read(str(content.parts[0].recording.path))
    pieces = [_piece(part) for part in content.parts]
    starts = [round(part.start * RATE) for part in content.parts]
    x_N = np.zeros(max(start + len(piece_M) for start, piece_M in zip(starts, pieces, strict=True)), np.float32)
    for start, piece_M in zip(starts, pieces, strict=True):
        x_N[start : start + len(piece_M)] += piece_M
    return x_N


def _piece(part: ScenePart) -> Samples:
    """A loud piece of the recording [M], faded; silence is appended to a recording that is too short."""
    x_N = read(str(part.recording.path))
    size, hop = round(part.seconds * RATE), RATE // 20
    if len(x_N) > size:
        energy = np.concatenate([[0.0], np.cumsum(np.square(x_N, dtype=np.float64))])
        begins = np.arange(0, len(x_N) - size + 1, hop)
        loud = energy[begins + size] - energy[begins]
        begins = begins[loud >= _KEEP * loud.max()]
        begin = int(np.random.default_rng(part.seed).choice(begins))
        x_N = x_N[begin : begin + size]
    piece_M = np.zeros(size, np.float32)
    piece_M[: len(x_N)] = x_N
    piece_M *= np.float32(0.1 / max(loudness(piece_M, RATE), 1e-6) * 10 ** (part.level_db / 20))
    return faded(piece_M, _FADE)
