"""Format chunk of WAV and W64 files: codec, and layout of its samples or blocks."""

import struct
from dataclasses import dataclass, replace

from pal.audio import mpeg
from pal.audio.samples import SampleFormat, pcm
from pal.audio.stream_info import CONVERT, DecodeError, StreamInfo

TAIL_64 = b"\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a"
"""Bytes after the four letters of a chunk's name in Wave64, except for the outermost chunk."""
RIFF_64 = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00"
WAVE_64 = b"wave" + TAIL_64
_PCM, _FLOAT, _ALAW, _MULAW, _EXTENSIBLE = 1, 3, 6, 7, 0xFFFE
_MPEG = (0x50, 0x55)
"""Format tags of MPEG audio: layers I and II, and layer III."""
_GSM = 0x31
_BLOCKS = {0x02: 7, 0x11: 4, _GSM: 65}
"""Block codecs (Microsoft's and IMA's ADPCM, GSM 6.10) -> fewest bytes of a block for each channel."""
_UNSUPPORTED = {
    0x05: "IBM CVSD", 0x10: "OKI ADPCM", 0x14: "G.723", 0x20: "Yamaha ADPCM", 0x22: "TrueSpeech",
    0x28: "LPC10", 0x38: "NMS ADPCM", 0x40: "G.721", 0x42: "G.723.1",
    0x45: "G.726", 0x64: "G.726", 0x65: "G.722", 0x69: "Voxware", 0x92: "Dolby AC-3", 0xFF: "AAC", 0x130: "Sipro ACELP",
    0x160: "WMA 1", 0x161: "WMA 2", 0x162: "WMA Pro", 0x163: "WMA Lossless", 0x270: "ATRAC3", 0x1600: "AAC",
    0x1601: "AAC", 0x1602: "AAC", 0x1610: "AAC", 0x2000: "AC-3", 0x2001: "DTS", 0x566F: "Vorbis", 0x674F: "Vorbis",
    0x6750: "Vorbis", 0x6751: "Vorbis", 0x676F: "Vorbis", 0x6770: "Vorbis", 0x6771: "Vorbis", 0x704F: "Opus",
    0xA109: "Speex", 0xF1AC: "FLAC",
}  # fmt: skip
"""Names of unsupported codecs in WAV files."""
_USUAL = frozenset(
    unit * factor for unit in (8_000, 11_025) for factor in (1, 2, 4, 8, 16)
) | {12_000, 24_000, 48_000, 96_000, 192_000}  # fmt: skip
"""Common sampling rates in Hz."""


