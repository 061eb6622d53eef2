"""The frames of MP3 files. A decoder skips what it cannot read; this counts what must be there."""

from dataclasses import dataclass

from pal.audio.declared import Declared, DecodeError

_KBPS = {
    1: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
"""By version code: 3 is MPEG 1, 2 is MPEG 2, 0 is MPEG 2.5."""
_DECODER_DELAY = 529
"""Samples by which every MP3 decoder lags; mpg123 drops them where it knows the number of frames."""
_TAGS = (b"TAG", b"APETAGEX", b"LYRICSBEGIN", b"ID3")


@dataclass(frozen=True)
class _Header:
    rate: int
    channels: int
    samples: int
    """Of one frame, a channel."""
    bytes: int
    protected: bool

    @property
    def side(self) -> int:
        """Bytes of side information, after which a Xing or Info mark stands."""
        return {(1152, 2): 32, (1152, 1): 17, (576, 2): 17, (576, 1): 9}[self.samples, self.channels]

    @property
    def stream(self) -> tuple[int, int]:
        """What may not change from frame to frame."""
        return self.rate, self.channels


@dataclass(frozen=True)
class _Info:
    """What an encoder says of the whole file in its first frame; None where it does not."""

    frames: int | None
    bytes: int | None
    delay: int | None = None
    """Samples the encoder put before the sound."""
    padding: int | None = None
    """Samples it put after."""


def declared(data: bytes) -> Declared:
    """Walk the frames from the first to the last.

    They must follow one another without a gap, keep one rate and number of channels, and the last
    must be whole. Where the first is a Xing, Info or VBRI frame, their number must be the one it
    gives. A file without such a frame that was cut exactly between two frames cannot be told from
    a whole one, and a changed byte inside a frame changes the sound but not the length.

    Raises:
        DecodeError: for anything else.
    """
    start = id3_size(data)
    while start < len(data) and data[start] == 0:
        start += 1  # some taggers leave padding after the tag
    first = _header(data, start)
    if first is None:
        raise DecodeError(f"no MP3 frame stands at byte {start}")
    count = 0
    end = start
    while (header := _header(data, end)) is not None:
        if header.stream != first.stream:
            raise DecodeError(f"its rate or number of channels changes at byte {end}")
        if end + header.bytes > len(data):
            raise DecodeError(f"it is cut: its last frame needs {end + header.bytes - len(data)} more bytes")
        end += header.bytes
        count += 1
    rest = data[end : end + (1 << 16)]
    if rest.strip(b"\0") and not rest.startswith(_TAGS):
        raise DecodeError(f"it is damaged: no MP3 frame stands at byte {end} of {len(data)}")

    info = _info(data[start : start + first.bytes], first)
    if info is not None:
        count -= 1  # the frame that holds the count has no sound
        # some programs count that frame too; then the bytes must agree
        counts_itself = info.frames == count + 1 and info.bytes == end - start
        if info.frames not in (None, count) and not counts_itself:
            raise DecodeError(f"it is cut or damaged: it declares {info.frames} frames and holds {count}")
        if info.frames == count and info.delay is not None and info.padding is not None:
            trimmed = info.delay + _DECODER_DELAY + max(0, info.padding - _DECODER_DELAY)
            return Declared(count * first.samples - trimmed, first.rate, first.channels, payload=data[start:end])
        start += first.bytes
    # without a count mpg123 guesses the length from the size: tell it
    payload = _info_frame(data[start : start + 4], first, count) + data[start:end]
    return Declared(count * first.samples - _DECODER_DELAY, first.rate, first.channels, payload=payload)


def id3_size(data: bytes) -> int:
    """Bytes of the ID3v2 tag at the start; 0 when there is none."""
    if data[:3] != b"ID3" or len(data) < 10:
        return 0
    size = 0
    for byte in data[6:10]:
        size = size << 7 | byte & 0x7F
    return 10 + size + (10 if data[5] & 0x10 else 0)


def _header(data: bytes, offset: int) -> _Header | None:
    """The frame header at `offset`; None when there is none."""
    if offset + 4 > len(data) or data[offset] != 0xFF or data[offset + 1] & 0xE0 != 0xE0:
        return None
    second, third, fourth = data[offset + 1 : offset + 4]
    version, layer = second >> 3 & 3, second >> 1 & 3
    kbps_code, rate_code = third >> 4, third >> 2 & 3
    if version == 1 or layer == 0 or rate_code == 3 or kbps_code == 15:
        return None
    if layer != 1:
        raise DecodeError("it is MPEG audio of layer I or II", "convert it: ffmpeg -i IN OUT.wav")
    if kbps_code == 0:
        raise DecodeError("it is an MP3 of free bit rate", "convert it: ffmpeg -i IN OUT.wav")
    generation = 1 if version == 3 else 2
    rate = _RATES[version][rate_code]
    samples = 1152 // generation
    size = samples // 8 * 1000 * _KBPS[generation][kbps_code] // rate + (third >> 1 & 1)
    return _Header(rate, 1 if fourth >> 6 == 3 else 2, samples, size, not second & 1)


def _info(frame: bytes, header: _Header) -> _Info | None:
    """What a Xing, Info or VBRI frame says; None when it is another."""
    if frame[36:40] == b"VBRI":
        return _Info(int.from_bytes(frame[50:54], "big"), int.from_bytes(frame[46:50], "big"))
    at = 4 + header.side
    if header.protected and frame[at + 2 : at + 6] in (b"Xing", b"Info"):
        at += 2
    if frame[at : at + 4] not in (b"Xing", b"Info"):
        return None
    flags = int.from_bytes(frame[at + 4 : at + 8], "big")
    at += 8
    fields: list[int | None] = []
    for bit, size in ((1, 4), (2, 4), (4, 100), (8, 4)):
        fields.append(int.from_bytes(frame[at : at + 4], "big") if flags & bit else None)
        at += size if flags & bit else 0
    if frame[at : at + 4] not in (b"LAME", b"Lavf", b"Lavc"):
        return _Info(fields[0], fields[1])
    check = int.from_bytes(frame[at + 34 : at + 36], "big")
    if frame[at : at + 4] == b"LAME" and check not in (0, _crc16(frame[: at + 34])):
        raise DecodeError("it is damaged: its first frame, which gives its length, has a wrong checksum")
    packed = int.from_bytes(frame[at + 21 : at + 24], "big")
    return _Info(fields[0], fields[1], packed >> 12, packed & 0xFFF)


def _info_frame(header: bytes, parsed: _Header, count: int) -> bytes:
    """An Info frame that gives the number of frames, for a stream whose frames begin with `header`."""
    # no checksum, the highest bit rate (so that it all fits), no padding
    own = bytes([header[0], header[1] | 1, 0xE0 | header[2] & 0x0D, header[3]])
    size = _header(own, 0)
    assert size is not None
    return (own + bytes(parsed.side) + b"Info" + bytes([0, 0, 0, 1]) + count.to_bytes(4, "big")).ljust(
        size.bytes, b"\0"
    )


def _crc16(data: bytes) -> int:
    """CRC-16 with the bits reversed, start 0: what LAME puts behind its tag."""
    value = 0
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0xA001 if value & 1 else 0)
    return value
