"""Stream info from a file's header, and the exception for faults in it.

Each container has a reader `read_header(data: bytes) -> StreamInfo`. It raises a DecodeError for a fault, and sets
`doubt` if the end of the sound cannot be verified; `load` accepts such a file only with `read_to_end`.
"""

from dataclasses import dataclass, field

REENCODE = "fetch it again, or if it plays to its end re-encode it: ffmpeg -i IN OUT.wav"
"""Remedy for damage that players conceal."""
CONVERT = "convert it: ffmpeg -i IN OUT.wav"
"""Remedy for a format or codec that is not supported."""
TO_THE_END = "fetch it again, or take it as far as it goes: read_to_end=True, --read-to-end"
"""Remedy for a length that cannot be verified."""


class DecodeError(Exception):
    """Fault of an audio source; `load` adds the name and raises it as an AudioError."""

    def __init__(self, what: str, remedy: str = REENCODE) -> None:
        super().__init__(what)
        self.what = what
        self.remedy = remedy


@dataclass(frozen=True)
class StreamInfo:
    """Stream info that a file's header declares; decoding must confirm it."""

    frames: int | None
    """Samples of each channel; None if only decoding can count them."""
    rate: int | None = None
    channels: int | None = None
    md5: bytes | None = None
    """MD5 of the samples as interleaved little-endian integers of `bits` bits (FLAC)."""
    bits: int | None = None
    payload: bytes | None = field(default=None, repr=False)
    """Bytes to decode instead of the file."""
    span: tuple[int, int] | None = None
    """(start, end) of the bytes to decode in the file, without `payload`; None for the whole file."""
    raw: tuple[str, str] | None = None
    """(subtype, byte order) in libsndfile's names, if `payload` or `span` is samples without a header."""
    av_format: str | None = None
    """FFmpeg's name of the format, if only the av package decodes it."""
    skip: int = 0
    """Samples of `payload` before the sound; if set, there may also be some behind it."""
    slack: int = 0
    """Samples by which the sound may be shorter than declared, if only decoding can tell."""
    rest: tuple["StreamInfo", ...] = ()
    """Following parts of the file, decoded separately (the links of a chained Ogg file)."""
    doubt: str | None = None
    """Why the end of the sound cannot be verified, such as "its header gives no length, ...". Such a file is refused
    with this line unless `read_to_end` is set; then all fields describe the bytes present."""
