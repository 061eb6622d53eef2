"""The header of FLAC files. Frames carry checksums that the decoder checks; the header carries none."""

from pal.audio.declared import Declared, DecodeError

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
"""Bits of a sample that libsndfile takes in STREAMINFO."""


def declared(data: bytes) -> Declared:
    """Read STREAMINFO and compare it with the first frame, which repeats rate, channels and bits.

    The layout is that of RFC 9639, sections 8.2 and 9.1. A file written to a stream declares no length; its end is in
    doubt unless it gives the MD5 of its samples.

    Raises:
        DecodeError: cut in the metadata, or a header that contradicts the first frame.
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
    payload = None
    if bits not in _KNOWN and bits in _BITS.values():
        # libsndfile refuses the header, and then decodes by the bits that each frame names
        payload = data[:20] + bytes([data[20] | 1, 0x70 | data[21] & 0x0F]) + data[22:end]
    return Declared(
        frames or None,
        rate,
        channels,
        md5,
        bits,
        payload=payload,
        span=None if end == len(data) else (0, end),  # ID3v1, which libFLAC takes for a broken frame
        av_format=None if payload is not None or bits in _KNOWN else "flac",
        doubt=doubt,
    )


def whole_frames(data: bytes) -> bytes:
    """The file without the frame that it ends in, where the checksum says that this is not whole."""
    start, at = _audio_start(data), len(data)
    while (at := data.rfind(b"\xff", start, at)) >= 0:
        head = data[at : at + 16]
        if head[1:2] in (b"\xf8", b"\xf9") and len(head) > 5 and _is_header(head):
            return data if _crc(data[at:], 16, 0x8005) == 0 else data[:at]
    return data


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
    """Where the frame or sample number ends, which is coded like UTF-8."""
    first = header[4]
    return 5 if first < 0x80 else 12 - (first ^ 0xFF).bit_length()


def _is_header(header: bytes) -> bool:
    """Whether the bytes begin with a frame header, by its checksum."""
    size_code, rate_code = header[2] >> 4, header[2] & 15
    end = _number_end(header) + {6: 1, 7: 2}.get(size_code, 0) + {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
    return end < len(header) and _crc(header[: end + 1], 8, 7) == 0


def _crc(data: bytes, width: int, polynomial: int) -> int:
    """CRC of RFC 9639, sections 9.1.8 and 9.3; 0 for data that end in their own."""
    value, mask = 0, (1 << width) - 1
    for byte in data:
        value ^= byte << width - 8
        for _ in range(8):
            value = (value << 1 ^ (polynomial if value >> width - 1 else 0)) & mask
    return value


def _frame_rate(header: bytes) -> int | None:
    """Hz that a frame header names; None where it refers to STREAMINFO."""
    size_code, rate_code = header[2] >> 4, header[2] & 15
    if rate_code in _RATES or rate_code == 0:
        return _RATES.get(rate_code)
    start = _number_end(header) + {6: 1, 7: 2}.get(size_code, 0)
    if rate_code == 12:
        return header[start] * 1000
    value = int.from_bytes(header[start : start + 2], "big")
    return value if rate_code == 13 else value * 10
