"""Waveform augmentation that keeps labels true.

Each option is off by default. Changes are applied in the order of the fields. Their effect is bounded, so that a label
never loses its sound, whatever the clip:

- Cuts (`crop_seconds`, and `time_shift` without `wrap`) need times for every label, and are refused without them.
  A tag with times moves with its sound, and is dropped if its sound is cut off.
- Filters (`eq_db`, `lowpass`) attenuate no frequency by more than 12 and `KEPT_DB` decibels.
- Frequency shifts (`speed`, `warp`) are limited so that every 20 ms keep a tenth of their energy (`KEPT_DB`) below half
  the rate. A high sound that is masked by a much louder one can still be lost.
- `gain_db` leaves a clip above `QUIETEST_DB`, and `noise_db` stays below the quietest tag (`LEAST_NOISE_DB` below the
  clip where labels have no times; a sound that is quieter than the clip by more is then masked).

Some options still change correct answers: `pad_seconds` and `time_shift` move events (no "when" questions then, and
with `wrap` no questions of order), `speed` changes pitch, `gain_db` changes level.
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
from pal.errors import ConfigError
from pal.types import TagSpan

_FRAME, _HOP = 512, 128
"""Frame length and hop of `warp`, in samples."""

Tags = list[TagSpan] | None
Samples = NDArray[np.float32]

SHORTEST_TAG = 0.05
"""Shortest part of a tag in seconds that a cut may leave; shorter parts are inaudible. It may also remove the tag."""
KEPT_DB = 10.0
"""Most decibels that a sound may lose: by a cut, above a low-pass, by a shift upwards in frequency."""
GONE_DB = 40.0
"""Level below a tag's loud parts, in decibels, at which its sound counts as gone."""
QUIETEST_DB = -70.0
"""Lowest loudness of a clip after `gain_db`, in decibels relative to full scale."""
LEAST_NOISE_DB = 10.0
"""Lowest signal-to-noise ratio in decibels where labels have no times."""
TRIES = 30
"""Most positions tried for a cut, until each tag is either gone or audible; then the clip stays whole."""


def _ascending(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"a range goes from the smaller to the larger number, not from {pair[0]} to {pair[1]}")
    return pair


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Real = Annotated[float, Field(allow_inf_nan=False)]
_Speed = Annotated[float, Field(ge=0.5, le=2)]
_Ratio = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Range = Annotated[tuple[Real, Real], AfterValidator(_ascending)]
Speeds = Annotated[tuple[_Speed, _Speed], AfterValidator(_ascending)]
Ratios = Annotated[tuple[_Ratio, _Ratio], AfterValidator(_ascending)]
PositiveRange = Annotated[tuple[Positive, Positive], AfterValidator(_ascending)]


