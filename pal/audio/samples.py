"""Samples as containers store them uncompressed, and when a size that a header gives is no size at all."""

from dataclasses import dataclass

from pal.audio.declared import Declared, DecodeError

_BYTES = {"PCM_S8": 1, "PCM_U8": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8}
_BYTES |= {"ALAW": 1, "ULAW": 1}
"""Of one sample, by libsndfile's name of its kind."""
_EDGES = (1 << 31, 1 << 32, 1 << 63, 1 << 64)
_ROUND = (10**8, 1 << 24)
MAX_CHUNKS = 10_000
"""Chunks of one file. Known files have some dozens; a million of empty ones would take long to walk through."""


@dataclass(frozen=True)
class Samples:
    """Interleaved samples of a fixed number of bytes."""

    rate: int
    channels: int
    subtype: str
    """libsndfile's name of one sample's kind, as "PCM_16"."""
    order: str = "BIG"
    """"BIG" or "LITTLE": which byte of a sample comes first."""

    @property
    def align(self) -> int:
        """Bytes of one sample of all channels."""
        return self.channels * _BYTES[self.subtype]

    def declared(self, start: int, size: int, doubt: str | None = None) -> Declared:
        """What `size` bytes from `start` of the file hold; with a doubt a last sample that is not whole is left out.

        Raises:
            DecodeError: no channels, or the bytes are no whole number of samples.
        """
        if not self.channels:
            raise DecodeError("its 0 channels are not 1 to 8")
        if size % self.align and doubt is None:
            raise DecodeError(f"its sound of {size} bytes is no whole number of {self.align}-byte samples")
        frames = size // self.align
        span = start, start + frames * self.align
        return Declared(frames, self.rate, self.channels, span=span, raw=(self.subtype, self.order), doubt=doubt)


def pcm(bits: int, unsigned_8: bool = False) -> str:
    """The kind of integers of `bits` bits; they stand in the upper bits of whole bytes.

    Raises:
        DecodeError: where they are not 1 to 32.
    """
    if not 1 <= bits <= 32:
        raise DecodeError(f"its samples of {bits} bits are of no known kind")
    return ("PCM_U8" if unsigned_8 else "PCM_S8", "PCM_16", "PCM_24", "PCM_32")[(bits - 1) // 8]


def is_placeholder(size: int, held: int, align: int = 1) -> bool:
    """Whether a size was written by a program that did not know it, and is not that of a file that was cut.

    A program that writes to a pipe cannot come back to the header. It leaves 0 there, or a number that stands for "very
    much": all ones, what lies up to 64 KiB below 2^31 or 2^32 (or at it), or a round number (a multiple of
    100,000,000 or of 16 MiB). A number like that is believed where the file holds at least half of it, since
    recorders split their files at such sizes.

    Args:
        size: what the header says.
        held: bytes that stand behind it.
        align: bytes of one sample of all channels, to a whole number of which SoX rounds its placeholders down.
    """
    if size == 0:
        return held > 0
    if size <= 2 * held:
        return False
    return any(edge - (1 << 16) <= size <= edge for edge in _EDGES) or any(-size % unit < align for unit in _ROUND)


def no_length(size: int, held: int) -> str:
    """The doubt about a placeholder."""
    return (
        f"its header gives no length, so a cut could not be noticed (its size of {size} bytes is a placeholder,"
        f" {held} are there)"
    )


def between_headers(data: bytes, start: int) -> tuple[int, int]:
    """(start, end) of the sound behind the header, which takes `start` bytes and is left out where it stands again.

    Where it cannot go back in its file, libsndfile writes the header a second time before the sound, and once more
    behind it; `sox in -t caf - | cat` does so.
    """
    name, end = data[:16], len(data)
    last = end - start
    if data[start : start + 16] == name:
        start += start
    return start, last if last >= start and data[last : last + 16] == name else end


def too_many_chunks() -> DecodeError:
    """The error for more than MAX_CHUNKS."""
    return DecodeError(f"it has more than {MAX_CHUNKS} chunks, which is no recording", "check what wrote it")


def cut(size: int, held: int) -> DecodeError:
    """The error for sound that passes the end of the file."""
    return DecodeError(f"it is cut: its sound should take {size} bytes, the file holds {held}")
