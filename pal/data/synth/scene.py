"""Plan of a scene (its events in time), and the scene's waveform."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pal.data.synth.events import KINDS, render
from pal.data.synth.waves import RATE, Rng, Signal, shaped_noise

MOST_EVENTS = 4
ONSET_GAP = 0.3
"""Smallest distance of two onsets in seconds, so that the order is unambiguous."""
OVERLAP = 0.4
"""Largest overlap of two neighbours, as a share of the shorter one."""
NOTE_WEIGHT = 2.0
"""Relative probability of musical kinds, so that most scenes have a pitch for questions."""
REGISTERS = {"low": (40, 48), "middle": (58, 66), "high": (76, 84)}
"""MIDI notes of each register, both ends included; the gaps between them keep the answer clear."""
LOUD_DB, QUIET_DB, JITTER_DB = -14.0, -28.0, 2.0
"""Levels in dBFS (active rms): the two centres, and the largest deviation of an event from its centre."""
BACKGROUNDS = ("floor", "pink", "brown", "white", "hum")

# Streams of random numbers of one scene. None is 0, which a seed sequence would not tell from nothing.
PLAN, SOUND, COUNT, ASK = 1, 2, 3, 4

_NAMES = list(KINDS)
_WEIGHTS = np.array([NOTE_WEIGHT if kind.musical else 1.0 for kind in KINDS.values()])


@dataclass(frozen=True)
class Event:
    """Sound event of a scene; times in seconds from its start."""

    kind: str
    start: float
    end: float
    loud: bool
    level_db: float
    """Level in dBFS: rms over the frames in which it sounds."""
    note: int | None = None
    """MIDI note of musical kinds."""

    @property
    def register(self) -> str | None:
        """Low, middle or high, for musical kinds."""
        if self.note is None:
            return None
        return next(name for name, (low, high) in REGISTERS.items() if low <= self.note <= high)

    @property
    def hz(self) -> float:
        """Fundamental; 0 without a pitch."""
        return 0.0 if self.note is None else 440.0 * 2 ** ((self.note - 69) / 12)


@dataclass(frozen=True)
class Scene:
    """The plan of a scene, events in order of onset."""

    seed: int
    index: int
    seconds: float
    events: tuple[Event, ...]
    background: str
    background_db: float


def most_events(seconds: float) -> int:
    """Most events of a scene of this length: one a second, at most four."""
    return min(MOST_EVENTS, max(1, int(seconds)))


def plan(seed: int, index: int, seconds: float) -> Scene:
    """Plan of scene `index` of `seed`; a pure function of its arguments."""
    # blocks of four scenes have one to four events in random order: exactly balanced
    most = most_events(seconds)
    block = np.random.default_rng((seed, index // most, COUNT)).permutation(most)
    count = int(block[index % most]) + 1
    rng = np.random.default_rng((seed, index, PLAN))
    kinds = [_NAMES[i] for i in rng.choice(len(_NAMES), count, replace=False, p=_WEIGHTS / _WEIGHTS.sum())]
    events = []
    for kind, (start, length) in zip(kinds, _places(rng, kinds, seconds), strict=True):
        loud = bool(rng.random() < 0.5)
        level = (LOUD_DB if loud else QUIET_DB) + rng.uniform(-JITTER_DB, JITTER_DB)
        note = None
        if KINDS[kind].musical:
            low, high = list(REGISTERS.values())[rng.integers(len(REGISTERS))]
            note = int(rng.integers(low, high + 1))
        events.append(Event(kind, round(float(start), 3), round(float(start + length), 3), loud, float(level), note))
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    background_db = rng.uniform(-80, -70) if background == "floor" else rng.uniform(-70, -42)
    return Scene(seed, index, seconds, tuple(events), background, float(background_db))


def _places(rng: Rng, kinds: list[str], seconds: float) -> list[tuple[float, float]]:
    """Start and length of each event, in order; about half of the neighbours overlap where both fit."""
    while True:
        lengths = [rng.uniform(KINDS[kind].shortest, KINDS[kind].longest) for kind in kinds]
        lengths = [min(length, seconds * 0.9) for length in lengths]
        overlaps = []
        for one, two in pairwise(lengths):
            most = min(OVERLAP * min(one, two), one - ONSET_GAP)
            overlaps.append(rng.uniform(0, most) if rng.random() < 0.5 else 0.0)
        slack = seconds - sum(lengths) + sum(overlaps)
        if slack >= 0.02:
            break
    # a gap may open before, after and between those that do not overlap
    shares = rng.dirichlet(np.ones(len(kinds) + 1)) * slack
    places, at = [], 0.0
    for i, length in enumerate(lengths):
        at += shares[i]
        if i:
            at -= overlaps[i - 1]
        places.append((at, length))
        at += length
    assert all(two[0] - one[0] >= ONSET_GAP - 1e-6 for one, two in pairwise(places))
    return places


def background(rng: Rng, kind: str, level_db: float, n: int) -> Signal:
    """Steady background [N] at `level_db` dBFS rms."""
    slope = {"floor": 0.0, "white": 0.0, "pink": 0.5, "brown": 1.0, "hum": 0.5}[kind]
    x_N = shaped_noise(rng, n, lambda f: np.maximum(f, 20.0) ** -slope)
    if kind == "hum":
        phase_N = np.arange(n) * (float(rng.choice([50.0, 60.0])) / RATE)
        x_N *= 0.2
        for k, weight in ((1, 1.0), (2, 0.6), (3, 0.4), (4, 0.2), (5, 0.2)):
            x_N += weight * np.sin(2 * np.pi * (k * phase_N + rng.random()))
        x_N /= np.sqrt(np.mean(x_N**2))
    return x_N * 10 ** (level_db / 20)


def sound(scene: Scene) -> NDArray[np.float32]:
    """The scene's waveform [N] within -1..1."""
    n = round(scene.seconds * RATE)
    rng = np.random.default_rng((scene.seed, scene.index, SOUND))
    x_N = background(rng, scene.background, scene.background_db, n)
    for event in scene.events:
        part = render(event.kind, rng, event.end - event.start, event.level_db, event.hz)
        first = round(event.start * RATE)
        x_N[first : first + len(part)] += part[: n - first]
    # soft clipping: samples below the knee are unchanged, so levels keep their meaning
    knee = 0.8
    over_N = np.abs(x_N) - knee
    bent_N = np.sign(x_N) * (knee + (1 - knee) * np.tanh(over_N / (1 - knee)))
    return np.where(over_N > 0, bent_N, x_N).astype(np.float32)
