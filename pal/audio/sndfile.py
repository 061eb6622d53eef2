"""Decoding of a file in memory by libsndfile."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import soundfile

from pal.audio.pcm import to_float
from pal.audio.reading import file_of
from pal.audio.stream_info import DecodeError, StreamInfo

_ENDLESS = 1 << 62
"""Lengths above this are libsndfile's placeholder for an unknown length."""

_FORK = "._"
"""Path of the resource fork that libsndfile tries for a file without a name, before it tests for MP3."""


class _Forward(soundfile.SoundFile):
    """SoundFile without seeking.

    soundfile seeks after every read to the position where the read ended. This resets the MP3 decoder's bit reservoir,
    so that the next samples would be wrong.
    """

    def seekable(self) -> bool:
        return False


@contextmanager
def opened(data: bytes, info: StreamInfo) -> Iterator[soundfile.SoundFile]:
    """Context manager of the opened payload of `info`, or of `data` if it has none.

    Raises:
        DecodeError: libsndfile cannot open it, or fails while decoding.
    """
    source = file_of(data, info.span) if info.payload is None else file_of(info.payload)
    raw: dict[str, Any] = {}
    if info.raw is not None:
        subtype, order = info.raw
        raw = {"format": "RAW", "subtype": subtype, "endian": order}
        raw |= {"samplerate": info.rate, "channels": info.channels}
    try:
        with _Forward(source, **raw) as file:
            if info.rate not in (None, file.samplerate) or info.channels not in (None, file.channels):
                raise DecodeError("its header is ambiguous: libsndfile reads another rate or number of channels")
            yield file
    except soundfile.SoundFileError as error:
        if not raw and os.path.lexists(_FORK):
            raise DecodeError(f"a file named {_FORK} in the working directory hides it", f"remove {_FORK}") from None
        raise DecodeError(f"it is damaged or of an unknown kind ({_reason(error)})") from None


def length(file: soundfile.SoundFile, info: StreamInfo) -> int | None:
    """Samples of each channel: the declared number, else libsndfile's; None if unknown."""
    if info.frames is not None:
        return info.frames
    return int(file.frames) if 0 <= file.frames < _ENDLESS else None


def blocks(file: soundfile.SoundFile, info: StreamInfo, size: int) -> Iterator[np.ndarray]:
    """Float32 blocks [n, channels] of at most `size` samples. Raises DecodeError if their MD5 differs."""
    ahead = info.skip
    left = None if not ahead or info.frames is None else ahead + info.frames
    dtype = "float32" if info.bits is None else "int32"
    digest = None if info.md5 is None or info.bits is None else Md5(info.bits)
    while left != 0:
        block_NC = file.read(size if left is None else min(size, left), dtype=dtype, always_2d=True)
        if not len(block_NC):
            break
        if left is not None:
            left -= len(block_NC)
        if digest is not None:
            digest.add(block_NC)
        if ahead:
            block_NC, ahead = block_NC[ahead:], max(0, ahead - len(block_NC))
        yield to_float(block_NC)
    # the caller detects missing samples
    if digest is not None and (info.frames is None or info.frames <= digest.frames):
        digest.check(info)


class Md5:
    """MD5 of decoded FLAC samples: little-endian integers of as few bytes as their bits need."""

    def __init__(self, bits: int) -> None:
        self.frames = 0
        """Samples a channel so far."""
        self._bits = bits
        self._digest = hashlib.md5(usedforsecurity=False)

    def add(self, block_NC: np.ndarray) -> None:
        """Add a block of int32 with the samples in the highest bits."""
        self.frames += len(block_NC)
        size = (self._bits + 7) // 8
        little = (block_NC >> 32 - self._bits).astype("<i4").view(np.uint8).reshape(*block_NC.shape, 4)
        self._digest.update(little[..., :size].tobytes())

    def check(self, info: StreamInfo) -> None:
        """Raise DecodeError if it differs from the declared MD5."""
        if self._digest.digest() != info.md5:
            raise DecodeError("it is damaged: its samples do not have the checksum it gives")


def _reason(error: Exception) -> str:
    text = " ".join(str(getattr(error, "error_string", error)).removeprefix("Error : ").split())
    return text.rstrip(".") or "the decoder failed"
