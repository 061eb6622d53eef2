"""Music played by FluidSynth: one or two instruments of 24, and what is asked about them.

The length of a clip is drawn before the number, the pace and the direction of its notes, and so tells nothing of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import soundfile
import soxr

from pal.data.curriculum import effects, programs
from pal.data.curriculum.effects import Bounds, Effects, Samples
from pal.data.curriculum.midi import Note, midi
from pal.data.curriculum.questions import COUNTS, Asker, Deck, Presence, Question, Rng
from pal.data.synth.waves import RATE

BOUNDS = Bounds(probability=0.4, reverb_s=(0.15, 0.4), eq_db=10.0, lowpass_hz=(4500.0, 7500.0), noise_db=(15.0, 35.0))
_SYNTH_RATE = 32_000
_TAIL = 0.4
"""Seconds after the last note."""
_FADE = 0.05
"""Seconds over which the clip fades out."""


@dataclass(frozen=True)
class Instrument:
    """General MIDI programs that sound like it, and the usual range of its notes, as MIDI note numbers."""

    programs: tuple[int, ...]
    """The first is the usual one; training uses all of them, so that no one sound stands for the instrument."""
    family: str
    low: int
    high: int
    name: str = ""
    """With its article; "a" and the name by default."""


INSTRUMENTS: dict[str, Instrument] = {
    "piano": Instrument((0, 1, 2), "keyboard", 43, 84),
    "electric piano": Instrument((4, 5), "keyboard", 43, 79, "an electric piano"),
    "harpsichord": Instrument((6,), "keyboard", 43, 79),
    "glockenspiel": Instrument((9,), "mallets", 79, 103),
    "xylophone": Instrument((13,), "mallets", 65, 96),
    "vibraphone": Instrument((11,), "mallets", 53, 84),
    "electric organ": Instrument((16, 17, 18), "organ", 48, 84, "an electric organ"),
    "church organ": Instrument((19,), "organ", 48, 84),
    "harmonica": Instrument((22,), "organ", 60, 84),
    "acoustic guitar": Instrument((24, 25), "guitar", 43, 76, "an acoustic guitar"),
    "distorted guitar": Instrument((30, 29), "guitar", 40, 72),
    "banjo": Instrument((105,), "guitar", 50, 79),
    "electric bass": Instrument((33, 34), "bass", 28, 50, "an electric bass"),
    "slap bass": Instrument((36, 37), "bass", 28, 50),
    "synth bass": Instrument((38, 39), "bass", 28, 50),
    "string section": Instrument((48, 49), "strings", 43, 84),
    "pizzicato strings": Instrument((45,), "strings", 45, 84, "pizzicato strings"),
    "harp": Instrument((46,), "strings", 48, 88),
    "trombone": Instrument((57,), "brass", 40, 67),
    "tuba": Instrument((58,), "brass", 30, 53),
    "brass section": Instrument((61,), "brass", 43, 79),
    "oboe": Instrument((68,), "woodwind", 58, 86, "an oboe"),
    "piccolo": Instrument((72,), "woodwind", 74, 102),
    "recorder": Instrument((74,), "woodwind", 62, 91),
}
"""Instruments that can be told apart with either sound font: three of each family, mostly General MIDI's."""
FAMILIES = tuple(sorted({one.family for one in INSTRUMENTS.values()}))
NAMES = tuple(sorted(INSTRUMENTS))
KINDS = ("melody", "phrase", "pace", "interval", "melody", "phrase", "pace", "interval", "in order", "at once")
"""Kinds of clip, in their shares."""
NOTE_COUNTS = COUNTS[1:]


@dataclass(frozen=True)
class Music:
    """What is played."""

    notes: tuple[Note, ...]
    seconds: float
    font: str
    """Path of the sound font."""
    instruments: tuple[str, ...]
    """In the order of playing, or of the alphabet where they play at once."""


@dataclass(frozen=True)
class MusicClip:
    """A clip of music with its questions."""

    content: Music
    effects: Effects
    questions: tuple[Question, ...]


