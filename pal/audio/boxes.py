"""Top-level boxes of mp4 and elements of webm, which determine the length of the file."""

from pal.audio.stream_info import DecodeError

_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"


def check(data: bytes) -> None:
    """Refuse a file that ends inside one of its top-level boxes.

    A browser's recording has an open size and no duration, so its end cannot be checked; it is
    accepted.

    Raises:
        DecodeError: the file is truncated.
    """
    if data[4:8] == b"ftyp":
        _check_mp4(data)
    elif data[:4] == _EBML:
        _check_webm(data)


def _check_mp4(data: bytes) -> None:
    """ISO 14496-12, section 4.2: size and name, size 1 for a 64-bit size, 0 for up to the end."""
    start = 0
    while start < len(data):
        size = int.from_bytes(data[start : start + 4], "big")
        if size == 1:
            size = int.from_bytes(data[start + 8 : start + 16], "big")
        if size == 0:
            return
        if size < 8 or start + size > len(data):
            raise _cut(start + size, len(data))
        start += size


def _check_webm(data: bytes) -> None:
    """RFC 8794, section 4: the size follows the id, in as many bytes as its leading zero bits say, plus one."""
    start = 0
    while start < len(data):
        name = data[start : start + 4]
        first = data[start + 4] if start + 4 < len(data) else 0
        width = 9 - first.bit_length()
        size = int.from_bytes(data[start + 4 : start + 4 + width], "big") & (1 << 7 * width) - 1
        if name not in (_EBML, _SEGMENT) or size == (1 << 7 * width) - 1:
            return
        start += 4 + width + size
        if start > len(data):
            raise _cut(start, len(data))


def _cut(needed: int, there: int) -> DecodeError:
    return DecodeError(f"it is cut or damaged: its header claims {needed} bytes, the file holds {there}")