class Augment:
    """Applies the configured changes; the same generator state gives the same clip.

    Call it with samples [N] (mono float32), their rate in Hz, a generator, and the tags or None.
    It returns new samples and tags, at least one sample long, and leaves its arguments alone.
    """

    class Config(StrictConfig):
        """Options of the augmentation: which changes, and their range."""

        probability: float = Field(1.0, gt=0, le=1)
        """Probability of each change, independently."""
        speed: Speeds | None = None
        """Range of the playback speed, such as [0.9, 1.1], which also shifts pitch and formants. From 0.5 to 2, and
        slower where a sound would leave the band."""
        crop_seconds: Positive | None = None
        """Random crop of a longer clip to this length. Only with objective 'tags' and tags that all have times: an
        answer, or a label without times, may be about the part that is cut off. No tag is left too short or too
        faint to be audible; a clip without such a crop stays whole."""
        pad_seconds: Positive | None = None
        """Place a shorter clip at a random time in a silent window of this length."""
        time_shift: Positive | None = None
        """Most seconds of a shift in time, either way. Without `wrap` it cuts, with the conditions of
        `crop_seconds`."""
        wrap: bool = False
        """Circular `time_shift`: samples shifted out at one end come in at the other, instead of silence."""
        warp: Annotated[float, Field(gt=0, lt=0.5)] | None = None
        """Vocal tract length perturbation: stretch of the spectrum by up to this share either way; less where a sound
        would leave the band."""
        eq_db: Annotated[float, Field(gt=0, le=12)] | None = None
        """Random smooth equaliser of up to so many decibels either way, at most 12, as between microphones."""
        lowpass: PositiveRange | None = None
        """Range in Hz of the cut-off of a low-pass that attenuates by 10 dB: sounds above get dull, not lost."""
        gain_db: Range | None = None
        """Range of the gain in decibels, limited so that peaks stay within full scale and the clip above -70 dB."""
        noise_db: Ratios | None = None
        """Range of the signal-to-noise ratio in decibels, 0 or more, of added noise between white and brown. The
        signal is the quietest tag; where labels have no times it is the clip, and the ratio at least 10."""

        @property
        def cuts(self) -> str | None:
            """The option that may cut a sound out of the clip, if there is one."""
            if self.crop_seconds is not None:
                return "crop_seconds"
            return "time_shift" if self.time_shift is not None and not self.wrap else None

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, samples_N: Tensor, rate: int, rng: np.random.Generator, tags: Tags) -> tuple[Tensor, Tags]:
        """Change one clip.

        Raises:
            ConfigError: it may cut out the sound of a label without times.
        """
        c = self.config
        untimed = _untimed(tags)
        if c.cuts is not None and untimed is not None:
            raise ConfigError(f"augment: {cut_fault(c.cuts, untimed)}")
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
            x_N = warp(x_N, _held_in_band(x_N, rate, float(np.exp(rng.uniform(-1, 1) * np.log1p(c.warp)))))
        if c.eq_db is not None and self._chosen(rng):
            x_N = equalise(x_N, rng.uniform(-c.eq_db, c.eq_db, 9))
        if c.lowpass is not None and self._chosen(rng):
            x_N = lowpass(x_N, rate, float(np.exp(rng.uniform(*np.log(c.lowpass)))))
        if c.gain_db is not None and self._chosen(rng):
            peak = float(np.abs(x_N).max())
            gain = 10 ** (rng.uniform(*c.gain_db) / 20)
            if peak > 0:
                gain = max(gain, min(1.0, 10 ** (QUIETEST_DB / 20) / loudness(x_N, rate)))
            # a clip already above full scale may become quieter, never louder
            x_N = x_N * np.float32(min(gain, max(1.0, 1 / peak)) if peak > 0 else gain)
        if c.noise_db is not None and self._chosen(rng):
            ratio_db = rng.uniform(*c.noise_db)
            if untimed is not None:
                ratio_db = max(ratio_db, LEAST_NOISE_DB)
            x_N = x_N + noise(rng, len(x_N), _quietest(x_N, rate, tags) * 10 ** (-ratio_db / 20))
        return torch.from_numpy(np.ascontiguousarray(x_N)), tags

    def _chosen(self, rng: np.random.Generator) -> bool:
        return bool(rng.random() < self.config.probability)

    def _speed(self, x_N: Samples, rate: int, rng: np.random.Generator, tags: Tags) -> tuple[Samples, Tags]:
        assert self.config.speed is not None
        speed = _held_in_band(x_N, rate, float(np.exp(rng.uniform(*np.log(self.config.speed)))))
        faster_N = np.asarray(soxr.resample(x_N, rate * speed, rate, quality="QQ"), np.float32)
        if not len(faster_N):
            return x_N, tags
        return faster_N, moved(tags, lambda t: t / speed, len(faster_N) / rate)

    def _crop(self, x_N: Samples, rate: int, rng: np.random.Generator, tags: Tags) -> tuple[Samples, Tags]:
        assert self.config.crop_seconds is not None
        length = max(1, round(self.config.crop_seconds * rate))
        for _ in range(TRIES):
            first = int(rng.integers(0, max(0, len(x_N) - length) + 1))
            piece_N = x_N[first : first + length]
            left = audible_tags(x_N, rate, tags, first, first + len(piece_N))
            if left is not None:
                return piece_N, _later(left, -first / rate, len(piece_N) / rate)
        return x_N, tags

    def _pad(self, x_N: Samples, rate: int, rng: np.random.Generator, tags: Tags) -> tuple[Samples, Tags]:
        assert self.config.pad_seconds is not None
        length = max(len(x_N), round(self.config.pad_seconds * rate))
        first = int(rng.integers(0, length - len(x_N) + 1))
        window_N = np.zeros(length, np.float32)
        window_N[first : first + len(x_N)] = x_N
        return window_N, _later(tags, first / rate, length / rate)

    def _shift(self, x_N: Samples, rate: int, rng: np.random.Generator, tags: Tags) -> tuple[Samples, Tags]:
        assert self.config.time_shift is not None
        most = min(round(self.config.time_shift * rate), len(x_N) - 1)
        seconds = len(x_N) / rate
        if self.config.wrap:
            by = int(rng.integers(-most, most + 1))
            return np.roll(x_N, by), _around(tags, by / rate, seconds)
        for _ in range(TRIES):
            by = int(rng.integers(-most, most + 1))
            left = audible_tags(x_N, rate, tags, max(0, -by), len(x_N) - max(0, by))
            if left is not None:
                shifted_N = np.roll(x_N, by)
                shifted_N[slice(0, by) if by >= 0 else slice(by, None)] = 0
                return shifted_N, _later(left, by / rate, seconds)
        return x_N, tags


