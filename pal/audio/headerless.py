"""Old containers whose header gives no length at all: IRCAM, Portable Voice (PVF) and Ensoniq PARIS (PAF).

The layouts are those that libsndfile reads and writes (its `ircam.c`, `pvf.c`, `paf.c`).
"""

import re
import struct

from pal.audio.samples import SampleFormat, cut, pcm
from pal.audio.stream_info import CONVERT, DecodeError, StreamInfo

_IRCAM = {2: "PCM_16", 4: "FLOAT", 0x10001: "ALAW", 0x20001: "ULAW", 0x40004: "PCM_32"}
_PAF = {0: 16, 2: 8}


def is_ircam(data: bytes) -> bool:
    """Whether the four bytes at the start are those of an IRCAM file of some machine."""
    return (data[:2] == b"\x64\xa3" and data[3:4] == b"\0") or (data[:1] == b"\0" and data[2:4] == b"\xa3\x64")


def ircam(data: bytes) -> StreamInfo:
    """IRCAM: rate as float32, channels, codec; sound from byte 1,024 on. The byte order makes the fields valid."""
    if len(data) < 1024:
        raise cut(1024, len(data))
    order = "LITTLE" if 1 <= struct.unpack_from("<I", data, 8)[0] <= 256 else "BIG"
    rate, channels, codec = struct.unpack_from("<fII" if order == "LITTLE" else ">fII", data, 4)
    if codec not in _IRCAM or not 1 <= rate < 1 << 32:
        raise DecodeError("it is an IRCAM file whose codec is not supported", CONVERT)
    return _to_the_end(data, SampleFormat(int(rate), channels, _IRCAM[codec], order), 1024)


def pvf(data: bytes) -> StreamInfo:
    """Portable Voice: a line with channels, rate and bits, then big-endian samples."""
    found = re.match(rb"PVF1\n(\d{1,3}) (\d{1,9}) (\d{1,2})\n", data[:64])
    if found is None:
        raise DecodeError("its PVF header is damaged")
    channels, rate, bits = map(int, found.groups())
    return _to_the_end(data, SampleFormat(rate, channels, pcm(bits)), found.end())


def paf(data: bytes) -> StreamInfo:
    """Ensoniq PARIS, of 8 and 16 bits; sound from byte 2,048 on."""
    if len(data) < 2048:
        raise cut(2048, len(data))
    order = ">" if data[:4] == b" paf" else "<"
    little, rate, kind, channels = struct.unpack_from(order + "4I", data, 8)
    if kind not in _PAF:
        raise DecodeError("it is an Ensoniq PARIS (PAF) file whose codec is not supported", CONVERT)
    return _to_the_end(data, SampleFormat(rate, channels, pcm(_PAF[kind]), "LITTLE" if little else "BIG"), 2048)


def _to_the_end(data: bytes, sample_format: SampleFormat, start: int) -> StreamInfo:
    doubt = "its header gives no length (its format has none), so a cut could not be noticed"
    return sample_format.stream_info(start, len(data) - start, doubt)
