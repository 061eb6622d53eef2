"""What a file's own headers say it holds, and the exception for what is wrong with it."""

from dataclasses import dataclass, field

REENCODE = "fetch it again, or if it plays to its end re-encode it: ffmpeg -i IN OUT.wav"
"""Remedy for damage that a player would hide."""


class DecodeError(Exception):
    """Something wrong with a source of audio; `load` adds the name and raises it as an AudioError."""

    def __init__(self, what: str, remedy: str = REENCODE) -> None:
        super().__init__(what)
        self.what = what
        self.remedy = remedy


@dataclass(frozen=True)
class Declared:
    """What decoding must confirm."""

    frames: int | None
    """Samples a channel; None where only the decoding library can tell."""
    rate: int | None = None
    channels: int | None = None
    md5: bytes | None = None
    """Of the samples as interleaved little-endian integers of `bits` bits (FLAC)."""
    bits: int | None = None
    payload: bytes | None = field(default=None, repr=False)
    """What the decoding library gets instead of the file."""
