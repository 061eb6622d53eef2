"""The header of AU files (`.au`, `.snd`), in which GTZAN is distributed."""

import struct

from pal.audio.samples import SampleFormat, cut, is_placeholder, no_length
from pal.audio.stream_info import CONVERT, DecodeError, StreamInfo

_KINDS = {1: "ULAW", 2: "PCM_S8", 3: "PCM_16", 4: "PCM_24", 5: "PCM_32", 6: "FLOAT", 7: "DOUBLE", 27: "ALAW"}
_UNSUPPORTED = {23: "G.721", 24: "G.722", 25: "G.723", 26: "G.723"}
"""Unsupported codecs. For G.721 and G.723, libsndfile, FFmpeg and SoX each decode different samples."""


def read_header(data: bytes) -> StreamInfo:
    """Read the six numbers of the header (`.snd`, or `dns.` with the low byte first).

    The size may be unknown by design (all ones), which sets `doubt`. Some programs include the header in it.

    Raises:
        DecodeError: truncated, or an unsupported codec.
    """
    order, name = (">", "BIG") if data[:4] == b".snd" else ("<", "LITTLE")
    if len(data) < 24:
        raise DecodeError(f"it is cut: its header should take 24 bytes, the file holds {len(data)}")
    start, size, encoding, rate, channels = struct.unpack_from(order + "5I", data, 4)
    if not 24 <= start <= len(data):
        raise DecodeError(f"it is cut or damaged: its sound should begin at byte {start} of {len(data)}")
    held = len(data) - start
    doubt = None
    if is_placeholder(size, held):
        size, doubt = held, no_length(size, held)
    elif size == len(data):
        size = held
    elif size > held:
        raise cut(size, held)
    if encoding not in _KINDS:
        codec = _UNSUPPORTED.get(encoding, f"number {encoding}")
        raise DecodeError(f"it is an AU file whose codec is not supported ({codec})", CONVERT)
    return SampleFormat(rate, channels, _KINDS[encoding], name).stream_info(start, size, doubt)
