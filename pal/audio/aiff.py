"""The chunks of AIFF and AIFF-C files."""

import struct
from collections.abc import Iterator
from math import ldexp

from pal.audio.samples import MAX_CHUNKS, SampleFormat, cut, is_placeholder, no_length, pcm, too_many_chunks
from pal.audio.stream_info import CONVERT, DecodeError, StreamInfo

_FIXED = {
    b"in24": ("PCM_24", "BIG"),
    b"in32": ("PCM_32", "BIG"),
    b"42ni": ("PCM_24", "LITTLE"),
    b"42n1": ("PCM_24", "LITTLE"),
    b"23ni": ("PCM_32", "LITTLE"),
    b"fl32": ("FLOAT", "BIG"),
    b"fl64": ("DOUBLE", "BIG"),
    b"alaw": ("ALAW", "BIG"),
    b"ulaw": ("ULAW", "BIG"),
}
"""AIFF-C's codecs of fixed sample size, in any letter case."""
_BY_BITS = {b"none": "BIG", b"twos": "BIG", b"sowt": "LITTLE"}
_PACKED = (b"ima4", b"gsm ", b"dwvw")
"""Codecs whose header may count packets instead of samples."""


def read_header(data: bytes) -> StreamInfo:
    """Read the COMM chunk (number and format of samples) and locate the SSND chunk (the samples), in any order.

    By Apple's Audio Interchange File Format 1.3 and AIFF-C draft of 1991. An odd chunk has a pad byte, which some
    programs leave out; the size of the outer chunk is not needed, since the samples are counted. A fractional rate
    (22254.54 Hz on old Macintoshes) is rounded to the nearest, as FFmpeg does.

    Raises:
        DecodeError: truncated, contradictory, or an unsupported codec.
    """
    comm: bytes | None = None
    sound: tuple[int, int] | None = None
    for name, start, size in _chunks(data):
        if name == b"COMM" and comm is None:
            comm = data[start : start + size]
        elif name == b"SSND" and sound is None:
            sound = start, size
        if comm is not None and sound is not None:
            break
    if comm is None or len(comm) < (22 if data[8:12] == b"AIFC" else 18):
        raise DecodeError("it is cut or damaged: it has no chunk that describes its sound (COMM)")
    if sound is None or sound[0] + 8 > len(data):
        raise DecodeError("it is cut: it has no sound (SSND chunk)")
    channels, frames, bits, exponent, mantissa = struct.unpack_from(">HIHHQ", comm)
    rate = ldexp(mantissa, (exponent & 0x7FFF) - 16383 - 63) if exponent & 0x7FFF < 16383 + 40 else 0.0
    if rate < 1:
        raise DecodeError(f"its rate of {rate:g} Hz is not a sampling rate", CONVERT)
    codec = comm[18:22].lower() if data[8:12] == b"AIFC" else b"none"

    start, size = sound
    (offset,) = struct.unpack_from(">I", data, start)
    start, size = start + 8 + offset, size - 8 - offset
    held = len(data) - start
    if codec in _PACKED:
        if size > held:
            raise cut(size, held)
        return StreamInfo(None, int(rate), channels)  # libsndfile's, which cuts the fraction off
    sample_format = SampleFormat(int(rate + 0.5), channels, *_kind(codec, bits))
    needed = frames * sample_format.align
    if not channels:
        raise DecodeError("its 0 channels are not 1 to 8")
    unknown = is_placeholder(needed, held, sample_format.align) or (frames and is_placeholder(frames, held))
    if unknown and (size <= 0 or size == needed or is_placeholder(size, held)):
        return sample_format.stream_info(start, held, no_length(needed, held))
    if needed > held:
        raise cut(needed, max(0, held))
    if 0 < size < needed or (size - needed >= sample_format.align and not is_placeholder(size, held)):
        raise DecodeError(f"it contradicts itself: {frames} samples are {needed} bytes, its sound chunk says {size}")
    return sample_format.stream_info(start, needed)


def _kind(codec: bytes, bits: int) -> tuple[str, str]:
    """(libsndfile subtype, byte order)."""
    if codec in _FIXED:
        return _FIXED[codec]
    if codec in _BY_BITS:
        return pcm(bits), _BY_BITS[codec]
    if codec == b"raw ":
        return pcm(bits, unsigned_8=True), "BIG"
    shown = "".join(chr(byte) if 32 <= byte < 127 else "?" for byte in codec).strip()
    raise DecodeError(f"it is an AIFF-C file whose codec is not supported ({shown})", CONVERT)


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, start of its content, size) of each chunk, up to the end of the file or to invalid bytes."""
    start = 12
    for _ in range(MAX_CHUNKS):
        if start + 8 > len(data) or not _is_name(data, start):
            return
        name = data[start : start + 4]
        (size,) = struct.unpack_from(">I", data, start + 4)
        start += 8
        yield name, start, size
        start += size
        if size % 2 and (_is_name(data, start + 1) or not _is_name(data, start)):
            start += 1
    raise too_many_chunks()


def _is_name(data: bytes, start: int) -> bool:
    name = data[start : start + 4]
    return len(name) == 4 and all(32 <= byte < 127 for byte in name)
