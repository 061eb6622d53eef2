"""One file through `pal.audio.load` and through independent decoders, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pal.audio import load
from pal.errors import AudioError
from tests.audio.corpus.decoders import Heard, hear

EQUAL, REFUSED, DIFFERENT, RAISED, UNREAD = "equal", "refused", "different", "raised", "unread"
TOLERANCE = 1e-4
_MPEG_LAGS = (0, 529, 1105, 576, 1152, 1681, 2257)
"""Samples by which decoders of MPEG audio lie apart, in either direction: 529 is the decoder's own delay, which some
drop and some play; 1105 is that and the encoder's 576; one frame (576 or 1152) is an Info frame played as silence."""
_TAILS = {"mp3": 3456, "mp2": 3456, "mp1": 1152, "aac": 4096, "vorbis": 0, "opus": 0}
"""Samples by which decoders may end apart: whole frames of padding that only some of them drop."""
_ADPCM_TAIL = 4096
"""Codecs of blocks: some decoders play what fills up the last block, and libsndfile a block that is not there (GSM)."""


@dataclass(frozen=True)
class Verdict:
    """What `load` made of one file."""

    path: Path
    kind: str
    """EQUAL to an independent decoder, REFUSED with an AudioError, DIFFERENT from all, RAISED something else;
    UNREAD where no other decoder reads it whole and we do."""
    line: str
    """The error, or how far apart the samples are."""
    whole: int = 0
    """Decoders that read the file without complaint and agree with one another."""
    codec: str = ""


def judge(path: Path, read_to_end: bool = False, programs: bool = True) -> Verdict:
    """Decode with everything that is here, or without other programs, and compare; nothing is raised."""
    heard = hear(path, programs)
    codec = next((one.codec for one in heard if one.codec), "")
    calm = [one for one in heard if not one.complaint] or heard
    whole = _agreeing([one for one in heard if not one.complaint], codec)
    rates = [one.rate for one in calm]
    rate = max(rates, key=rates.count, default=16_000)
    try:
        wave = load(path, rate, read_to_end=read_to_end)
    except AudioError as error:
        return Verdict(path, REFUSED, str(error).removeprefix(f"{path}: "), whole, codec)
    except Exception as error:
        return Verdict(path, RAISED, f"{type(error).__name__}: {error}", whole, codec)
    ours_N = wave.samples_N.numpy().astype(np.float64)
    apart = [(one.decoder, distance(ours_N, one.mono_N, codec)) for one in heard if one.rate == rate]
    line = ", ".join(f"{decoder} {value:.1e}" for decoder, value in apart)
    if not apart:
        return Verdict(path, UNREAD, "no other decoder reads it", whole, codec)
    if min(value for _, value in apart) <= TOLERANCE:
        return Verdict(path, EQUAL, line, whole, codec)
    # a decoder that complains is no witness
    return Verdict(path, DIFFERENT if any(not one.complaint for one in heard) else UNREAD, line, whole, codec)


def distance(one_N: np.ndarray, other_N: np.ndarray, codec: str) -> float:
    """Largest difference of two decodings, after the codec's own delay; infinite where one is longer."""
    lags = [0]
    if codec.startswith("mp"):
        lags = sorted({sign * lag for lag in _MPEG_LAGS for sign in (1, -1)}, key=abs)
    return min(_at(one_N, other_N, lag, codec) for lag in lags)


def _at(one_N: np.ndarray, other_N: np.ndarray, lag: int, codec: str) -> float:
    first_N, second_N = (one_N[lag:], other_N) if lag >= 0 else (one_N, other_N[-lag:])
    common = min(len(first_N), len(second_N))
    tail = _TAILS.get(codec.removesuffix("float"), _ADPCM_TAIL if "adpcm" in codec or "gsm" in codec else 0)
    if common == 0 or abs(len(first_N) - len(second_N)) > tail:
        return float("inf")
    largest = float(np.abs(first_N[:common] - second_N[:common]).max())
    return largest if np.isfinite(largest) else float("inf")


def _agreeing(heard: list[Heard], codec: str) -> int:
    """The size of the largest set of decoders whose result is that of its first."""
    sizes = [
        sum(other.rate == one.rate and distance(one.mono_N, other.mono_N, codec) <= TOLERANCE for other in heard)
        for one in heard
    ]
    return max(sizes, default=0)
