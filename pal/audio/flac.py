"""Header of FLAC files. Frames have checksums that the decoder verifies; the header has none."""

from pal.audio import sndfile
from pal.audio.stream_info import DecodeError, StreamInfo

_RATES = {
    1: 88200,
    2: 176400,
    3: 192000,
    4: 8000,
    5: 16000,
    6: 22050,
    7: 24000,
    8: 32000,
    9: 44100,
    10: 48000,
    11: 96000,
}
_BITS = {1: 8, 2: 12, 4: 16, 5: 20, 6: 24, 7: 32}
_KNOWN = (8, 16, 24)
"""Bit depths that libsndfile accepts in STREAMINFO."""
_TRIES = 1 << 12
"""Most candidates for the header of the last frame before the search ends."""


def read_header(data: bytes) -> StreamInfo:
    """Read STREAMINFO and compare it with the first frame, which repeats rate, channels and bits.

    By RFC 9639, sections 8.2 and 9.1. A streamed file declares no length, which sets `doubt` unless it has the MD5 of
    its samples; frames behind the declared length set `doubt`, too. Bytes behind the last whole frame are left out,
    since libFLAC takes them for a broken frame.

    Raises:
        DecodeError: truncated in the metadata, or a header that contradicts the first frame.
    """
    if len(data) < 42 or data[4] & 0x7F != 0:
        raise DecodeError("its header is cut or damaged")
    packed = int.from_bytes(data[18:26], "big")
    rate, channels = packed >> 44, (packed >> 41 & 7) + 1
    bits, frames = (packed >> 36 & 31) + 1, packed & (1 << 36) - 1
    md5 = data[26:42] if any(data[26:42]) else None

    start = _audio_start(data)
    header = data[start : start + 16].ljust(16, b"\0")  # a frame of silence is shorter
    if header[0] != 0xFF or header[1] & 0xFE != 0xF8:
        raise DecodeError("no sound follows its header")
    if _frame_rate(header) not in (None, rate):
        raise DecodeError(f"its header says {rate} Hz, its first frame {_frame_rate(header)} Hz")
    assignment = header[3] >> 4
    if (assignment + 1 if assignment < 8 else 2) != channels:
        raise DecodeError(f"its header says {channels} channels, its first frame does not")
    if _BITS.get(header[3] >> 1 & 7, bits) != bits:
        raise DecodeError(f"its header says {bits} bits, its first frame {_BITS[header[3] >> 1 & 7]}")
    doubt = None
    if frames == 0 and md5 is None:
        doubt = "its header gives no length (a FLAC written to a stream), so a cut could not be noticed"
    end = len(data) - (128 if data[-128:][:3] == b"TAG" else 0)
    head = bytearray(data[:26])
    last = _last_header(data, start, end)
    if last is not None and (ended := _frame_end(data, last, end)) is not None:
        end = ended
        held = _position(data, last, start) + _samples(data, last)
        if 0 < frames < held < 1 << 36 and md5 is None:
            doubt = f"it declares {frames} samples and its frames hold {held}"
            frames = held
            head[18:26] = (packed >> 36 << 36 | held).to_bytes(8, "big")
    if bits not in _KNOWN and bits in _BITS.values():
        # libsndfile refuses such a header, but decodes by the bit depth of each frame
        head[20] |= 1
        head[21] = 0x70 | head[21] & 0x0F
    payload = None if head == data[:26] else bytes(head) + data[26:end]
    return StreamInfo(
        frames or None,
        rate,
        channels,
        md5,
        bits,
        payload=payload,
        span=None if end == len(data) else (0, end),
        av_format=None if bits in _KNOWN or bits in _BITS.values() else "flac",
        doubt=doubt,
    )


def whole_frames(data: bytes) -> bytes:
    """The file without an incomplete last frame, detected by its checksum."""
    last = _last_header(data, _audio_start(data), len(data))
    if last is None:
        return data
    end = _frame_end(data, last, len(data))
    return data[:last] if end is None else data[:end]


def _last_header(data: bytes, start: int, end: int) -> int | None:
    """Offset of the last frame, by the checksum of its header; None if none is found."""
    sync = data[start : start + 2]
    for _ in range(_TRIES):
        end = data.rfind(sync, start, end)
        if end < 0:
            return None
        head = data[end : end + 16]
        if len(head) > 5 and head[2] >> 4 and head[4] < 0xFF and _is_header(head):
            return end
        end += 1
    return None


