"""What a file's own headers say it holds, and the exception for what is wrong with it.

Each container has a reader `declared(data: bytes) -> Declared`. It raises a DecodeError for what is wrong, and sets
`doubt` where the sound is there but its end cannot be known; `load` then asks whether that is wanted (`read_to_end`).
"""

from dataclasses import dataclass, field

REENCODE = "fetch it again, or if it plays to its end re-encode it: ffmpeg -i IN OUT.wav"
"""Remedy for damage that a player would hide."""
TO_THE_END = "fetch it again, or take it as far as it goes: read_to_end=True, --read-to-end"
"""Remedy for a length that nobody can know."""


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
    span: tuple[int, int] | None = None
    """From where to where in the file the library gets it, where it gets no payload and not all of it."""
    raw: tuple[str, str] | None = None
    """(subtype, byte order) as libsndfile names them, where `payload` or `span` is samples without a header."""
    av_format: str | None = None
    """FFmpeg's name of the format, where only the av package decodes it."""
    skip: int = 0
    """Samples that `payload` holds before the sound; then it also may hold some behind it."""
    slack: int = 0
    """Samples by which the sound may be shorter than declared, where only decoding can tell."""
    rest: tuple["Declared", ...] = ()
    """What follows in the file, decoded by itself (the links of a chained Ogg file)."""
    doubt: str | None = None
    """Why the end of the sound cannot be known, as "its header gives no length, ...". Such a file is refused with
    this line unless the caller asked to read to the end; then all fields describe what is there."""