class _Planner:
    """The decks from which the clips are dealt."""

    def __init__(self, rng: Rng, font: Path, plain: bool) -> None:
        self.rng, self.font, self.plain = rng, str(font), plain
        self.asker = Asker(rng, plain)
        self.presence = Presence(rng)
        # one for each kind of clip, since some ask about the instrument twice
        self.instruments = {kind: Deck(NAMES, rng) for kind in dict.fromkeys(KINDS)}
        self.first, self.second = Deck(NAMES, rng), Deck(NAMES, rng)
        self.counts = Deck(NOTE_COUNTS, rng)
        self.paces = Deck(("slow", "fast"), rng, rounds=5)
        self.directions = Deck(("up", "down"), rng, rounds=5)
        self.intervals = Deck(("higher", "lower"), rng, rounds=5)

    def clip(self, kind: str) -> MusicClip:
        music, questions = {
            "melody": self._melody,
            "phrase": self._phrase,
            "pace": self._pace,
            "interval": self._interval,
            "in order": self._in_order,
            "at once": self._at_once,
        }[kind]()
        return MusicClip(music, effects.draw(self.rng, None if self.plain else BOUNDS), tuple(questions))

    def _pitches(self, name: str, count: int, direction: str | None = None) -> list[int]:
        """Pitches of a melody in the instrument's range: in one direction, or any; neighbours always differ."""
        one, rng = INSTRUMENTS[name], self.rng
        if direction is None:
            span = int(min(one.high - one.low, 14))
            low = int(rng.integers(one.low, one.high - span + 1))
            pitches = [int(rng.integers(low, low + span + 1))]
            while len(pitches) < count:
                pitch = int(rng.integers(low, low + span + 1))
                if pitch != pitches[-1]:
                    pitches.append(pitch)
            return pitches
        most = max(1, (one.high - one.low) // (count - 1))
        steps = rng.integers(min(2, most), min(4, most) + 1, count - 1)
        low = int(rng.integers(one.low, one.high - int(steps.sum()) + 1))
        rising = [low, *(low + int(step) for step in np.cumsum(steps))]
        return rising if direction == "up" else rising[::-1]

    def _notes(self, name: str, pitches: list[int], start: float, gap: float, held: float = 0.85) -> list[Note]:
        """Notes that begin `gap` seconds apart and sound for the share `held` of it."""
        velocity = int(self.rng.integers(70, 115))
        program = INSTRUMENTS[name].programs[
            0 if self.plain else int(self.rng.integers(len(INSTRUMENTS[name].programs)))
        ]
        return [
            Note(program, pitch, start + at * gap, start + (at + held) * gap, velocity)
            for at, pitch in enumerate(pitches)
        ]

    def _start(self) -> float:
        return float(self.rng.uniform(0.05, 0.3))

    def _music(self, notes: list[Note], *names: str) -> Music:
        return Music(tuple(notes), max(note.end for note in notes) + _TAIL, self.font, names)

    def _about(self, name: str, ways: int) -> Iterator[Question]:
        """Instrument, family and presence, asked of every clip of one instrument."""
        yield from self.asker.ask_ways(ways, "instrument", name, NAMES)
        yield from self.asker.ask_ways(ways, "instrument family", INSTRUMENTS[name].family, FAMILIES)
        yield self._present(name)

    def _present(self, *names: str) -> Question:
        about, answer = self.presence.pick(names, [other for other in NAMES if other not in names])
        return self.asker.ask("instrument present", answer, ("yes", "no"), about, named(about))

    def _melody(self) -> tuple[Music, list[Question]]:
        name, direction = self.instruments["melody"].deal(), self.directions.deal()
        seconds, count = self.rng.uniform(1.6, 3.2), int(self.rng.integers(4, 7))
        notes = self._notes(name, self._pitches(name, count, direction), self._start(), seconds / count)
        asked = self.asker.ask_ways(2, "up or down", direction, ("up", "down"))
        return self._music(notes, name), [*asked, *self._about(name, 1)]

    def _phrase(self) -> tuple[Music, list[Question]]:
        name, answer = self.instruments["phrase"].deal(), self.counts.deal()
        seconds, count = self.rng.uniform(2.2, 3.6), COUNTS.index(answer) + 1
        notes = self._notes(name, self._pitches(name, count), self._start(), seconds / count, 0.75)
        asked = self.asker.ask_ways(2, "note count", answer, NOTE_COUNTS)
        return self._music(notes, name), [*asked, *self._about(name, 1)]

    def _pace(self) -> tuple[Music, list[Question]]:
        name, pace = self.instruments["pace"].deal(), self.paces.deal()
        seconds = self.rng.uniform(2.0, 3.4)
        gap = self.rng.uniform(0.55, 0.85) if pace == "slow" else self.rng.uniform(0.13, 0.22)
        count = max(2, round(seconds / gap))
        notes = self._notes(name, self._pitches(name, count), self._start(), seconds / count)
        asked = self.asker.ask_ways(1, "tempo", pace, ("slow", "fast"))
        return self._music(notes, name), [*asked, *self._about(name, 2)]

    def _interval(self) -> tuple[Music, list[Question]]:
        name, answer = self.instruments["interval"].deal(), self.intervals.deal()
        one, apart = INSTRUMENTS[name], int(self.rng.integers(3, 13))
        low = int(self.rng.integers(one.low, one.high - apart + 1))
        pitches = [low, low + apart] if answer == "higher" else [low + apart, low]
        notes = self._notes(name, pitches, self._start(), self.rng.uniform(0.5, 0.9))
        asked = self.asker.ask_ways(2, "higher or lower", answer, ("higher", "lower"))
        return self._music(notes, name), [*asked, *self._about(name, 1)]

    def _in_order(self) -> tuple[Music, list[Question]]:
        first, then = self._two()
        seconds = self.rng.uniform(1.0, 1.6)
        count = int(self.rng.integers(2, 5))
        start = self._start()
        notes = self._notes(first, self._pitches(first, count), start, seconds / count)
        notes += self._notes(then, self._pitches(then, count), start + seconds + 0.15, seconds / count)
        asked = self.asker.ask_ways(2, "instruments in order", f"{first}, {then}")
        return self._music(notes, first, then), [*asked, *self._both_present(first, then)]

    def _at_once(self) -> tuple[Music, list[Question]]:
        first, then = sorted(self._two())
        start, seconds = self._start(), self.rng.uniform(1.8, 2.8)
        notes = []
        for name in (first, then):
            count = int(self.rng.integers(3, 6))
            notes += self._notes(name, self._pitches(name, count), start, seconds / count, 0.95)
        asked = self.asker.ask_ways(2, "instruments at once", f"{first}, {then}")
        return self._music(notes, first, then), [*asked, *self._both_present(first, then)]

    def _two(self) -> tuple[str, str]:
        """Two instruments of different families."""
        first = self.first.deal()
        family = INSTRUMENTS[first].family
        return first, self.second.deal_other(*(name for name in NAMES if INSTRUMENTS[name].family == family))

    def _both_present(self, first: str, then: str) -> list[Question]:
        one = self._present(first, then)
        two = self._present(first, then)
        return [one] if two.about == one.about else [one, two]


def plan(rng: Rng, count: int, font: Path, plain: bool = False) -> list[MusicClip]:
    """Plan `count` clips of music; without changes of the clip, in the plain wording, if `plain`."""
    planner = _Planner(rng, font, plain)
    kinds = Deck(KINDS, rng)
    return [planner.clip(kinds.deal()) for _ in range(count)]


def named(instrument: str) -> str:
    """An instrument with its article, as in "an accordion"."""
    return INSTRUMENTS[instrument].name or f"a {instrument}"


def goes(notes: tuple[Note, ...]) -> str | None:
    """The direction of a melody, "up" or "down"; None if it turns."""
    rises = [two.pitch > one.pitch for one, two in pairwise(sorted(notes, key=lambda note: note.start))]
    return "up" if all(rises) else "down" if not any(rises) else None


def render(content: Music) -> Samples:
    """The music [N] as the sound font plays it, without reverberation and chorus of the program."""
    with tempfile.TemporaryDirectory() as folder:
        song, wave = Path(folder, "song.mid"), Path(folder, "song.wav")
        song.write_bytes(midi(content.notes, content.seconds))
        options = ["-ni", "-q", "-R", "0", "-C", "0", "-g", "0.5", "-r", str(_SYNTH_RATE), "-T", "wav", "-O", "float"]
        options += ["-o", "synth.dynamic-sample-loading=1", "-F", str(wave)]
        programs.run(["fluidsynth", *options, content.font, str(song)])
        x_NC, rate = soundfile.read(wave, dtype="float32", always_2d=True)
    x_N = np.asarray(soxr.resample(x_NC.mean(1), rate, RATE), np.float32)[: round(content.seconds * RATE)]
    n = round(_FADE * RATE)
    x_N[-n:] *= np.linspace(1, 0, n, dtype=np.float32)
    return x_N
