"""Uncompressed sample formats of containers, and placeholder sizes in headers."""

from dataclasses import dataclass

from pal.audio.stream_info import DecodeError, StreamInfo

_BYTES = {"PCM_S8": 1, "PCM_U8": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8}
_BYTES |= {"ALAW": 1, "ULAW": 1}
"""Bytes of one sample, by libsndfile subtype."""
_EDGES = (1 << 31, 1 << 32, 1 << 63, 1 << 64)
_ROUND = (10**8, 1 << 24)
MAX_CHUNKS = 10_000
"""Most chunks of a file. Known files have some dozens; a million empty ones would take long to read."""


@dataclass(frozen=True)
class SampleFormat:
    """PCM sample format: interleaved samples of a fixed size."""

    rate: int
    channels: int
    subtype: str
    """libsndfile subtype, such as "PCM_16"."""
    order: str = "BIG"
    """Byte order, "BIG" or "LITTLE"."""

    @property
    def align(self) -> int:
        """Bytes of one sample of all channels."""
        return self.channels * _BYTES[self.subtype]

    def stream_info(self, start: int, size: int, doubt: str | None = None) -> StreamInfo:
        """Stream info of `size` bytes from `start` of the file; with a doubt a last partial sample is left out.

        Raises:
            DecodeError: no channels, or the bytes are not a whole number of samples.
        """
        if not self.channels:
            raise DecodeError("its 0 channels are not 1 to 8")
        if size % self.align and doubt is None:
            raise DecodeError(f"its sound of {size} bytes is no whole number of {self.align}-byte samples")
        frames = size // self.align
        span = start, start + frames * self.align
        return StreamInfo(frames, self.rate, self.channels, span=span, raw=(self.subtype, self.order), doubt=doubt)


def pcm(bits: int, unsigned_8: bool = False) -> str:
    """libsndfile subtype of integers of `bits` bits, stored in the upper bits of whole bytes.

    Raises:
        DecodeError: not 1 to 32 bits.
    """
    if not 1 <= bits <= 32:
        raise DecodeError(f"its samples of {bits} bits are not supported")
    return ("PCM_U8" if unsigned_8 else "PCM_S8", "PCM_16", "PCM_24", "PCM_32")[(bits - 1) // 8]


def is_placeholder(size: int, held: int, align: int = 1) -> bool:
    """Whether a size is a streaming program's placeholder, and not that of a truncated file.

    A program that writes to a pipe cannot return to the header. It leaves 0 there, or a very large number: all ones, up
    to 64 KiB below 2^31 or 2^32 (or equal to it), or a round number (a multiple of 100,000,000 or of 16 MiB). Such a
    number counts as a real size if the file holds at least half of it, since recorders split their files at such
    sizes.

    Args:
        size: in the header.
        held: bytes present behind the header.
        align: bytes of one sample of all channels; SoX rounds its placeholders down to a multiple of it.
    """
    if size == 0:
        return held > 0
    if size <= 2 * held:
        return False
    return any(edge - (1 << 16) <= size <= edge for edge in _EDGES) or any(-size % unit < align for unit in _ROUND)


def no_length(size: int, held: int) -> str:
    """Text of `doubt` for a placeholder size."""
    return (
        f"its header gives no length, so a cut could not be noticed (its size of {size} bytes is a placeholder,"
        f" {held} are there)"
    )


def between_headers(data: bytes, start: int) -> tuple[int, int]:
    """(start, end) of the sound behind a header of `start` bytes, without repeated headers.

    If libsndfile cannot seek in its file, it writes the header again before the sound and behind it, as in
    `sox in -t caf - | cat`.
    """
    name, end = data[:16], len(data)
    last = end - start
    if data[start : start + 16] == name:
        start += start
    return start, last if last >= start and data[last : last + 16] == name else end


def too_many_chunks() -> DecodeError:
    """Error for more than MAX_CHUNKS."""
    return DecodeError(f"it has more than {MAX_CHUNKS} chunks, which is no recording", "check what wrote it")


def cut(size: int, held: int) -> DecodeError:
    """Error for sound that passes the end of the file."""
    return DecodeError(f"it is cut: its sound should take {size} bytes, the file holds {held}")
