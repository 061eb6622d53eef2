"""Blocks of WavPack files (`.wv`), which FFmpeg's libraries decode."""

import struct

from pal.audio.samples import cut
from pal.audio.stream_info import CONVERT, DecodeError, StreamInfo

_HEADER = 32
_RATES = (6000, 8000, 9600, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000, 192000)
_FIRST, _DSD = 1 << 11, 1 << 31
_TAGS = (b"APETAGEX", b"TAG", b"ID3", b"LYRICS")


def read_header(data: bytes) -> StreamInfo:
    """Walk the consecutive blocks and compare their samples with the total in the first one.

    By the WavPack 4 and 5 file format description, section 2.0: 32 bytes of header, sizes without their first eight
    bytes, all ones for an unknown number of samples.

    Raises:
        DecodeError: truncated, damaged, or DSD.
    """
    start = counted = 0
    total, flags = 0xFFFFFFFF, 0
    while data[start : start + 4] == b"wvpk" and start + _HEADER <= len(data):
        size, _, _, _, samples, _, frames, own, _ = struct.unpack_from("<IHBBIIIII", data, start + 4)
        if start + 8 + size > len(data):
            raise cut(start + 8 + size, len(data))
        if not flags or not counted:
            total, flags = samples, own
        if own & _FIRST:
            counted += frames
        start += 8 + max(size, _HEADER - 8)
    rest = data[start : start + 16]
    if not counted or (rest and not rest.startswith(_TAGS) and rest.strip(b"\0")):
        raise DecodeError(f"it is damaged: no WavPack block stands at byte {start} of {len(data)}")
    if flags & _DSD:
        raise DecodeError("it is a WavPack file of DSD, which is not supported", CONVERT)
    doubt = None
    if total == 0xFFFFFFFF:
        doubt = "its header gives no length (a WavPack written to a stream), so a cut could not be noticed"
    elif total != counted:
        raise DecodeError(f"it is cut: it declares {total} samples, its blocks hold {counted}")
    index = flags >> 23 & 15
    if index == len(_RATES):
        raise DecodeError("it is a WavPack file of an unusual rate, which is not supported", CONVERT)
    bits = 8 * (1 + (flags & 3))
    return StreamInfo(counted, _RATES[index], None, bits=bits, span=(0, start), av_format="wv", doubt=doubt)
