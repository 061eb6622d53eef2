"""Building blocks of sounds: shaped noise, harmonics, envelopes and rhythms, without a loop over samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

RATE = 16_000
"""Samples per second of everything in this package."""

Signal = NDArray[np.floating[Any]]
Rng = np.random.Generator


def seconds_of(n: int) -> Signal:
    """Time of each of `n` samples, in seconds [N]."""
    return np.arange(n) / RATE


def shaped_noise(rng: Rng, n: int, response: Callable[[Signal], Signal]) -> Signal:
    """Gaussian noise [N] with the magnitude spectrum `response(frequencies in Hz)`, at unit rms."""
    length = -(-n // 256) * 256
    bins = length // 2 + 1
    spectrum = np.empty(bins, np.complex128)
    spectrum.real, spectrum.imag = rng.standard_normal((2, bins))
    spectrum *= response(np.fft.rfftfreq(length, 1 / RATE))
    x_N = np.fft.irfft(spectrum, length)[:n]
    return x_N / (np.sqrt(np.mean(x_N**2)) + 1e-12)


def band(low: float, high: float, order: int = 4) -> Callable[[Signal], Signal]:
    """A smooth band-pass response from `low` to `high` Hz."""
    return lambda f: 1 / np.sqrt((1 + (low / np.maximum(f, 1)) ** (2 * order)) * (1 + (f / high) ** (2 * order)))


def peak(centre: float, width: float) -> Callable[[Signal], Signal]:
    """A bell-shaped response around `centre` Hz."""
    return lambda f: np.exp(-(((f - centre) / width) ** 2))


def harmonics(phase_N: Signal, weights: Signal | list[float]) -> Signal:
    """Sum of sines at whole multiples of a phase in cycles; `weights` are [K] or [K, N]."""
    angle_N = angle(phase_N)
    out_N = np.zeros(len(phase_N))
    for k, weight in enumerate(weights, start=1):
        if np.ndim(weight) or weight:
            # a numpy scalar would make it double precision
            out_N += (weight if np.ndim(weight) else float(weight)) * np.sin(np.float32(k) * angle_N)
    return out_N


def angle(phase_N: Signal) -> NDArray[np.float32]:
    """Radians within one turn of a phase in cycles; single precision suffices there, and is fast."""
    return ((phase_N - np.floor(phase_N)) * (2 * np.pi)).astype(np.float32)


def decay(t_N: Signal, per_second: float) -> NDArray[np.float32]:
    """Exponential decay [N]."""
    return np.exp((t_N * -per_second).astype(np.float32))


def phase_of(hz: float | Signal, n: int) -> Signal:
    """Phase in cycles [N] of a tone whose frequency is constant or changes with time."""
    return np.cumsum(np.broadcast_to(hz, (n,))) / RATE


def swell(n: int, attack: float, release: float) -> Signal:
    """Envelope [N] that rises in `attack` seconds and falls in `release` seconds."""
    t = seconds_of(n)
    return np.clip(t / attack, 0, 1) * np.clip((t[-1] - t) / release, 0, 1) if n > 1 else np.ones(n)


def wander(rng: Rng, n: int, per_second: float) -> Signal:
    """A slow random curve [N] in 0..1 with about `per_second` turns a second."""
    knots = max(3, round(n / RATE * per_second) + 2)
    return np.interp(np.linspace(0, knots - 1, n), np.arange(knots), rng.random(knots))


def hits(rng: Rng, n: int, per_second: float, jitter: float, tail: float) -> list[int]:
    """Starts of a rhythm of two or more, about `per_second`, the first at 0 and the last `tail` s before the end.

    Those between are late by up to `jitter` of a beat.
    """
    last = max(1.0, n - tail * RATE)
    count = max(2, round(last / RATE * per_second) + 1)
    beats = np.linspace(0, last, count)
    beats[1:-1] += rng.random(count - 2) * jitter * beats[1]
    return [int(beat) for beat in beats]


def add(out_N: Signal, x_N: Signal, start: int) -> None:
    """Add `x_N` into `out_N` from sample `start`, dropping what would pass the end."""
    end = min(len(out_N), start + len(x_N))
    if end > start:
        out_N[start:end] += x_N[: end - start]
