"""`Waveform`, and `load`, which makes it of any source."""

from dataclasses import dataclass

import numpy as np
import soxr
import torch
from torch import Tensor

from pal.audio.decode import Source, load_into
from pal.audio.limits import Limits

_LIMITS = Limits()


@dataclass(frozen=True)
class Waveform:
    """Mono samples at the model's rate, with the clip's name and length."""

    samples_N: Tensor
    """Mono float32."""
    rate: int
    """Rate of the samples in Hz, as requested."""
    seconds: float
    """Length of the source, by its own rate."""
    name: str
    """Path, or name of another source."""
    note: str | None = None
    """With `read_to_end`, if the length could not be verified: one sentence with the reason."""


def load(
    source: Source, rate: int, limits: Limits = _LIMITS, name: str | None = None, read_to_end: bool = False
) -> Waveform:
    """Decode a clip, mix it down to mono and resample it.

    Args:
        source: a path; the bytes of a file; a file object open for reading bytes; or (array, rate)
            with samples [N] or [N, channels], floats in -1..1 or integers of full scale.
        rate: of the result in Hz.
        limits: input limits.
        name: name of a source without a path, for messages.
        read_to_end: read a file of unverifiable length (a streamed WAV or FLAC; truncated MPEG audio, Ogg or FLAC) to
            its end and set `note` of the result. Truncated WAV, Wave64, AIFF, AU and CAF are still refused.

    Files may be WAV, AIFF, AU, CAF, Wave64, FLAC, MPEG audio (MP3 and layers I and II), Ogg Vorbis, Opus and Ogg FLAC,
    and with the `av` package m4a, mp4, webm and FLAC of an odd number of bits.

    Raises:
        AudioError: one line with name, fault and remedy. A file that ends before its declared
            end, or declares no end (a streamed WAV or FLAC), is refused: results are never shortened.
    """
    parts: list[np.ndarray] = []
    seconds, shown, note = load_into(parts, source, rate, limits, name, read_to_end)
    return Waveform(torch.from_numpy(np.concatenate(parts)), rate, seconds, shown, note)


def resample(samples_N: Tensor, rate: int, to: int) -> Tensor:
    """Mono samples [N] at another rate: float32 [about N * to / rate], at least one."""
    resampled_N = torch.from_numpy(soxr.resample(samples_N.cpu().float().numpy(), rate, to))
    return resampled_N if len(resampled_N) else samples_N[:1].cpu().float()
