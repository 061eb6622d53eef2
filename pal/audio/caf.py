"""The chunks of Apple's Core Audio files (`.caf`)."""

import struct

from pal.audio.samples import (
    MAX_CHUNKS,
    SampleFormat,
    between_headers,
    cut,
    is_placeholder,
    no_length,
    pcm,
    too_many_chunks,
)
from pal.audio.stream_info import CONVERT, DecodeError, StreamInfo

_FLOAT, _LITTLE = 1, 2
_LAWS = {b"ulaw": "ULAW", b"alaw": "ALAW"}
_VARINT = 5
"""Most bytes of a number in the packet table, seven bits in each: no packet needs more than 32 bits."""
_UNKNOWN = (1 << 64) - 1
"""The size -1, allowed in the last chunk while it is being written."""


def read_header(data: bytes) -> StreamInfo:
    """Read the description and the packet table, and locate the data.

    By Apple's Core Audio Format specification 1.0: sizes are signed 64-bit numbers, the data begin with a four-byte
    count of edits. A fractional rate is rounded to the nearest, as libsndfile does.

    Raises:
        DecodeError: truncated, or an unsupported codec.
    """
    if len(data) < 8 or data[4:6] != b"\0\1":
        raise DecodeError("it is a CAF file of an unknown version", CONVERT)
    chunks: dict[bytes, tuple[int, int]] = {}
    start = 8
    for _ in range(MAX_CHUNKS):
        if start + 12 > len(data):
            break
        name = data[start : start + 4]
        (size,) = struct.unpack_from(">Q", data, start + 4)
        start += 12
        chunks.setdefault(name, (start, size))
        if name == b"data" and is_placeholder(size, len(data) - start):
            break  # to the end of the file
        start += size
    else:
        if b"data" not in chunks:
            raise too_many_chunks()
    if b"desc" not in chunks or b"data" not in chunks:
        raise DecodeError("it is cut or damaged: it has no description of its sound, or no sound")
    at, size = chunks[b"desc"]
    if size < 32 or at + 32 > len(data):
        raise DecodeError("it is cut in its description")
    rate, codec, flags, packet_bytes, packet_frames, channels, bits = struct.unpack_from(">d4sIIIII", data, at)
    if not 1 <= rate < 1 << 32:  # or no number
        raise DecodeError(f"its rate of {rate:g} Hz is not a sampling rate", CONVERT)
    rate = int(rate + 0.5)
    start, size = chunks[b"data"]
    held = len(data) - start
    doubt = None
    if size == 4 and data[start + 4 : start + 20] == data[:16]:
        doubt = no_length(0, held)
        start, end = between_headers(data, start + 4)
        start -= 4  # the count of edits ends the header
        size = end - start
    elif is_placeholder(size, held):
        size, doubt = held, no_length(size - (size == _UNKNOWN) * (1 << 64), held)
    elif size > held:
        raise cut(size, held)
    if codec == b"alac":
        if doubt is not None or b"pakt" not in chunks:
            raise DecodeError("its packet table is missing, without which ALAC cannot be read")
        return _alac(data, chunks, rate, channels)
    if codec == b"lpcm":
        subtype = {32: "FLOAT", 64: "DOUBLE"}.get(bits, "") if flags & _FLOAT else pcm(bits)
    elif codec in _LAWS:
        subtype = _LAWS[codec]
    else:
        shown = "".join(chr(byte) if 32 <= byte < 127 else "?" for byte in codec).strip()
        raise DecodeError(f"it is a CAF file whose codec is not supported ({shown})", CONVERT)
    sample_format = SampleFormat(rate, channels, subtype, "LITTLE" if flags & _LITTLE else "BIG")
    if not subtype or packet_frames != 1 or packet_bytes != sample_format.align:
        raise DecodeError(
            f"its description contradicts itself: {channels} channels of {bits} bits, {packet_bytes} bytes a sample"
        )
    return sample_format.stream_info(start + 4, max(0, size - 4), doubt)


def _alac(data: bytes, chunks: dict[bytes, tuple[int, int]], rate: int, channels: int) -> StreamInfo:
    """ALAC packets, with the number of samples from the packet table.

    libsndfile needs the bit depth in the flags, where Apple writes it and FFmpeg does not; it is also in the decoder's
    configuration ("kuki"), in a newer and an older layout.
    """
    start, size = chunks[b"pakt"]
    if size < 24 or start + size > len(data):
        raise DecodeError("it is cut in its packet table")
    packets, frames = struct.unpack_from(">qq", data, start)
    (per_packet,) = struct.unpack_from(">I", data, chunks[b"desc"][0] + 20)
    if frames == packets * per_packet > 0:  # FFmpeg omits the padding of the last packet, whose header has it
        frames += (
            _last_packet(data, data[start + 24 : start + size], packets, chunks[b"data"][0] + 4, per_packet)
            - per_packet
        )
    at, size = chunks.get(b"kuki", (0, 0))
    config = data[at : at + size]
    depth = config[24 + 5 : 24 + 6] if config[4:8] == b"frma" else config[5:6]
    flags = {b"\x10": 1, b"\x14": 2, b"\x18": 3, b"\x20": 4}.get(depth)
    if flags is None:
        raise DecodeError("its ALAC sound has no known configuration", CONVERT)
    if flags == 4:  # libsndfile decodes uncompressed packets of this depth to other samples
        return StreamInfo(frames, rate, channels, bits=32, av_format="caf")
    place = chunks[b"desc"][0] + 12
    return StreamInfo(frames, rate, channels, payload=data[:place] + struct.pack(">I", flags) + data[place + 4 :])


def _last_packet(data: bytes, table: bytes, packets: int, start: int, whole: int) -> int:
    """Samples in the last packet: if a bit of its header marks it as partial, their number follows."""
    size, length = 0, 0
    for byte in table:
        if packets <= 1:
            break
        size, length = size << 7 | byte & 0x7F, length + 1
        if length > _VARINT:
            raise DecodeError(f"its packet table has a number of more than {_VARINT} bytes")
        if byte < 0x80:
            start, packets, size, length = start + size, packets - 1, 0, 0
    header = int.from_bytes(data[start : start + 7].ljust(7, b"\0"), "big")
    return header >> 1 & 0xFFFFFFFF if header >> 36 & 1 else whole
