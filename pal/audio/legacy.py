"""Old containers with a short header: AVR, Creative Voice, Amiga IFF, HTK and Psion.

The layouts are those that libsndfile reads and writes (its `avr.c`, `voc.c`, `svx.c`, `htk.c` and `wve.c`), and for
Creative Voice that of SoX's `voc.c`.
"""

import struct
from dataclasses import replace

from pal.audio.samples import SampleFormat, cut, pcm
from pal.audio.stream_info import CONVERT, DecodeError, StreamInfo

VOC = b"Creative Voice File\x1a"
WVE = b"ALawSoundFile**\0"


def is_htk(data: bytes) -> bool:
    """Whether the first twelve bytes, which have no magic number, can only be those of an HTK waveform."""
    return len(data) > 12 and data[8:12] == b"\0\2\0\0" and 12 + 2 * int.from_bytes(data[:4], "big") == len(data)


def htk(data: bytes) -> StreamInfo:
    """HTK's waveforms: a number of samples, and the time of one in units of 100 ns."""
    frames, period = struct.unpack_from(">II", data)
    if not period:
        raise DecodeError("its rate is not finite", CONVERT)
    return _sound(data, SampleFormat(10_000_000 // period, 1, "PCM_16"), 12, frames)


def avr(data: bytes) -> StreamInfo:
    """Audio Visual Research's files, with a header of 128 bytes."""
    if len(data) < 128:
        raise cut(128, len(data))
    stereo, bits, signed = struct.unpack_from(">HHH", data, 12)
    rate, frames = struct.unpack_from(">II", data, 22)
    if bits not in (8, 16) or (bits == 16 and not signed):
        raise DecodeError(f"its samples of {bits} bits are not supported", CONVERT)
    sample_format = SampleFormat(rate & 0xFFFFFF, 2 if stereo else 1, pcm(bits, unsigned_8=not signed))
    return _sound(data, sample_format, 128, frames)


def wve(data: bytes) -> StreamInfo:
    """Psion's A-law at 8 kHz, with a header of 32 bytes."""
    if len(data) < 32:
        raise cut(32, len(data))
    return _sound(data, SampleFormat(8_000, 1, "ALAW"), 32, int.from_bytes(data[18:22], "big"))


def svx(data: bytes) -> StreamInfo:
    """Amiga IFF, 8SVX and 16SV: one channel, one octave, not compressed."""
    sample_format: SampleFormat | None = None
    start = 12
    while start + 8 <= len(data):
        name, (size,) = data[start : start + 4], struct.unpack_from(">I", data, start + 4)
        start += 8
        if name == b"VHDR" and start + 20 <= len(data):
            rate, octaves, compression = struct.unpack_from(">HBB", data, start + 12)
            if octaves > 1 or compression:
                raise DecodeError(
                    "it is an Amiga IFF file of several octaves, or compressed, which is not supported", CONVERT
                )
            sample_format = SampleFormat(rate, 1, "PCM_16" if data[8:12] == b"16SV" else "PCM_S8")
        elif name == b"CHAN" and data[start : start + 4] == b"\0\0\0\6":
            raise DecodeError("it is an Amiga IFF file of two channels, which is not supported", CONVERT)
        elif name == b"BODY" and sample_format is not None:
            if start + size > len(data):
                raise cut(size, len(data) - start)
            return sample_format.stream_info(start, size)
        start += size + size % 2
    raise DecodeError("it is cut or damaged: it has no sound, or no header before it")


def voc(data: bytes) -> StreamInfo:
    """Creative Voice: one block of sound and its continuations; other blocks (silence, loops) are refused."""
    start = int.from_bytes(data[20:22], "little")
    sample_format: SampleFormat | None = None
    parts = []
    extended: tuple[int, int] | None = None
    while start < len(data) and data[start]:
        kind, size = data[start], int.from_bytes(data[start + 1 : start + 4], "little")
        start += 4
        if kind == 9 and len(data) - start - size in (8, 9):
            size += 8  # SoX counts only four of the twelve bytes before the samples
        block = data[start : start + size]
        if len(block) < size:
            raise cut(size, len(block))
        if kind == 8 and size == 4:
            extended = 65536 - int.from_bytes(block[:2], "little"), 1 + block[3]
        elif kind in (1, 9) and sample_format is None and size >= (2 if kind == 1 else 12):
            sample_format = _voc_kind(kind, block, extended)
            parts.append(block[2 if kind == 1 else 12 :])
        elif kind == 2 and sample_format is not None:
            parts.append(block)
        elif kind not in (4, 5):  # a marker, a text
            raise DecodeError("it is a Creative Voice file of several parts, which is not supported", CONVERT)
        start += size
    if sample_format is None:
        raise DecodeError("it is cut or damaged: it has no block of sound")
    sound = b"".join(parts)
    whole = sample_format.stream_info(0, len(sound))
    return replace(whole, span=None, payload=sound)


def _voc_kind(kind: int, block: bytes, extended: tuple[int, int] | None) -> SampleFormat:
    if kind == 9:
        rate, bits, channels, codec = struct.unpack_from("<IBBH", block)
        subtype = {(0, 8): "PCM_U8", (4, 16): "PCM_16", (6, 8): "ALAW", (7, 8): "ULAW"}.get((codec, bits))
    else:
        divisor, channels = extended or (256 * (256 - block[0]), 1)
        rate, codec = 256_000_000 // (divisor * channels), block[1]
        subtype = {0: "PCM_U8", 4: "PCM_16", 6: "ALAW", 7: "ULAW"}.get(codec)
    if subtype is None:
        raise DecodeError(f"it is a Creative Voice file whose codec is not supported (number {codec})", CONVERT)
    return SampleFormat(rate, channels, subtype, "LITTLE")


def _sound(data: bytes, sample_format: SampleFormat, start: int, frames: int) -> StreamInfo:
    if start + frames * sample_format.align > len(data):
        raise cut(frames * sample_format.align, len(data) - start)
    return sample_format.stream_info(start, frames * sample_format.align)
