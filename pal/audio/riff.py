"""The header of WAV files. libsndfile shortens a cut or forged WAV without a word; this does not."""

import struct
from collections.abc import Iterator

from pal.audio.declared import Declared, DecodeError

_PCM, _FLOAT, _ALAW, _MULAW, _EXTENSIBLE = 1, 3, 6, 7, 0xFFFE
_BLOCKS = (0x02, 0x11, 0x31)
"""Microsoft's and IMA's ADPCM and GSM 6.10, which code many samples in one block."""
_BITS = {_PCM: (8, 16, 24, 32), _FLOAT: (32, 64), _ALAW: (8,), _MULAW: (8,)}
_UNKNOWN_SIZES = (0xFFFFFFFF, 0x7FFFFFFF)
"""What programs write that do not know the length beforehand."""
_SLACK = 8
"""Some programs count the outer chunk's own eight bytes in its size."""


def declared(data: bytes) -> Declared:
    """Read the chunks of a RIFF, RIFX, RF64 or BW64 file.

    The data chunk must lie inside the file, the chunks must follow one another without a gap, and
    the fields of the format chunk, which repeat each other, must agree. A WAV made for a stream
    (sizes of all ones) is refused: it says nothing of its length, so a cut could not be noticed.

    Raises:
        DecodeError: for anything else.
    """
    order = ">" if data[:4] == b"RIFX" else "<"
    is_64 = data[:4] in (b"RF64", b"BW64")
    (riff_size,) = struct.unpack_from(order + "I", data, 4)
    end = len(data)
    if not is_64:
        if riff_size in _UNKNOWN_SIZES:
            raise _streamed()
        if riff_size > len(data) - 8 + _SLACK:
            raise DecodeError(f"it is cut: its header claims {riff_size + 8} bytes, the file holds {len(data)}")
        end = min(end, 8 + riff_size)

    big_size = None
    fmt: tuple[int, int, int, int, int] | None = None
    for name, start, size in _chunks(data, end, order):
        if name == b"ds64":
            if size < 24:
                raise DecodeError("its ds64 chunk is too short")
            big_riff, big_size = struct.unpack_from("<QQ", data, start)
            if big_riff > len(data) - 8 + _SLACK:
                raise DecodeError(f"it is cut: its header claims {big_riff + 8} bytes, the file holds {len(data)}")
            end = min(end, 8 + big_riff)
        elif name == b"fmt ":
            fmt = _format(data[start : start + size], order)
        elif name == b"data":
            if fmt is None:
                raise DecodeError("it has no format chunk before its data")
            if size == 0xFFFFFFFF and big_size is not None:
                size = big_size
            elif size in _UNKNOWN_SIZES:
                raise _streamed()
            return _data(data, start, size, end, fmt, order)
    raise DecodeError("it has no data chunk")


def _data(data: bytes, start: int, size: int, end: int, fmt: tuple[int, int, int, int, int], order: str) -> Declared:
    """Check the data chunk at `start` and what follows it."""
    tag, channels, rate, align, _ = fmt
    if start + size > len(data):
        raise DecodeError(f"its data chunk claims {size} bytes, the file holds {len(data) - start}")
    if start + size > end:
        raise DecodeError(f"its data chunk claims {size} bytes, more than the chunk around it")
    if size % align:
        raise DecodeError(f"its data chunk of {size} bytes is no whole number of {align}-byte samples")
    for _ in _chunks(data, end, order, start + size + size % 2):
        pass  # a data chunk that claims too little is followed by sound, not by chunks
    frames = size // align if tag in _BITS else None
    return Declared(frames=frames, rate=rate, channels=channels)


def _chunks(data: bytes, end: int, order: str, start: int = 12) -> Iterator[tuple[bytes, int, int]]:
    """(name, start of its content, size) of each chunk; content may claim to pass the end only in `data`."""
    while end - start > 1:
        if end - start < 8:
            raise DecodeError(f"{end - start} stray bytes stand where a chunk should begin")
        name = data[start : start + 4]
        (size,) = struct.unpack_from(order + "I", data, start + 4)
        start += 8
        if not all(32 <= byte < 127 for byte in name):
            raise DecodeError(f"the bytes at {start - 8} are no chunk, so its sizes are wrong")
        if name != b"data" and start + size > end:
            raise DecodeError(f"its chunk '{name.decode('latin-1')}' claims {size} bytes, the file holds {end - start}")
        yield name, start, size
        start += size + size % 2


def _format(fmt: bytes, order: str) -> tuple[int, int, int, int, int]:
    """(tag, channels, rate, bytes of one sample of all channels, bits of one)."""
    if len(fmt) < 16:
        raise DecodeError("its format chunk is too short")
    tag, channels, rate, byte_rate, align, bits = struct.unpack_from(order + "HHIIHH", fmt)
    if tag == _EXTENSIBLE:
        if len(fmt) < 40:
            raise DecodeError("its extensible format chunk is too short")
        (tag,) = struct.unpack_from(order + "H", fmt, 24)
    if tag in _BLOCKS:
        samples = struct.unpack_from(order + "H", fmt, 18)[0] if len(fmt) >= 20 else 0
        if not align or not samples or abs(byte_rate - rate * align / samples) > 1:
            raise DecodeError(f"its format chunk contradicts itself: {rate} Hz are not {byte_rate} bytes a second")
        return tag, channels, rate, align, bits
    if tag not in _BITS:
        raise DecodeError(
            f"its samples are in a codec that is not known (format {tag})", "convert it: ffmpeg -i IN OUT.wav"
        )
    if bits not in _BITS[tag]:
        raise DecodeError(f"its samples of {bits} bits are of no known kind (format {tag})")
    if align != channels * bits // 8 or byte_rate != rate * align:
        raise DecodeError(
            f"its format chunk contradicts itself: {channels} channels of {bits} bits at {rate} Hz"
            f" are not {align} bytes a sample and {byte_rate} a second"
        )
    return tag, channels, rate, align, bits


def _streamed() -> DecodeError:
    return DecodeError(
        "its header gives no length (a WAV written to a stream), so a cut could not be noticed",
        "write it to a file instead: ffmpeg -i IN OUT.wav",
    )