def cut_fault(option: str, label: str) -> str:
    """Error message for an option that cuts clips; `label` names, in words, a label without times."""
    remedy = "set 'wrap: true'" if option == "time_shift" else "crop files beforehand"
    return (
        f"'{option}' may cut out what {label} is about, since its time is unknown; use it with objective 'tags' "
        f"and tags that have start and end, {remedy}, or leave it out"
    )


def _untimed(tags: Tags) -> str | None:
    """Name of a label without times, in words; None if all labels have times."""
    if tags is None:
        return "the clip's label"
    return next((f"the label '{tag.label}'" for tag in tags if tag.start is None or tag.end is None), None)


def moved(tags: Tags, move: Callable[[float], float], seconds: float) -> Tags:
    """Tags with `move` applied to their times, clipped to `seconds`; tags without both times stay unchanged."""
    if tags is None:
        return None
    return [
        tag
        if tag.start is None or tag.end is None
        else replace(tag, start=_within(move(tag.start), seconds), end=_within(move(tag.end), seconds))
        for tag in tags
    ]


def _later(tags: Tags, by: float, seconds: float) -> Tags:
    return moved(tags, lambda t: t + by, seconds)


def _around(tags: Tags, by: float, seconds: float) -> Tags:
    """Tags after a circular shift of the samples by `by` seconds."""
    if tags is None:
        return None
    out = []
    for tag in tags:
        if tag.start is None or tag.end is None:
            out.append(tag)
            continue
        # a tag's part shifted out at one end is at the other end
        places = [(tag.start + move, tag.end + move) for move in (by, by - float(np.sign(by)) * seconds)]
        inside = [(_within(start, seconds), _within(end, seconds)) for start, end in dict.fromkeys(places)]
        pieces = [piece for piece in inside if piece[1] > piece[0]] or inside[:1]
        out += [replace(tag, start=start, end=end) for start, end in pieces]
    return out


def _within(t: float, seconds: float) -> float:
    return min(max(0.0, float(t)), seconds)


def audible_tags(x_N: Samples, rate: int, tags: Tags, first: int, last: int) -> Tags:
    """Tags audible in the samples from `first` to `last`; None if a tag is neither audible nor gone."""
    out = []
    for tag in tags or ():
        assert tag.start is not None and tag.end is not None
        start, end = max(tag.start, first / rate), min(tag.end, last / rate)
        if tag.start == tag.end:  # an instant
            if first / rate <= tag.start < last / rate:
                out.append(tag)
            continue
        whole_N = x_N[round(tag.start * rate) : round(tag.end * rate)]
        left_N = x_N[round(start * rate) : round(end * rate)]
        if end <= start or not len(left_N):
            continue
        level_db = 20 * np.log10(max(loudness(left_N, rate), 1e-9) / max(loudness(whole_N, rate), 1e-9))
        if level_db <= -GONE_DB:
            continue
        if level_db < -KEPT_DB or end - start < min(SHORTEST_TAG, 0.999 * (tag.end - tag.start)):
            return None
        out.append(tag)
    return out


def _quietest(x_N: Samples, rate: int, tags: Tags) -> float:
    """Loudness of the quietest audible tag, or of the clip where labels have no times."""
    whole = loudness(x_N, rate)
    spans = [(tag.start, tag.end) for tag in tags or () if tag.start is not None and tag.end is not None]
    parts = [x_N[round(start * rate) : round(end * rate)] for start, end in spans]
    levels = [loudness(part_N, rate) for part_N in parts if len(part_N)]
    return min([whole, *(level for level in levels if level > whole * 10 ** (-GONE_DB / 20))])


