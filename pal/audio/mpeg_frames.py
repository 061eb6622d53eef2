"""MPEG audio frames, layers I to III: frame header, and the Info, Xing or VBRI tag of a file.

By ISO 11172-3 and 13818-3; the Info tag by LAME, as mpg123 reads it.
"""

from dataclasses import dataclass

LAYER_3 = 3
_LONGEST = 1 << 13
"""Most bytes of a frame of free bit rate."""
_KBPS = {
    (1, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (2, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
"""Bit rates by generation (2 is MPEG 2 and 2.5) and layer."""
_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
"""Sampling rates by version code: 3 is MPEG 1, 2 is MPEG 2, 0 is MPEG 2.5."""


@dataclass(frozen=True)
class Header:
    """MPEG audio frame header, four bytes."""

    generation: int
    layer: int
    rate: int
    channels: int
    bytes: int
    """Bytes of the whole frame; 0 for free bit rate, where only the next frame's offset tells."""
    padding: int
    """Padding bytes among them, which other frames of the same bit rate may lack."""
    protected: bool

    @property
    def samples(self) -> int:
        """Samples of the frame, of each channel."""
        return 384 if self.layer == 1 else 1152 if self.layer == 2 else 1152 // self.generation

    @property
    def stream(self) -> tuple[int, int, int]:
        """Fields that must be the same in all frames."""
        return self.layer, self.rate, self.channels

    @property
    def side(self) -> int:
        """Bytes of layer III's side information, which a Xing or Info tag follows."""
        return {(1, 2): 32, (1, 1): 17, (2, 2): 17, (2, 1): 9}[self.generation, self.channels]


@dataclass(frozen=True)
class Info:
    """Xing/Info/VBRI tag: the encoder's facts of the whole file, in its first frame; None for missing fields."""

    frames: int | None
    bytes: int | None
    delay: int | None = None
    """Samples that the encoder added before the sound."""
    padding: int | None = None
    """Samples that the encoder added after the sound."""


def header(data: bytes, offset: int = 0) -> Header | None:
    """The frame header at `offset`; None when there is none."""
    if offset + 4 > len(data) or data[offset] != 0xFF or data[offset + 1] & 0xE0 != 0xE0:
        return None
    second, third, fourth = data[offset + 1 : offset + 4]
    version, layer = second >> 3 & 3, 4 - (second >> 1 & 3)
    kbps_code, rate_code = third >> 4, third >> 2 & 3
    if version == 1 or layer == 4 or rate_code == 3 or kbps_code == 15:
        return None
    generation = 1 if version == 3 else 2
    rate = _RATES[version][rate_code]
    kbps, slot = _KBPS[generation, layer][kbps_code], 4 if layer == 1 else 1
    padding = (third >> 1 & 1) * slot
    spread = 12_000 if layer == 1 else 72_000 if layer == 3 and generation == 2 else 144_000
    size = spread * kbps // rate * slot + padding if kbps else 0
    return Header(generation, layer, rate, 1 if fourth >> 6 == 3 else 2, size, padding, not second & 1)


def free_size(data: bytes, offset: int) -> int:
    """Frame size in bytes, without padding, of a stream of free bit rate at `offset`; 0 if it cannot be found.

    All frames have the same size, so the next header is where a third follows at the same distance.
    """
    first = header(data, offset)
    assert first is not None
    at = offset + 4
    while (at := data.find(data[offset : offset + 2], at, offset + _LONGEST)) > 0:
        second = header(data, at)
        if second is not None and not second.bytes and second.stream == first.stream:
            size = at - offset - first.padding
            third = header(data, at + size + second.padding)
            if third is not None and not third.bytes and third.stream == first.stream:
                return size
        at += 1
    return 0


def main_data_end(frame: bytes, parsed: Header) -> int | None:
    """End offset of the main data in a layer III frame; None if its side information is truncated.

    Main data may begin in earlier frames (bit reservoir); bytes behind it are stuffing.
    """
    start = 4 + 2 * parsed.protected
    side = frame[start : start + parsed.side]
    if len(side) < parsed.side:
        return None
    bits = int.from_bytes(side, "big")
    width = 8 * parsed.side

    def field(at: int, size: int) -> int:
        return bits >> width - at - size & (1 << size) - 1

    if parsed.generation == 1:
        begin, at, granules, step = field(0, 9), 9 + (5 if parsed.channels == 1 else 3) + 4 * parsed.channels, 2, 59
    else:
        begin, at, granules, step = field(0, 8), 8 + parsed.channels, 1, 63
    length = sum(field(at + i * step, 12) for i in range(granules * parsed.channels))
    return start + parsed.side - begin + (length + 7) // 8


def info(frame: bytes, parsed: Header) -> Info | None:
    """Parse a Xing, Info or VBRI frame; None for other frames."""
    if parsed.layer != LAYER_3:
        return None
    if frame[36:40] == b"VBRI" and len(frame) >= 54:
        return Info(int.from_bytes(frame[50:54], "big") or None, int.from_bytes(frame[46:50], "big"))
    at = 4 + parsed.side
    if parsed.protected and frame[at + 2 : at + 6] in (b"Xing", b"Info"):
        at += 2
    if frame[at : at + 4] not in (b"Xing", b"Info"):
        return None
    flags = int.from_bytes(frame[at + 4 : at + 8], "big")
    at += 8
    fields: list[int | None] = []
    for bit, size in ((1, 4), (2, 4), (4, 100), (8, 4)):
        fields.append(int.from_bytes(frame[at : at + 4], "big") if flags & bit else None)
        at += size if flags & bit else 0
    frames, size_given = fields[0] or None, fields[1]  # a count of zero was never filled in
    if frame[at : at + 4] not in (b"LAME", b"Lavf", b"Lavc") or len(frame) < at + 36:
        return Info(frames, size_given)
    check = int.from_bytes(frame[at + 34 : at + 36], "big")
    if frame[at : at + 4] == b"LAME" and check not in (0, _crc16(frame[: at + 34])):
        return Info(frames, size_given)  # the file has changed since: delays of the tag would cut sound
    packed = int.from_bytes(frame[at + 21 : at + 24], "big")
    return Info(frames, size_given, packed >> 12, packed & 0xFFF)


def info_frame(like: bytes, count: int) -> bytes:
    """Info frame with the number of frames, for a layer III stream with frame headers such as `like`."""
    # no checksum, the highest bit rate (so that the tag fits), no padding
    own = bytes([like[0], like[1] | 1, 0xE0 | like[2] & 0x0D, like[3]])
    parsed = header(own)
    assert parsed is not None
    return (own + bytes(parsed.side) + b"Info" + bytes([0, 0, 0, 1]) + count.to_bytes(4, "big")).ljust(
        parsed.bytes, b"\0"
    )


def silent_frame(like: bytes) -> bytes:
    """Silent frame at the lowest bit rate, for a layer I or II stream with frame headers such as `like`."""
    own = bytes([like[0], like[1] | 1, 0x10 | like[2] & 0x0D, like[3]])
    parsed = header(own)
    assert parsed is not None
    return own.ljust(parsed.bytes, b"\0")


def _crc16(data: bytes) -> int:
    """CRC-16 of LAME's tag: reflected bits, start 0."""
    value = 0
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0xA001 if value & 1 else 0)
    return value