def _frame_end(data: bytes, at: int, end: int) -> int | None:
    """End offset of the frame at `at`, by its checksum; None if it is incomplete.

    The checksum may match by chance after any byte, and then stays so over zeros. So at any offset but the end of the
    file, libFLAC must also decode the number of samples in the frame's header.
    """
    channels, bits = (data[20] >> 1 & 7) + 1, ((data[20] & 1) << 4 | data[21] >> 4) + 1
    longest = 64 + channels * (_samples(data, at) * (bits + 1) // 8 + 16)
    value, run, found = 0, 0, []
    for place, byte in enumerate(data[at : min(end, at + longest)], at + 1):
        value = (value << 8 & 0xFFFF) ^ _CRC16[value >> 8 ^ byte]
        run = 0 if value else run + 1
        if 1 <= run <= 3:  # if a frame's own checksum is 0, its end is the third match
            found.append(place)
    if run == 1 and found[-1] == end:
        return end
    samples, alone = _samples(data, at), StreamInfo(None)
    info = b"fLaC\x80" + data[5:21] + bytes([data[21] & 0xF0]) + bytes(20)
    if bits not in _KNOWN and bits in _BITS.values():
        info = info[:20] + bytes([info[20] | 1, 0x70]) + bytes(20)
    for place in found:
        try:
            with sndfile.opened(info + data[at:place], alone) as file:
                if sum(map(len, sndfile.blocks(file, alone, samples))) == samples:
                    return place
        except DecodeError:
            continue
    return None


def _samples(data: bytes, at: int) -> int:
    """Samples of the frame at `at`, by its header."""
    code, number = data[at + 2] >> 4, at + _number_end(data[at : at + 16])
    if code in (6, 7):
        return int.from_bytes(data[number : number + code - 5], "big") + 1
    return 192 if code == 1 else 576 << max(0, code - 2) if code < 6 else 256 << code - 8


def _position(data: bytes, at: int, start: int) -> int:
    """Samples before the frame at `at`: its sample number, or its frame number times the block size."""
    head = data[at : at + 16]
    size = _number_end(head) - 4
    number = head[4] if size == 1 else head[4] & (1 << 7 - size) - 1
    for byte in head[5 : 4 + size]:
        number = number << 6 | byte & 0x3F
    return number if data[at + 1] & 1 else number * _samples(data, start)


def _audio_start(data: bytes) -> int:
    """Offset of the first frame, after all metadata blocks."""
    start, last = 4, False
    while not last:
        if start + 4 > len(data):
            raise DecodeError("it is cut in its metadata")
        last = bool(data[start] & 0x80)
        start += 4 + int.from_bytes(data[start + 1 : start + 4], "big")
    return start


def _number_end(header: bytes) -> int:
    """End offset of the frame or sample number, which is coded like UTF-8."""
    first = header[4]
    return 5 if first < 0x80 else 12 - (first ^ 0xFF).bit_length()


def _is_header(header: bytes) -> bool:
    """Whether the bytes begin with a frame header, by its checksum."""
    size_code, rate_code = header[2] >> 4, header[2] & 15
    end = _number_end(header) + {6: 1, 7: 2}.get(size_code, 0) + {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
    return end < len(header) and _crc(header[: end + 1], 8, 7) == 0


def _crc(data: bytes, width: int, polynomial: int) -> int:
    """CRC of RFC 9639, sections 9.1.8 and 9.3; 0 for data that end in their own CRC."""
    value, mask = 0, (1 << width) - 1
    for byte in data:
        value ^= byte << width - 8
        for _ in range(8):
            value = (value << 1 ^ (polynomial if value >> width - 1 else 0)) & mask
    return value


_CRC16 = [_crc(bytes([byte]), 16, 0x8005) for byte in range(256)]
"""Table of the CRC-16 of each byte."""


def _frame_rate(header: bytes) -> int | None:
    """Rate in a frame header in Hz; None if it refers to STREAMINFO."""
    size_code, rate_code = header[2] >> 4, header[2] & 15
    if rate_code in _RATES or rate_code == 0:
        return _RATES.get(rate_code)
    start = _number_end(header) + {6: 1, 7: 2}.get(size_code, 0)
    if rate_code == 12:
        return header[start] * 1000
    value = int.from_bytes(header[start : start + 2], "big")
    return value if rate_code == 13 else value * 10
