"""Changes of finished clips: reverberation, filters, noise and level, bounded so that every answer stays true."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import soxr
from numpy.typing import NDArray

from pal.data.augment import equalise, loudness, lowpass, noise
from pal.data.synth.waves import RATE

Samples = NDArray[np.float32]
Rng = np.random.Generator

LEVEL_DB = (-34.0, -14.0)
"""Range of a clip's loudness in decibels relative to full scale, drawn without regard to what is in it."""
PEAK = 0.97
"""Largest sample of a clip; a louder one is made quieter as a whole."""


@dataclass(frozen=True)
class Effects:
    """Changes of one clip, in the order of the fields; None leaves one out."""

    seed: int
    """Of the impulse response and the noise."""
    level_db: float | None
    """Loudness of the finished clip; None keeps the recording's own."""
    reverb_s: float | None = None
    """Time in which the reverberation falls by 60 dB."""
    direct_db: float = 12.0
    """Level of the direct sound above the reverberation."""
    eq_db: tuple[float, ...] | None = None
    """Gains of an equaliser, from low to high frequencies."""
    lowpass_hz: float | None = None
    noise_db: float | None = None
    """Signal-to-noise ratio."""


@dataclass(frozen=True)
class Bounds:
    """How far the clips of a group may be changed."""

    probability: float = 0.35
    """Of each change."""
    reverb_s: tuple[float, float] = (0.15, 0.5)
    direct_db: tuple[float, float] = (4.0, 14.0)
    eq_db: float = 7.0
    lowpass_hz: tuple[float, float] = (3400.0, 7000.0)
    noise_db: tuple[float, float] = (12.0, 35.0)


def draw(rng: Rng, bounds: Bounds | None) -> Effects:
    """Random changes within bounds; the level alone where they are None."""
    seed, level_db = int(rng.integers(2**31)), float(rng.uniform(*LEVEL_DB))
    if bounds is None:
        return Effects(seed, level_db)
    on = rng.random(4) < bounds.probability
    reverb_s, direct_db = float(rng.uniform(*bounds.reverb_s)), float(rng.uniform(*bounds.direct_db))
    eq_db = tuple(float(gain) for gain in rng.uniform(-bounds.eq_db, bounds.eq_db, 9))
    lowpass_hz, noise_db = float(rng.uniform(*bounds.lowpass_hz)), float(rng.uniform(*bounds.noise_db))
    return Effects(
        seed,
        level_db,
        reverb_s if on[0] else None,
        direct_db,
        eq_db if on[1] else None,
        lowpass_hz if on[2] else None,
        noise_db if on[3] else None,
    )


def apply(x_N: Samples, effects: Effects) -> Samples:
    """The changed clip [N], of the same length, with no sample beyond `PEAK`."""
    rng = np.random.default_rng(effects.seed)
    if effects.reverb_s is not None:
        x_N = reverberate(x_N, rng, effects.reverb_s, effects.direct_db)
    if effects.eq_db is not None:
        x_N = equalise(x_N, np.array(effects.eq_db))
    if effects.lowpass_hz is not None:
        x_N = lowpass(x_N, RATE, effects.lowpass_hz)
    level = loudness(x_N, RATE)
    if effects.noise_db is not None:
        x_N = x_N + noise(rng, len(x_N), level * 10 ** (-effects.noise_db / 20))
    gain = 1.0 if effects.level_db is None else 10 ** (effects.level_db / 20) / max(level, 1e-6)
    peak = float(np.abs(x_N).max()) * gain
    return (x_N * np.float32(gain * min(1.0, PEAK / max(peak, 1e-9)))).astype(np.float32)


def reverberate(x_N: Samples, rng: Rng, seconds: float, direct_db: float) -> Samples:
    """The sound with the reverberation of a room: exponentially decaying noise, 60 dB down after `seconds`."""
    size = round(seconds * RATE)
    tail_M = rng.standard_normal(size) * 10 ** (-3 * np.arange(size) / size)
    tail_M[: round(0.002 * RATE)] = 0
    tail_M *= 10 ** (-direct_db / 20) / np.sqrt(np.sum(tail_M**2))
    length = 1 << (len(x_N) + size).bit_length()
    wet_N = np.fft.irfft(np.fft.rfft(x_N, length) * np.fft.rfft(tail_M, length), length)[: len(x_N)]
    return (x_N + wet_N).astype(np.float32)


def faded(x_N: Samples, seconds: float) -> Samples:
    """A copy that fades in and out, so that its edges make no click."""
    n = min(len(x_N) // 2, round(seconds * RATE))
    slope_n = np.linspace(0, 1, n, dtype=np.float32)
    out_N = x_N.copy()
    out_N[:n] *= slope_n
    out_N[len(x_N) - n :] *= slope_n[::-1]
    return out_N


def silence(seconds: float) -> Samples:
    """Zeros [N]."""
    return np.zeros(max(0, round(seconds * RATE)), np.float32)


def at_speed(x_N: Samples, speed: float) -> Samples:
    """The sound played `speed` times as fast, with pitch and formants shifted alike."""
    if speed == 1.0:
        return x_N
    return np.asarray(soxr.resample(x_N, RATE * speed, RATE), np.float32)
