"""Audio files that lie about themselves, hold far more than their size, or arrived damaged."""

from __future__ import annotations

import functools
import io
import random
import struct
from collections.abc import Iterator

import numpy as np
import soundfile

from tests.serve.hostile.wire import wav

HOUR = 3600.0
_STREAMINFO = 8
"""Offset of the first block of a FLAC file, behind `fLaC` and the block's header."""


@functools.cache
def flac_bomb(seconds: float) -> bytes:
    """Silence as FLAC, a thousand times smaller than its samples."""
    file, block = io.BytesIO(), np.zeros(8_000 * 60, np.int16)
    with soundfile.SoundFile(file, "w", 8_000, 1, "PCM_16", format="FLAC") as out:
        for _ in range(round(seconds / 60)):
            out.write(block)
    return file.getvalue()


def flac_claiming(data: bytes, frames: int | None = None, rate: int | None = None) -> bytes:
    """A FLAC file whose header says another number of frames (0: unknown) or another rate."""
    at = _STREAMINFO + 10
    (field,) = struct.unpack(">Q", data[at : at + 8])
    if frames is not None:
        field = field >> 36 << 36 | frames
    if rate is not None:
        field = field & (1 << 44) - 1 | rate << 44
    return data[:at] + struct.pack(">Q", field) + data[at + 8 :]


@functools.cache
def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        value = byte << 24
        for _ in range(8):
            value = value << 1 ^ (0x04C11DB7 if value & 0x80000000 else 0)
        table.append(value & 0xFFFFFFFF)
    return table


def ogg_page(packets: list[bytes], granule: int, number: int, flags: int = 0) -> bytes:
    """A page of a logical stream, with its checksum (RFC 3533); packets of less than 255 bytes."""
    head = struct.pack("<4sBBQIII B", b"OggS", 0, flags, granule, 1, number, 0, len(packets))
    page = bytearray(head + bytes(len(packet) for packet in packets) + b"".join(packets))
    crc = 0
    for byte in page:
        crc = crc << 8 & 0xFFFFFFFF ^ _crc_table()[crc >> 24 ^ byte]
    page[22:26] = struct.pack("<I", crc)
    return bytes(page)


@functools.cache
def opus_bomb(seconds: float, claimed: float | None = None) -> bytes:
    """Opus of two bytes for each 120 ms: silence that the decoder makes up (RFC 6716, discontinuous transmission).

    `claimed` are the seconds that its last page says instead of the true ones.
    """
    head = b"OpusHead" + struct.pack("<BBHIhB", 1, 2, 0, 48_000, 0, 0)
    tags = b"OpusTags" + struct.pack("<I", 3) + b"pal" + struct.pack("<I", 0)
    pages = [ogg_page([head], 0, 0, 2), ogg_page([tags], 0, 1)]
    packet = bytes([0b00011_1_11, 2])  # narrow band, 60 ms, stereo; two frames without a byte
    count = max(1, round(seconds / 0.12 / 255))
    for number in range(count):
        last = number + 1 == count
        granule = (number + 1) * 255 * 5_760
        if last and claimed is not None:
            granule = round(claimed * 48_000)
        pages.append(ogg_page([packet] * 255, granule, number + 2, 4 if last else 0))
    return b"".join(pages)


def bombs(seconds: float) -> Iterator[tuple[str, bytes]]:
    """Small files with hours of sound, and such that do not say so."""
    flac = flac_bomb(seconds)
    yield "FLAC", flac
    yield "FLAC of unknown length", flac_claiming(flac, frames=0)
    yield "FLAC that claims a second", flac_claiming(flac, frames=8_000)
    yield "Opus", opus_bomb(seconds)
    yield "Opus that claims a second", opus_bomb(seconds, claimed=1.0)


def forged_rates() -> Iterator[tuple[str, bytes]]:
    """Headers with 1 Hz and with 655,350 Hz, in several containers."""
    sound = wav(1.0)
    for rate in (1, 655_350):
        for channels in (1, 8):
            size = struct.pack("<HIIHH", channels, rate, 2 * channels * rate, 2 * channels, 16)
            yield f"WAV of {rate} Hz, {channels} channels", sound[:22] + size + sound[36:]
        yield f"FLAC of {rate} Hz", flac_claiming(wav(1.0, format="FLAC"), rate=rate)
        au = wav(1.0, format="AU")
        endian = ">" if au[:4] == b".snd" else "<"
        yield f"AU of {rate} Hz", au[:16] + struct.pack(f"{endian}I", rate) + au[20:]
        w64 = wav(1.0, format="W64")
        at = w64.index(struct.pack("<I", 16_000))
        yield f"Wave64 of {rate} Hz", w64[:at] + struct.pack("<I", rate) + w64[at + 4 :]


CODECS = {
    "WAV": {"format": "WAV"},
    "AIFF": {"format": "AIFF"},
    "FLAC": {"format": "FLAC"},
    "MP3": {"format": "MP3"},
    "Vorbis": {"format": "OGG", "subtype": "VORBIS"},
    "Opus": {"format": "OGG", "subtype": "OPUS"},
}
"""How soundfile writes them."""


@functools.cache
def whole(codec: str) -> bytes:
    """A file of 2 s that is as it should be."""
    return wav(2.0, 7, **CODECS[codec])


def damaged(codec: str, number: int) -> bytes:
    """A file that was cut (even numbers) or of which one to four bits were flipped (odd ones)."""
    chance, data = random.Random(f"{codec} {number}"), bytearray(whole(codec))
    if number % 2 == 0:
        return bytes(data[: chance.randrange(1, len(data))])
    for _ in range(chance.choice((1, 1, 2, 4))):
        # half of them in the header, where they do most
        place = chance.randrange(min(200, len(data))) if chance.random() < 0.5 else chance.randrange(len(data))
        data[place] ^= 1 << chance.randrange(8)
    return bytes(data)
