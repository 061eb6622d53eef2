"""Random changes to a training clip, with its tags kept true.

Each option is off until it is given. Changes happen in the order of the fields. They never change
what sounds, but some change what is right to say of it: `crop_seconds`, `pad_seconds` and `time_shift`
move events (no "when" questions then), `speed` moves pitches, `gain_db` moves levels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated

import numpy as np
import soxr
import torch
from numpy.typing import NDArray
from pydantic import AfterValidator, Field
from torch import Tensor

from pal.config import StrictConfig
from pal.types import TagSpan

Tags = list[TagSpan] | None
Samples = NDArray[np.float32]

SHORTEST_TAG = 0.05
"""Seconds of a tag that must be left after a cut, else nothing of it can be heard and it is dropped."""


def _ascending(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"a range goes from the smaller to the larger number, not from {pair[0]} to {pair[1]}")
    return pair


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Real = Annotated[float, Field(allow_inf_nan=False)]
Range = Annotated[tuple[Real, Real], AfterValidator(_ascending)]
PositiveRange = Annotated[tuple[Positive, Positive], AfterValidator(_ascending)]


class Augment:
    """Applies the configured changes; the same generator state gives the same clip.

    Call it with samples [N] (mono float32), their rate in Hz, a generator, and the tags or None.
    It returns new samples and tags, at least one sample long, and leaves its arguments alone.
    """

    class Config(StrictConfig):
        """Which changes, and how far."""

        probability: float = Field(1.0, gt=0, le=1)
        """How often each change is made, each by itself."""
        speed: PositiveRange | None = None
        """Play so many times faster, as in [0.9, 1.1]; pitch and formants move along."""
        crop_seconds: Positive | None = None
        """Keep a random piece of this length of a longer clip."""
        pad_seconds: Positive | None = None
        """Place a shorter clip at a random time in a silent window of this length."""
        time_shift: Positive | None = None
        """Move by up to so many seconds either way."""
        wrap: bool = False
        """What `time_shift` moves out at one end comes in at the other, instead of silence."""
        warp: Annotated[float, Field(gt=0, lt=0.5)] | None = None
        """Stretch the spectrum by up to this share either way, as another length of the vocal tract would."""
        eq_db: Positive | None = None
        """Filter by a smooth random curve of up to so many decibels either way, as another microphone would."""
        lowpass: PositiveRange | None = None
        """Remove what is above a frequency drawn between these, in Hz."""
        gain_db: Range | None = None
        """Make louder by so many decibels, less where peaks would pass full scale."""
        noise_db: Range | None = None
        """Add noise, of a colour between white and brown, at this signal-to-noise ratio in decibels."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, samples_N: Tensor, rate: int, rng: np.random.Generator, tags: Tags) -> tuple[Tensor, Tags]:
        """Change one clip."""
        c = self.config
        x_N: Samples = samples_N.detach().cpu().numpy().astype(np.float32)  # astype copies
        if not len(x_N):
            return samples_N.clone(), tags
        for option, change in (
            (c.speed, self._speed),
            (c.crop_seconds, self._crop),
            (c.pad_seconds, self._pad),
            (c.time_shift, self._shift),
        ):
            if option is not None and self._chosen(rng):
                x_N, tags = change(x_N, rate, rng, tags)
        if c.warp is not None and self._chosen(rng):
            x_N = warp(x_N, float(np.exp(rng.uniform(-1, 1) * np.log1p(c.warp))))
        if c.eq_db is not None and self._chosen(rng):
            x_N = equalise(x_N, rng.uniform(-c.eq_db, c.eq_db, 9))
        if c.lowpass is not None and self._chosen(rng):
            x_N = lowpass(x_N, rate, float(np.exp(rng.uniform(*np.log(c.lowpass)))))
        if c.gain_db is not None and self._chosen(rng):
            peak = float(np.abs(x_N).max())
            gain = 10 ** (rng.uniform(*c.gain_db) / 20)
            # a clip that is already past full scale may become quieter, never louder
            x_N = x_N * np.float32(min(gain, max(1.0, 1 / peak)) if peak > 0 else gain)
        if c.noise_db is not None and self._chosen(rng):
            x_N = x_N + noise(rng, len(x_N), loudness(x_N, rate) * 10 ** (-rng.uniform(*c.noise_db) / 20))
        return torch.from_numpy(np.ascontiguousarray(x_N)), tags

    def _chosen(self, rng: np.random.Generator) -> bool:
        return bool(rng.random() < self.config.probability)

    def _speed(self, x_N: Samples, rate: int, rng: np.random.Generator, tags: Tags) -> tuple[Samples, Tags]:
        assert self.config.speed is not None
        speed = float(np.exp(rng.uniform(*np.log(self.config.speed))))
        faster_N = np.asarray(soxr.resample(x_N, rate * speed, rate, quality="QQ"), np.float32)
        if not len(faster_N):
            return x_N, tags
        return faster_N, moved(tags, lambda t: t / speed, len(faster_N) / rate)

    def _crop(self, x_N: Samples, rate: int, rng: np.random.Generator, tags: Tags) -> tuple[Samples, Tags]:
        assert self.config.crop_seconds is not None
        length = max(1, round(self.config.crop_seconds * rate))
        first = int(rng.integers(0, max(0, len(x_N) - length) + 1))
        piece_N = x_N[first : first + length]
        return piece_N, moved(tags, lambda t: t - first / rate, len(piece_N) / rate)

    def _pad(self, x_N: Samples, rate: int, rng: np.random.Generator, tags: Tags) -> tuple[Samples, Tags]:
        assert self.config.pad_seconds is not None
        length = max(len(x_N), round(self.config.pad_seconds * rate))
        first = int(rng.integers(0, length - len(x_N) + 1))
        window_N = np.zeros(length, np.float32)
        window_N[first : first + len(x_N)] = x_N
        return window_N, moved(tags, lambda t: t + first / rate, length / rate)

    def _shift(self, x_N: Samples, rate: int, rng: np.random.Generator, tags: Tags) -> tuple[Samples, Tags]:
        assert self.config.time_shift is not None
        most = min(round(self.config.time_shift * rate), len(x_N) - 1)
        by = int(rng.integers(-most, most + 1))
        seconds = len(x_N) / rate
        shifted_N = np.roll(x_N, by)
        once = moved(tags, lambda t: t + by / rate, seconds)
        if not self.config.wrap:
            shifted_N[slice(0, by) if by >= 0 else slice(by, None)] = 0
            return shifted_N, once
        # the part of a tag that left at one end is at the other
        around = moved(tags, lambda t: t + by / rate - np.sign(by) * seconds, seconds)
        if once is not None and around is not None:
            once = once + [tag for tag in around if tag.start is not None]
        return shifted_N, once


