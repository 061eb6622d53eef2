"""The pages of Ogg files (Vorbis, Opus, FLAC). A decoder skips a damaged page; this refuses it."""

import zlib

from pal.audio.declared import Declared, DecodeError

_CONTINUED, _FIRST, _LAST = 1, 2, 4
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def declared(data: bytes) -> Declared:
    """Check every page: checksum, number, and the mark of the last one (RFC 3533).

    Raises:
        DecodeError: cut, damaged, or more than one stream in the file.
    """
    serial: bytes | None = None
    number = 0
    offset = 0
    while True:
        if offset == len(data):
            raise DecodeError("it is cut: its last page is missing")
        if data[offset : offset + 5] != b"OggS\0":
            raise DecodeError(f"it is damaged: no Ogg page stands at byte {offset} of {len(data)}")
        lengths = data[offset + 27 : offset + 27 + data[offset + 26]] if offset + 27 <= len(data) else b""
        end = offset + 27 + len(lengths) + sum(lengths)
        if offset + 27 > len(data) or len(lengths) < data[offset + 26] or end > len(data):
            raise DecodeError("it is cut: its last page is not whole")
        page = data[offset:end]
        if _checksum(page[:22] + bytes(4) + page[26:]) != int.from_bytes(page[22:26], "little"):
            raise DecodeError(f"it is damaged: the Ogg page at byte {offset} has a wrong checksum")
        if serial is None:
            serial, number = page[14:18], int.from_bytes(page[18:22], "little")
        elif page[14:18] != serial:
            raise _several()
        elif int.from_bytes(page[18:22], "little") != number:
            raise DecodeError(f"it is damaged: page {number} is missing")
        number += 1
        offset = end
        if page[5] & _LAST:
            if b"OggS" in data[offset:]:
                raise _several()
            return Declared(None)


def _several() -> DecodeError:
    return DecodeError(
        "it holds several streams, of which only one would be heard",
        "write the one you mean to a file of its own: ffmpeg -i IN -map 0:a:0 OUT.wav",
    )


def _checksum(page: bytes) -> int:
    """Ogg's CRC-32: zlib's polynomial with bits in the other order, start 0 and no final inversion."""
    reflected = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{reflected:032b}"[::-1], 2)
