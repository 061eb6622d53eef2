"""Files as they are found in the world, made of well-formed ones by changing bytes."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
ID3 = b"ID3\x03\0\0\0\0\0\x14TIT2\0\0\0\x03\0\0\0ab" + bytes(7)
ID3V1 = b"TAG".ljust(128, b"x")
APE = b"APETAGEX" + struct.pack("<IIII", 2000, 32, 0, 0xA0000000) + bytes(8)
LIST = b"LIST" + struct.pack("<I", 4) + b"INFO"


def variations(folder: Path, paths: list[Path]) -> list[Path]:
    """Write the variations of some of these files beside them."""
    made = []
    for path in paths:
        for name, data in _of(path.name, path.read_bytes()):
            made.append(folder / f"wild_{name}_{path.name}")
            made[-1].write_bytes(data)
    return made


def _of(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    if name in ("soundfile_WAV_PCM_16_16000_file.wav", "soundfile_WAV_PCM_24_44100_file.wav"):
        yield from wav(data)
    elif name == "soundfile_WAV_PCM_U8_16000_file.wav":
        yield from odd_wav(data)
    elif name == "soundfile_AIFF_PCM_16_16000_file.aiff":
        yield from aiff(data)
    elif name == "soundfile_AU_PCM_16_16000_file.au":
        yield from au(data)
    elif name == "soundfile_CAF_PCM_16_16000_file.caf":
        place = data.index(b"data") + 4
        yield "size_-1", data[:place] + b"\xff" * 8 + data[place + 8 :]
    elif name in ("soundfile_MP3_MPEG_LAYER_III_16000_file.mp3", "lame_05_44100.mp3", "twolame_01_44100.mp2"):
        yield from mpeg(data)
    elif name in ("soundfile_OGG_VORBIS_16000_file.ogg", "soundfile_OGG_OPUS_16000_file.ogg", "flac_02_44100.oga"):
        yield from ogg(data)
    elif name == "soundfile_FLAC_PCM_16_16000_file.flac":
        yield "id3", ID3 + data
        yield "id3_behind", data + ID3V1
        yield "no_total", data[:21] + bytes([data[21] & 0xF0]) + bytes(4) + data[26:]
        yield "no_md5", data[:26] + bytes(16) + data[42:]


def wav(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Of a WAV whose chunks are "fmt " of 16 bytes and "data"."""
    assert data[12:16] == b"fmt " and data[36:40] == b"data"
    size = len(data) - 44

    def sizes(outer: int, inner: int) -> bytes:
        return data[:4] + struct.pack("<I", outer) + data[8:40] + struct.pack("<I", inner) + data[44:]

    def field(place: int, value: int, code: str = "<I") -> bytes:
        return data[:place] + struct.pack(code, value) + data[place + struct.calcsize(code) :]

    for claim in (2_000_000_000, 0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000, 0xFFFFFFFF - 36, 0x80000000, 1_000_000_000, 0):
        yield f"placeholder_{claim:x}", sizes(min(claim + 36, 0xFFFFFFFF), claim)
    yield "placeholder_zeros", sizes(0, 0)
    yield "placeholder_total", sizes(0x7FFFFFFF, 0x7FFFFFFF - 36)
    yield "outer_zero", sizes(0, size)
    yield "outer_ones", sizes(0xFFFFFFFF, size)
    yield "outer_short", sizes(36, size)
    yield "outer_long", sizes(size + 1036, size)
    yield "byte_rate_zero", field(28, 0)
    yield "byte_rate_of_bits", field(28, 16_000)
    yield "align_wrong", field(32, 1, "<H")
    yield "both_zero", field(28, 0)[:32] + b"\0\0" + data[34:]
    yield "list_behind", sizes(size + 48, size) + LIST
    yield "list_too_long", sizes(size + 48, size) + b"LIST" + struct.pack("<I", 4000) + b"INFO"
    yield "junk_behind", data + b"some bytes that are no chunk"
    yield "zeros_behind", data + bytes(5000)
    yield "id3v1_behind", data + ID3V1
    yield "chunk_wrong_behind", sizes(size + 60, size) + LIST[:4] + struct.pack("<I", 2) + b"INFOIART\xff\xff\xff\x7fab"
    yield "newline_inside", sizes(size + 38, size) + b"\r\n"
    yield "junk_chunk", data[:4] + struct.pack("<I", size + 72) + data[8:12] + b"JUNK\x1c\0\0\0" + bytes(28) + data[12:]
    yield "odd_chunk_no_pad", data[:12] + b"JUNK\x03\0\0\0abc" + data[12:]
    yield "odd_chunk_pad", data[:12] + b"JUNK\x03\0\0\0abc\0" + data[12:]
    yield "fmt_18", data[:16] + b"\x12\0\0\0" + data[20:36] + b"\0\0" + data[36:]
    yield "cut", data[: len(data) // 2]
    yield "cut_by_one_sample", data[:-6]
    yield "too_little_claimed", sizes(size + 36, size // 2 // 6 * 6)


def odd_wav(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Of a mono WAV of eight bits: an odd number of samples, with and without what should follow them."""
    size = len(data) - 44 - 1 | 1
    size -= size > len(data) - 44
    head = data[:40] + struct.pack("<I", size)
    sound = data[44 : 44 + size]
    yield "odd_no_pad", head[:4] + struct.pack("<I", 36 + size) + head[8:] + sound
    yield "odd_pad", head[:4] + struct.pack("<I", 37 + size) + head[8:] + sound + b"\0"
    yield "odd_no_pad_list", head[:4] + struct.pack("<I", 48 + size) + head[8:] + sound + LIST
    yield "odd_pad_list", head[:4] + struct.pack("<I", 49 + size) + head[8:] + sound + b"\0" + LIST


def aiff(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Of an AIFF whose chunks are COMM, maybe others, and SSND at the end."""
    comm, ssnd = data.index(b"COMM"), data.index(b"SSND")
    yield "annotated", data[:12] + b"ANNO\0\0\0\x03abc\0" + data[12:]
    yield "odd_no_pad", data[:12] + b"ANNO\0\0\0\x03abc" + data[12:]
    yield "comm_behind", data[:12] + data[ssnd:] + data[comm : comm + 26]
    yield "behind", data + b"NAME\0\0\0\x02ab"
    yield "outer_zero", data[:4] + bytes(4) + data[8:]
    yield "junk_behind", data + b"\0\1\2"
    yield "cut", data[: len(data) // 2]
    yield "offset", data[: ssnd + 4] + struct.pack(">II", len(data) - ssnd - 8 + 4, 4) + bytes(8) + data[ssnd + 16 :]
    yield "more_claimed", data[: comm + 10] + struct.pack(">I", 40_000) + data[comm + 14 :]


def au(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Of an AU file."""
    yield "unknown", data[:8] + b"\xff" * 4 + data[12:]
    yield (
        "annotated",
        data[:4] + struct.pack(">I", 61) + data[8:24] + b"an odd annotation of words".ljust(37) + data[24:],
    )
    yield "counts_header", data[:8] + struct.pack(">I", len(data)) + data[12:]
    yield "behind", data + b"more"
    yield "cut", data[: len(data) // 2]


def mpeg(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Of an MPEG file without tags."""
    yield "two_id3", ID3 + ID3 + data
    yield "ape_first", APE + data
    yield "ape_behind", data + APE
    yield "id3v1", data + ID3V1
    yield "ape_id3v1", data + APE + ID3V1
    yield "zeros_first", bytes(64) + data
    yield "newline_behind", data + b"\r\n"
    yield "zeros_behind", data + bytes(1000)
    yield "junk_first", b"junk before the first frame " * 4 + data
    yield "junk_behind", data + bytes(range(1, 65))


def ogg(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Of an Ogg file of one stream."""
    last = bytearray(data[data.rfind(b"OggS") :])
    last[5] &= ~4
    last[22:26] = bytes(4)
    last[22:26] = _ogg_crc(bytes(last)).to_bytes(4, "little")
    yield "no_eos", data[: data.rfind(b"OggS")] + bytes(last)
    yield "zeros_behind", data + bytes(100)
    yield "cut", data[: len(data) * 2 // 3]


def _ogg_crc(page: bytes) -> int:
    reflected = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{reflected:032b}"[::-1], 2)


Variation = Callable[[bytes], Iterator[tuple[str, bytes]]]
