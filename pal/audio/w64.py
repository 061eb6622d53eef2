"""Chunks of Sony's Wave64 files (`.w64`): WAV with 128-bit names and 64-bit sizes."""

import struct

from pal.audio import wave_format
from pal.audio.samples import MAX_CHUNKS, between_headers, is_placeholder, no_length, too_many_chunks
from pal.audio.stream_info import DecodeError, StreamInfo
from pal.audio.wave_format import TAIL_64, WAVE_64

_HEAD = 24
"""Bytes of a chunk's name and size, which the size includes."""


def read_header(data: bytes) -> StreamInfo:
    """Read the format chunk and locate the data; chunks begin at multiples of eight bytes.

    Raises:
        DecodeError: truncated, without format or data, or an unsupported codec.
    """
    if data[24:40] != WAVE_64:
        raise DecodeError("its Wave64 header is cut or damaged")
    start = 40
    fmt: wave_format.Format | None = None
    for _ in range(MAX_CHUNKS):
        if start + _HEAD > len(data):
            break
        name, (size,) = data[start : start + 16], struct.unpack_from("<Q", data, start + 16)
        start += _HEAD
        held = len(data) - start
        if name == b"data" + TAIL_64:
            if fmt is None:
                raise DecodeError("it has no format chunk before its data")
            return _sound(data, start, size, held, fmt)
        if size < _HEAD or size - _HEAD > held:
            break
        size -= _HEAD
        if name == b"fmt " + TAIL_64:
            fmt = wave_format.read(data[start : start + size], "<")
        start += -(-size // 8) * 8
    else:
        raise too_many_chunks()
    raise DecodeError("it is cut or damaged: it has no data chunk")


def _sound(data: bytes, start: int, size: int, held: int, fmt: wave_format.Format) -> StreamInfo:
    is_empty = size <= _HEAD and held > 0
    if is_empty or any(is_placeholder(claim, held) for claim in (size, size - _HEAD)):
        start, end = between_headers(data, start)
        return fmt.stream_info(data, start, end - start, no_length(0 if is_empty else size, held))
    if size - _HEAD > held:
        raise DecodeError(f"it is cut: its data chunk claims {size - _HEAD} bytes, the file holds {held}")
    size = max(0, size - _HEAD)
    if fmt.sample_format is not None and size % 8 == 0:
        size -= size % fmt.align if size % fmt.align < 8 else 0  # FFmpeg counts the padding
    return fmt.stream_info(data, start, size)