@dataclass(frozen=True)
class Format:
    """WAV format chunk."""

    tag: int
    channels: int
    rate: int
    align: int
    """Bytes of a block, or of one sample of all channels."""
    chunk: bytes
    """Bytes of the chunk in the file."""
    order: str
    """Byte order for struct, ">" or "<"."""
    sample_format: SampleFormat | None
    """Sample format; None for block codecs."""

    def stream_info(self, data: bytes, start: int, size: int, doubt: str | None = None) -> StreamInfo:
        """Stream info of `size` bytes of sound from `start`.

        Raises:
            DecodeError: not a whole number of samples, or a fault of MPEG audio inside.
        """
        if self.sample_format is not None:
            return self.sample_format.stream_info(start, size, doubt)
        sound = data[start : start + size]
        if self.tag in _MPEG:
            inside = mpeg.read_header(sound)
            parts = [replace(part, payload=_payload(part, sound), span=None) for part in (inside, *inside.rest)]
            return replace(parts[0], rest=tuple(parts[1:]), doubt=doubt or inside.doubt)
        if self.tag == _GSM:
            sound = sound[: len(sound) // self.align * self.align]  # SoX counts a pad byte
        # as Wave64: in WAV, libsndfile takes a pad byte for one more block of GSM
        head = WAVE_64 + _chunk_64(b"fmt ", self.chunk) + _chunk_64(b"data", sound)
        plain = RIFF_64 + struct.pack("<Q", 24 + len(head)) + head
        return StreamInfo(None, self.rate, self.channels, payload=plain, doubt=doubt)


def _chunk_64(name: bytes, content: bytes) -> bytes:
    return name + TAIL_64 + struct.pack("<Q", 24 + len(content)) + content + bytes(-len(content) % 8)


def _payload(part: StreamInfo, sound: bytes) -> bytes:
    """Payload to decode, as a slice of the sound instead of the file."""
    if part.payload is not None:
        return part.payload
    return sound if part.span is None else sound[slice(*part.span)]


def read(chunk: bytes, order: str) -> Format:
    """Parse the fields, which are redundant: one may be wrong if the others agree.

    Args:
        chunk: content of the chunk.
        order: byte order for struct, ">" or "<".

    Raises:
        DecodeError: too short, contradictory, or an unsupported codec.
    """
    if len(chunk) < 16:
        raise DecodeError("its format chunk is too short")
    tag, channels, rate, byte_rate, align, bits = struct.unpack_from(order + "HHIIHH", chunk)
    if tag == _EXTENSIBLE:
        if len(chunk) < 40:
            raise DecodeError("its extensible format chunk is too short")
        (tag,) = struct.unpack_from(order + "H", chunk, 24)
    if not channels:
        raise DecodeError("its 0 channels are not 1 to 8")
    if tag in _MPEG:
        return Format(tag, channels, rate, align, chunk, order, None)
    if tag in _BLOCKS and order == ">":
        raise DecodeError(f"it is a RIFX file whose codec is not supported (format {tag})", CONVERT)
    if tag in _BLOCKS:
        per_block = struct.unpack_from(order + "H", chunk, 18)[0] if len(chunk) >= 20 else 0
        _check_blocks(tag, channels, rate, byte_rate, align, per_block)
        return Format(tag, channels, rate, align, chunk, order, None)
    if tag == _FLOAT and bits in (32, 64):
        subtype = "FLOAT" if bits == 32 else "DOUBLE"
    elif tag in (_ALAW, _MULAW):
        subtype = "ALAW" if tag == _ALAW else "ULAW"
    elif tag == _PCM:
        subtype = pcm(bits, unsigned_8=True)
    elif tag == _FLOAT:
        raise DecodeError(f"its floating-point samples of {bits} bits are not supported")
    else:
        codec = f"{_UNSUPPORTED[tag]}, format {tag}" if tag in _UNSUPPORTED else f"format {tag}"
        raise DecodeError(f"it is a WAV file whose codec is not supported ({codec})", CONVERT)
    sample_format = SampleFormat(rate, channels, subtype, "BIG" if order == ">" else "LITTLE")
    _check(sample_format, bits, byte_rate, align)
    return Format(tag, channels, rate, sample_format.align, chunk, order, sample_format)


def _check(sample_format: SampleFormat, bits: int, byte_rate: int, align: int) -> None:
    """Refuse a contradictory header whose wrong field cannot be identified.

    The byte rate and the bytes of a sample follow from the other fields, and players ignore them. If both agree on
    other values, rather channels or bits are wrong; if the byte rate fits a common sampling rate and the rate is not a
    common one, the rate is wrong.
    """
    rate = sample_format.rate
    both_other = align != sample_format.align and byte_rate == rate * align and align > 0
    implied = byte_rate / sample_format.align
    rate_other = rate not in _USUAL and implied in _USUAL and align == sample_format.align
    if both_other or rate_other:
        raise DecodeError(
            f"its format chunk contradicts itself: {sample_format.channels} channels of {bits} bits at {rate} Hz"
            f" are not {align} bytes a sample and {byte_rate} a second"
        )


def _check_blocks(tag: int, channels: int, rate: int, byte_rate: int, align: int, per_block: int) -> None:
    """Refuse a contradictory header of a block codec; `per_block` is the samples of a block, 0 if not in the chunk."""
    if channels > (1 if tag == _GSM else 2):
        raise DecodeError(f"its {channels} channels are too many for its codec (format {tag})")
    if align < _BLOCKS[tag] * channels:
        raise DecodeError(f"its blocks of {align} bytes are too small for its codec (format {tag})")
    implied = byte_rate * per_block / align  # the byte rate is rounded
    if per_block and rate not in _USUAL and any(abs(usual - implied) <= per_block / align for usual in _USUAL):
        raise DecodeError(f"its format chunk contradicts itself: {rate} Hz are not {byte_rate} bytes a second")