def _held_in_band(x_N: Samples, rate: int, factor: float) -> float:
    """`factor`, or less, so that each 20 ms frame keeps a tenth of its energy in the band after scaling frequencies.

    Frames `GONE_DB` below the loudest one count as silent.
    """
    if factor <= 1:
        return factor
    size = max(64, rate // 50)
    spectrum_XF = torch.stft(
        torch.from_numpy(x_N), size, size // 2, window=torch.hann_window(size), pad_mode="constant", return_complex=True
    )
    power_XF = spectrum_XF.abs().double().square().numpy()
    power_F = power_XF.sum(0)
    sounds_F = power_F > power_F.max() * 10 ** (-GONE_DB / 10)
    if not sounds_F.any():
        return factor
    share_XF = np.cumsum(power_XF[:, sounds_F], axis=0) / power_F[sounds_F]
    # the bin that reaches a tenth of a frame's energy, and one more for the leakage of its window
    highest = (int((share_XF >= 10 ** (-KEPT_DB / 10)).argmax(0).max()) + 1) / (len(power_XF) - 1)
    return max(1.0, min(factor, _BAND / highest))


_BAND = 0.92
"""Highest frequency after a shift, relative to half the rate; fast resampling attenuates above it."""


def warp(x_N: Samples, factor: float) -> Samples:
    """Scale frequencies by `factor`, without change in time: vocal tract length perturbation (Jaitly and Hinton 2013).

    A phase vocoder with identity phase locking (Laroche and Dolson 1999): phases advance `factor` times as fast. They
    are counted from the middle of each frame, so that a steady tone does not cancel itself where frames overlap.
    """
    window = torch.hann_window(_FRAME)
    spectrum_XF = torch.stft(
        torch.from_numpy(x_N), _FRAME, _HOP, window=window, pad_mode="constant", return_complex=True
    )
    bins = len(spectrum_XF)
    source_X = torch.arange(bins) / factor
    low_X = source_X.long().clamp(max=bins - 2)
    share_X1 = (source_X - low_X).clamp(0, 1)[:, None]
    magnitude_XF = spectrum_XF.abs()
    moved_XF = magnitude_XF[low_X] * (1 - share_X1) + magnitude_XF[low_X + 1] * share_X1
    moved_XF[source_X > bins - 1] = 0
    angle_XF = spectrum_XF.angle().double()
    half_turns_X1 = torch.pi * torch.arange(bins, dtype=torch.float64)[:, None]  # from a frame's start to its middle
    expected_X1 = half_turns_X1 * 2 * _HOP / _FRAME
    apart_XF = torch.diff(angle_XF, dim=1) - expected_X1
    turned_XF = apart_XF - 2 * torch.pi * torch.round(apart_XF / (2 * torch.pi)) + expected_X1
    more_XF = torch.from_numpy(_turned_more(magnitude_XF.numpy(), ((factor - 1) * turned_XF).numpy()))
    nearest_X = source_X.round().long().clamp(max=bins - 1)
    phase_XF = (angle_XF + more_XF + half_turns_X1)[nearest_X] - half_turns_X1
    out_XF = torch.polar(moved_XF, phase_XF.float())
    return torch.istft(out_XF, _FRAME, _HOP, window=window, length=len(x_N)).numpy()


def _turned_more(magnitude_XF: NDArray[np.float32], more_XF: NDArray[np.float64]) -> NDArray[np.float64]:
    """Accumulated extra phase of each bin in radians, where all bins around a peak take the peak's phase advance.

    Args:
        magnitude_XF: of the frames.
        more_XF: extra phase advance of each bin from one frame to the next.
    """
    bins, frames = magnitude_XF.shape
    padded_XF = np.pad(magnitude_XF, ((2, 2), (0, 0)), constant_values=-1.0)
    peak_XF = np.all([magnitude_XF >= padded_XF[2 + by : 2 + by + bins] for by in (-2, -1, 1, 2)], axis=0)
    at_X = np.arange(bins)
    out_XF = np.zeros((bins, frames))
    for frame in range(1, frames):
        peaks = np.flatnonzero(peak_XF[:, frame])
        # each bin's nearest peak, the lower of two
        nearest_X = peaks[np.searchsorted((peaks[1:] + peaks[:-1]) / 2, at_X)]
        out_XF[:, frame] = (out_XF[:, frame - 1] + more_XF[:, frame - 1])[nearest_X]
    return out_XF


def equalise(x_N: Samples, gains_db: NDArray[np.float64]) -> Samples:
    """Equaliser with a curve through `gains_db`, at frequencies from 0 Hz to half the rate, denser at the low end."""
    length = _fast(len(x_N))
    frequencies = np.linspace(0, 1, length // 2 + 1)
    curve_db = np.interp(frequencies, np.linspace(0, 1, len(gains_db)) ** 1.5, gains_db)
    spectrum = np.fft.rfft(x_N, length) * (10 ** (curve_db / 20)).astype(np.float32)
    return np.fft.irfft(spectrum, length)[: len(x_N)].astype(np.float32)


def lowpass(x_N: Samples, rate: int, hz: float) -> Samples:
    """Low-pass that attenuates by `KEPT_DB` above `hz`, with a raised-cosine edge a third of an octave wide."""
    length = _fast(len(x_N))
    frequencies = np.fft.rfftfreq(length, 1 / rate)
    octaves = np.log2(np.maximum(frequencies, 1e-6) / hz)
    lowered = 10 ** (-KEPT_DB / 20)
    keep = lowered + (1 - lowered) * (0.5 + 0.5 * np.cos(np.pi * np.clip(octaves * 3, 0, 1)))
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
    """Length of at least `n` with a fast Fourier transform."""
    return -(-n // 1024) * 1024
