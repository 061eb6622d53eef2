"""Detection of containers by their first bytes, and names of unsupported ones."""

from collections.abc import Callable

from pal.audio import aiff, au, caf, headerless, legacy, nist, riff, w64, wavpack
from pal.audio.stream_info import CONVERT, DecodeError, StreamInfo
from pal.audio.wave_format import RIFF_64

_RIFF = (b"RIFF", b"RIFX", b"RF64", b"BW64")
_STARTS = {
    legacy.VOC: legacy.voc,
    legacy.WVE: legacy.wve,
    b"2BIT": legacy.avr,
    b"PVF1\n": headerless.pvf,
    b" paf": headerless.paf,
    b"fap ": headerless.paf,
    b"wvpk": wavpack.read_header,
}
_UNSUPPORTED = (
    (b"MAC ", "a Monkey's Audio file"),
    (b"TTA1", "a True Audio file"),
    (b"TTA2", "a True Audio file"),
    (b"MPCK", "a Musepack file"),
    (b"MP+", "a Musepack file"),
    (b"OFR ", "an OptimFROG file"),
    (b"tBaK", "a TAK file"),
    (b"ajkg", "a Shorten file"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "a WMA (ASF) file"),
    (b"#!AMR", "an AMR file"),
    (b"#!SILK", "a SILK file"),
    (b"\x02#!SILK", "a SILK file"),
    (b"\x0b\x77", "an AC-3 file"),
    (b"\x7f\xfe\x80\x01", "a DTS file"),
    (b"DSD ", "a DSD (DSF) file"),
    (b"FRM8", "a DSD (DSDIFF) file"),
    (b".RMF", "a RealMedia file"),
    (b".ra\xfd", "a RealAudio file"),
    (b"FLV\x01", "a Flash video"),
    (b"\0\0\x01\xba", "an MPEG programme stream"),
    (b"Extended Instrument:", "a FastTracker instrument (XI)"),
    (b"MATLAB 5.0 MAT-file", "a MATLAB file"),
    (b"\0\0\x03\xe8", "a MATLAB 4 file"),
    (b"\0\0\0\0\x01\0\0\0\x01\0\0\0", "a MATLAB 4 file"),
    (b"\xf0\x7e", "a MIDI sample dump"),
    (b"\x01\x04", "an Akai MPC 2000 file"),
    (b"MThd", "a MIDI file, which holds notes and no sound"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"<!DOCTYPE", "a web page"),
    (b"<!doctype", "a web page"),
    (b"<html", "a web page"),
    (b"version https://git-lfs", "a pointer of Git LFS"),
)
"""(first bytes, name) of unsupported kinds of file."""
_REMEDIES = {
    "a zip archive": "unpack it",
    "a gzip archive": "unpack it",
    "a web page": "download the file itself",
    "a pointer of Git LFS": "fetch the file: git lfs pull",
    "a MIDI file, which holds notes and no sound": "give a recording",
    "a MATLAB file": "write its samples as WAV: soundfile.write",
    "a MATLAB 4 file": "write its samples as WAV: soundfile.write",
}


def reader(data: bytes) -> Callable[[bytes], StreamInfo] | None:
    """Header reader of a container of uncompressed sound; None for other files."""
    form = data[8:12]
    if data[:4] in _RIFF and form == b"WAVE":
        return riff.read_header
    if data[:4] == b"FORM" and form in (b"AIFF", b"AIFC"):
        return aiff.read_header
    if data[:4] in (b".snd", b"dns."):
        return au.read_header
    if data[:4] == b"caff":
        return caf.read_header
    if data[:16] == RIFF_64:
        return w64.read_header
    if data[:8] == b"NIST_1A\n":
        return nist.read_header
    if data[:4] == b"FORM" and form in (b"8SVX", b"16SV"):
        return legacy.svx
    for start, read in _STARTS.items():
        if data[: len(start)] == start:
            return read
    if headerless.is_ircam(data):
        return headerless.ircam
    return legacy.htk if legacy.is_htk(data) else None


def unsupported(data: bytes) -> DecodeError | None:
    """Error for a file of a known unsupported kind; None for other files."""
    if data[:4] == b"RIFF" and len(data) > 11:
        return _unsupported("an AVI video" if data[8:12] == b"AVI " else "a RIFF file that is no WAV")
    for start, name in _UNSUPPORTED:
        if data[: len(start)] == start:
            return _unsupported(name)
    return None


def unknown(data: bytes) -> DecodeError:
    """Error for a file of unknown kind."""
    if not data[:].strip(b"\0"):
        return DecodeError("it holds zeros only", "fetch it again")
    return DecodeError("it is no WAV, FLAC, MP3, Ogg, Opus, AIFF, AU, CAF, m4a or webm file", CONVERT)


def _unsupported(name: str) -> DecodeError:
    return DecodeError(f"it is {name}, which is not supported", _REMEDIES.get(name, CONVERT))