def moved(tags: Tags, move: Callable[[float], float], seconds: float) -> Tags:
    """Tags whose times went through `move`, cut to a clip of `seconds`; those without both times stay as they are."""
    if tags is None:
        return None
    out = []
    for tag in tags:
        if tag.start is None or tag.end is None:
            out.append(tag)
            continue
        start, end = max(0.0, float(move(tag.start))), min(seconds, float(move(tag.end)))
        # a tag that was shorter than the limit from the start must stay whole to stay
        if end - start >= min(SHORTEST_TAG, 0.999 * (float(move(tag.end)) - float(move(tag.start)))) and end > start:
            out.append(replace(tag, start=start, end=end))
    return out


def warp(x_N: Samples, factor: float) -> Samples:
    """Move what is at f Hz to `factor` f; time stays. Vocal tract length perturbation (Jaitly and Hinton 2013)."""
    window = torch.hann_window(512)
    spectrum_XF = torch.stft(torch.from_numpy(x_N), 512, 128, window=window, pad_mode="constant", return_complex=True)
    bins = len(spectrum_XF)
    source_X = torch.arange(bins) / factor
    low_X = source_X.long().clamp(max=bins - 2)
    share_X1 = (source_X - low_X).clamp(0, 1)[:, None]
    magnitude_XF = spectrum_XF.abs()
    moved_XF = magnitude_XF[low_X] * (1 - share_X1) + magnitude_XF[low_X + 1] * share_X1
    moved_XF[source_X > bins - 1] = 0
    out_XF = torch.polar(moved_XF, spectrum_XF.angle())
    return torch.istft(out_XF, 512, 128, window=window, length=len(x_N)).numpy()


def equalise(x_N: Samples, gains_db: NDArray[np.float64]) -> Samples:
    """Filter by a curve through `gains_db`, at frequencies that lie denser at the low end, 0 Hz to half the rate."""
    length = _fast(len(x_N))
    frequencies = np.linspace(0, 1, length // 2 + 1)
    curve_db = np.interp(frequencies, np.linspace(0, 1, len(gains_db)) ** 1.5, gains_db)
    spectrum = np.fft.rfft(x_N, length) * (10 ** (curve_db / 20)).astype(np.float32)
    return np.fft.irfft(spectrum, length)[: len(x_N)].astype(np.float32)


def lowpass(x_N: Samples, rate: int, hz: float) -> Samples:
    """Remove what is above `hz`, with a raised-cosine edge a third of an octave wide."""
    length = _fast(len(x_N))
    frequencies = np.fft.rfftfreq(length, 1 / rate)
    octaves = np.log2(np.maximum(frequencies, 1e-6) / hz)
    keep = 0.5 + 0.5 * np.cos(np.pi * np.clip(octaves * 3, 0, 1))
    return np.fft.irfft(np.fft.rfft(x_N, length) * keep.astype(np.float32), length)[: len(x_N)].astype(np.float32)


def noise(rng: np.random.Generator, n: int, rms: float) -> Samples:
    """Noise [n] of random colour: its spectrum falls with frequency to a power between 0 (white) and 1 (brown)."""
    length = _fast(n)
    spectrum = rng.standard_normal((length // 2 + 1, 2), np.float32).view(np.complex64)[:, 0]
    spectrum *= np.maximum(np.arange(len(spectrum)), length // 800 + 1).astype(np.float32) ** -rng.uniform(0, 1)
    x_N = np.fft.irfft(spectrum, length)[:n]
    power = float(np.mean(np.square(x_N)))
    return (x_N * (rms / np.sqrt(power) if power > 0 else 0.0)).astype(np.float32)


def loudness(x_N: Samples, rate: int) -> float:
    """Rms over the 20 ms frames within 20 dB of the loudest, so that silence around a clip does not count."""
    frame = max(1, min(len(x_N), rate // 50))
    frames = len(x_N) // frame
    power_F = np.mean(np.square(x_N[: frames * frame].reshape(frames, frame)), axis=1)
    return float(np.sqrt(power_F[power_F >= power_F.max() / 100].mean()))


def _fast(n: int) -> int:
    """A length of at least `n` whose Fourier transform is fast."""
    return -(-n // 1024) * 1024
