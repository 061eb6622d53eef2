"""Chunks of WAV files. libsndfile silently shortens a truncated or forged WAV; this refuses it."""

import struct
from collections.abc import Iterator

from pal.audio import wave_format
from pal.audio.samples import MAX_CHUNKS, is_placeholder, no_length, too_many_chunks
from pal.audio.stream_info import DecodeError, StreamInfo

_ONES = 0xFFFFFFFF
_SLACK = 8
"""Bytes of the outer chunk's header, which some programs count in its size."""
_METADATA = (
    b"LIST", b"fact", b"PEAK", b"bext", b"cue ", b"smpl", b"inst", b"plst", b"iXML", b"axml", b"chna", b"cart", b"id3 ",
    b"ID3 ", b"DISP", b"JUNK", b"junk", b"PAD ", b"FLLR", b"acid", b"afsp", b"_PMX", b"wamd", b"guan", b"XMP ",
)  # fmt: skip
"""Chunks that common programs write after the data; their size may pass the end of the file."""


def read_header(data: bytes) -> StreamInfo:
    """Read the chunks of a RIFF, RIFX, RF64 or BW64 file.

    The data chunk must lie inside the file and be followed by a chunk; otherwise its size is too small. Wrong sizes of
    other chunks, and of the outer one, lose no sound and are accepted. A placeholder size (`samples.is_placeholder`)
    sets `doubt`, since a cut could not be noticed; then all following bytes are sound.

    Raises:
        DecodeError: truncated, without format or data, or an unsupported codec.
    """
    order = ">" if data[:4] == b"RIFX" else "<"
    is_64 = data[:4] in (b"RF64", b"BW64")
    (outer,) = struct.unpack_from(order + "I", data, 4)
    big_size = None
    fmt: wave_format.Format | None = None
    for name, start, size in _chunks(data, order):
        if name == b"ds64" and is_64:
            if size < 24 or start + 24 > len(data):
                raise DecodeError("its ds64 chunk is too short")
            outer, big_size = struct.unpack_from("<QQ", data, start)
        elif name == b"data":
            if fmt is None:
                raise DecodeError("it has no format chunk before its data")
            if size == _ONES and big_size is not None:
                size = big_size
            return _sound(data, start, size, outer, fmt)
        elif start + size > len(data):
            break
        elif name == b"fmt ":
            fmt = wave_format.read(data[start : start + size], order)
    if outer + 8 > len(data) + _SLACK:
        raise DecodeError(f"it is cut: its header claims {outer + 8} bytes, the file holds {len(data)}")
    raise DecodeError("it has no data chunk")


def _sound(data: bytes, start: int, size: int, outer: int, fmt: wave_format.Format) -> StreamInfo:
    """Check the data chunk, whose content begins at `start`, and what follows it."""
    held, end = len(data) - start, start + size
    align = 1 if fmt.sample_format is None else fmt.align
    if size == 0 and _is_chunk(data, start):
        return fmt.stream_info(data, start, 0)
    same = size > held and end - 8 <= outer <= end + 1 + _SLACK  # the outer size was computed from this one
    if is_placeholder(size, held, align) or (same and any(is_placeholder(claim, held) for claim in (outer, outer + 8))):
        return fmt.stream_info(data, start, held, no_length(size, held))
    if size > held:
        if outer + 8 > len(data) + _SLACK:
            raise DecodeError(f"it is cut: its header claims {outer + 8} bytes, the file holds {len(data)}")
        raise DecodeError(f"it is cut: its data chunk claims {size} bytes, the file holds {held}")
    rest = data[end : outer + 8 if end <= outer + 8 else len(data)]
    is_padding = len(rest) < 8 + size % 2 and not rest.strip(b"\0\r\n ")
    is_chunk = _is_chunk(data, end + size % 2) or _is_chunk(data, end) or _is_cut_chunk(data, end, outer)
    if not is_padding and not is_chunk:
        raise DecodeError(f"its data chunk claims {size} bytes and is followed by {len(rest)} that are no chunk")
    if size % align == 1 and data[end - 1 : end] == b"\0" and (align > 2 or end == len(data)):
        size -= 1  # the size includes a pad byte, which is no half of a sample
    return fmt.stream_info(data, start, size)


def _is_chunk(data: bytes, start: int) -> bool:
    """Whether a chunk may begin here: a name, and a size inside the file unless the name is well known."""
    name = data[start : start + 4]
    if len(data) < start + 8 or not _is_name(name):
        return False
    sizes = {int.from_bytes(data[start + 4 : start + 8], order) + start + 8 for order in ("little", "big")}
    return name in _METADATA or min(sizes) <= len(data)


def _is_cut_chunk(data: bytes, start: int, outer: int) -> bool:
    """Whether a truncated chunk begins here, which passes the end of the file and ends with the outer chunk."""
    end = int.from_bytes(data[start + 4 : start + 8], "big" if data[:4] == b"RIFX" else "little") + start + 8
    return _is_name(data[start : start + 4]) and outer + 8 in (end, end + end % 2) and end > len(data)


def _chunks(data: bytes, order: str) -> Iterator[tuple[bytes, int, int]]:
    """(name, start of its content, size) of each chunk; the pad byte of an odd one may be missing."""
    start = 12
    for _ in range(MAX_CHUNKS):
        if start + 8 > len(data):
            return
        name = data[start : start + 4]
        if not _is_name(name):
            raise DecodeError(f"the bytes at {start} are no chunk, so its sizes are wrong")
        (size,) = struct.unpack_from(order + "I", data, start + 4)
        start += 8
        yield name, start, size
        start += size
        name = data[start : start + 4]
        if (
            size % 2
            and name not in (b"data", b"fmt ")
            and (_is_name(data[start + 1 : start + 5]) or not _is_name(name))
        ):
            start += 1
    raise too_many_chunks()


def _is_name(name: bytes) -> bool:
    return len(name) == 4 and all(32 <= byte < 127 for byte in name)
