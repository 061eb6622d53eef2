"""A file in memory, decoded by libsndfile from its start to its end."""

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import soundfile

from pal.audio.declared import Declared, DecodeError
from pal.audio.pcm import to_float

_ENDLESS = 1 << 62
"""More samples than this stand for a length that libsndfile does not know."""

_FORK = "._"
"""Where libsndfile looks for the resource fork of a file without a name, before it looks whether it is an MP3."""


class _Forward(soundfile.SoundFile):
    """A file that cannot seek.

    soundfile seeks after every read to where the read ended. That is no move, but an MP3 decoder forgets what earlier
    frames hold of the next ones, and the samples behind are wrong.
    """

    def seekable(self) -> bool:
        return False


@contextmanager
def opened(data: bytes, declared: Declared) -> Iterator[soundfile.SoundFile]:
    """The file as a context; `data` is what holds it where `declared` has no other payload.

    Raises:
        DecodeError: libsndfile cannot open it, or fails on the way.
    """
    if declared.payload is not None:
        data = declared.payload
    elif declared.span is not None:
        data = data[slice(*declared.span)]
    source = io.BytesIO(data)
    raw: dict[str, Any] = {}
    if declared.raw is not None:
        subtype, order = declared.raw
        raw = {"format": "RAW", "subtype": subtype, "endian": order}
        raw |= {"samplerate": declared.rate, "channels": declared.channels}
    try:
        with _Forward(source, **raw) as file:
            if declared.rate not in (None, file.samplerate) or declared.channels not in (None, file.channels):
                raise DecodeError("its header is read in two ways")
            yield file
    except soundfile.SoundFileError as error:
        if not raw and os.path.lexists(_FORK):
            raise DecodeError(f"a file named {_FORK} in the working directory hides it", f"remove {_FORK}") from None
        raise DecodeError(f"it is damaged or of an unknown kind ({_reason(error)})") from None


def length(file: soundfile.SoundFile, declared: Declared) -> int | None:
    """Samples a channel: those declared, else what libsndfile says; None where nobody knows."""
    if declared.frames is not None:
        return declared.frames
    return int(file.frames) if 0 <= file.frames < _ENDLESS else None


def blocks(file: soundfile.SoundFile, declared: Declared, size: int) -> Iterator[np.ndarray]:
    """Float32 blocks [n, channels] of at most `size`. Raises DecodeError where the samples have another MD5."""
    ahead = declared.skip
    left = None if not ahead or declared.frames is None else ahead + declared.frames
    dtype = "float32" if declared.bits is None else "int32"
    digest = None if declared.md5 is None or declared.bits is None else Md5(declared.bits)
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
    # of samples that are missing the caller finds out
    if digest is not None and (declared.frames is None or declared.frames <= digest.frames):
        digest.check(declared)


class Md5:
    """The MD5 of samples as a FLAC file gives it: integers in as few bytes as hold their bits, little-endian."""

    def __init__(self, bits: int) -> None:
        self.frames = 0
        """Samples a channel so far."""
        self._bits = bits
        self._digest = hashlib.md5(usedforsecurity=False)

    def add(self, block_NC: np.ndarray) -> None:
        """Take a block of int32 whose highest bits are those of the samples."""
        self.frames += len(block_NC)
        size = (self._bits + 7) // 8
        little = (block_NC >> 32 - self._bits).astype("<i4").view(np.uint8).reshape(*block_NC.shape, 4)
        self._digest.update(little[..., :size].tobytes())

    def check(self, declared: Declared) -> None:
        """Raise DecodeError where it is not the one that the file gives."""
        if self._digest.digest() != declared.md5:
            raise DecodeError("it is damaged: its samples do not have the checksum it gives")


def _reason(error: Exception) -> str:
    text = " ".join(str(getattr(error, "error_string", error)).removeprefix("Error : ").split())
    return text.rstrip(".") or "the decoder failed"
