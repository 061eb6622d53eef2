"""Spoken digits of FSDD: single ones, and strings of two to five by one speaker.

A string has a length of its own, drawn before the number of its digits, and they lie at random places in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pal.data.augment import loudness
from pal.data.curriculum import effects
from pal.data.curriculum.effects import Bounds, Effects, Samples, faded, silence
from pal.data.curriculum.questions import COUNTS, Asker, Deck, Presence, Question, Rng
from pal.data.curriculum.recordings import Recording, by_turns, read
from pal.data.prepare.fsdd import DIGITS
from pal.data.synth.waves import RATE

BOUNDS = Bounds(probability=0.4, reverb_s=(0.1, 0.4), lowpass_hz=(3400.0, 7000.0))
COUNT_CHOICES = COUNTS[1:5]
STRING_SECONDS = (3.2, 4.4)
_GAP = 0.06
"""Shortest silence between two digits in seconds."""
_FADE = 0.01
"""Seconds over which a digit fades in and out: clicks at its edges would show where it is."""
_LONGEST = 0.6
"""Longest digit of a string in seconds; longer recordings are avoided."""
SPEEDS = (0.88, 1.14)
"""Playback speeds of augmented clips, which make other voices out of the few speakers."""


@dataclass(frozen=True)
class SpokenDigits:
    """Digits with pauses: `silences` has one more than `recordings`, in seconds at the original speed."""

    recordings: tuple[Recording, ...]
    silences: tuple[float, ...]
    speed: float


@dataclass(frozen=True)
class DigitClip:
    """A clip of spoken digits with its questions."""

    content: SpokenDigits
    effects: Effects
    questions: tuple[Question, ...]


def plan(
    rng: Rng, recordings: list[Recording], singles: int, strings: int, seconds: dict[Path, float], plain: bool = False
) -> list[DigitClip]:
    """Plan clips of digits.

    Args:
        rng: all randomness.
        recordings: of the speakers to use.
        singles: clips of one digit; each recording comes about equally often, the first time without changes.
        strings: clips of several digits.
        seconds: length of each recording.
        plain: no changes of the clip, and the plain wording.
    """
    asker, presence = Asker(rng, plain), Presence(rng)
    clips = []
    order = by_turns(recordings, rng)
    for at in range(singles):
        first_time = at < len(order)
        one = order[at % len(order)]
        silences = (0.0, 0.0) if first_time else tuple(float(s) for s in rng.uniform(0.02, 0.4, 2))
        speed = 1.0 if first_time or plain else _speed(rng)
        changes = Effects(0, None) if first_time else effects.draw(rng, None if plain else BOUNDS)
        questions = asker.ask_ways(4, "spoken digit", one.label, DIGITS)
        about, answer = presence.pick([one.label], [digit for digit in DIGITS if digit != one.label])
        questions.append(asker.ask("digit present", answer, ("yes", "no"), about))
        clips.append(DigitClip(SpokenDigits((one,), silences, speed), changes, tuple(questions)))
    found = _by_speaker_and_digit(recordings, seconds, rng)
    speakers = Deck(sorted({one.speaker for one in recordings}), rng)
    counts = Deck(COUNT_CHOICES, rng)
    first, last, middle = Deck(DIGITS, rng), Deck(DIGITS, rng), Deck(DIGITS, rng)
    for _ in range(strings):
        speaker, count = speakers.deal(), counts.deal()
        digits = [first.deal(), *(middle.deal() for _ in range(COUNTS.index(count) - 1)), last.deal()]
        if any((speaker, digit) not in found for digit in digits):
            continue
        said = tuple(found[speaker, digit].deal() for digit in digits)
        silences = _silences(rng, rng.uniform(*STRING_SECONDS), [seconds[one.path] for one in said])
        clips.append(
            DigitClip(
                SpokenDigits(said, silences, 1.0 if plain else _speed(rng)),
                effects.draw(rng, None if plain else BOUNDS),
                tuple(_about(asker, presence, digits)),
            )
        )
    return clips


def _by_speaker_and_digit(
    recordings: list[Recording], seconds: dict[Path, float], rng: Rng
) -> dict[tuple[str, str], Deck[Recording]]:
    """Recordings of each speaker and digit that are short enough for strings, or else the shortest one."""
    same: dict[tuple[str, str], list[Recording]] = {}
    for one in recordings:
        same.setdefault((one.speaker, one.label), []).append(one)
    found = {}
    for key, group in same.items():
        by_length = sorted(group, key=lambda one: seconds[one.path])
        short = [one for one in by_length if seconds[one.path] <= _LONGEST]
        found[key] = Deck(short or by_length[:1], rng)
    return found


def _about(asker: Asker, presence: Presence, digits: list[str]) -> list[Question]:
    questions = asker.ask_ways(2, "digits", " ".join(digits))
    questions.append(asker.ask("digit count", COUNTS[len(digits) - 1], COUNT_CHOICES))
    questions.append(asker.ask("first digit", digits[0], DIGITS))
    questions.append(asker.ask("last digit", digits[-1], DIGITS))
    taken: list[str] = []
    for _ in range(min(2, len(set(digits)))):
        about, answer = presence.pick(digits, [digit for digit in DIGITS if digit not in digits], taken)
        if about not in taken:
            questions.append(asker.ask("digit present", answer, ("yes", "no"), about))
        taken.append(about)
    return questions


def _speed(rng: Rng) -> float:
    return float(np.exp(rng.uniform(*np.log(SPEEDS)))) if rng.random() < 0.5 else 1.0


def _silences(rng: Rng, length: float, spoken: list[float]) -> tuple[float, ...]:
    """Random silences before, between and after the digits, which fill the clip up to `length` seconds."""
    between = len(spoken) - 1
    free = max(0.1, length - sum(spoken) - between * _GAP)
    shares = rng.dirichlet(np.ones(len(spoken) + 1)) * free
    return tuple(float(share) + (_GAP if 0 < at <= between else 0.0) for at, share in enumerate(shares))


def render(content: SpokenDigits) -> Samples:
    """The digits [N], each at the same loudness, with silence between them; without silences, a recording as it is."""
    if not any(content.silences):
        return effects.at_speed(read(str(content.recordings[0].path)), content.speed)
    parts = [silence(content.silences[0])]
    for recording, pause in zip(content.recordings, content.silences[1:], strict=True):
        x_N = faded(read(str(recording.path)), _FADE)
        parts += [x_N * np.float32(0.1 / max(loudness(x_N, RATE), 1e-6)), silence(pause)]
    return effects.at_speed(np.concatenate(parts), content.speed)
