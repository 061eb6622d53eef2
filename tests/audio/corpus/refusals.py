"""Files of the corpus that `load` refuses, and why that is true."""

from __future__ import annotations

import re
from fnmatch import fnmatch

_LENGTH = "its header gives no length"
_CODEC = "whose codec is not supported"
REFUSED = {
    # a stream does not know its length: read_to_end reads these
    "stream_*.wav": _LENGTH,
    "stream_*.flac": _LENGTH,
    "stream_*.w64": _LENGTH,
    "stream_*.caf": _LENGTH,
    "stream_*.au": _LENGTH,
    "soxstream_*": _LENGTH,
    "wild_placeholder_*": _LENGTH,
    "wild_size_-1_*": _LENGTH,
    "wild_unknown_*.au": _LENGTH,
    "wild_no_total_*.flac": _LENGTH,
    # cut or contradicting itself, which decoders do not say
    "wild_cut_*": "cut|no samples|damaged|no sound follows",
    "wild_cut_by_one_sample_*": "it is cut: its data chunk claims",
    "wild_more_claimed_*": "it is cut: its sound should take",
    "wild_too_little_claimed_*": "is followed by .* that are no chunk",
    # codecs that nothing here reads, or that libsndfile, FFmpeg and SoX each read in another way
    "soundfile_AU_G72*": r"whose codec is not supported \(G.72",
    "soundfile_WAV_G721*": r"whose codec is not supported \(G.721",
    "soundfile_WAV_NMS*": r"whose codec is not supported \(NMS",
    "soundfile_WAV_*_big.wav": "it is a RIFX file whose codec is not supported",
    "ffmpeg_*.wav": _CODEC,
    "ffmpeg_*.au": _CODEC,
    "ffmpeg_*.caf": _CODEC,
    # containers that give no length or are not worth a reader; each is named
    "soundfile_IRCAM_*": _LENGTH,
    "sox_*.ircam": _LENGTH,
    "soundfile_PVF_*": _LENGTH,
    "sox_*.pvf": _LENGTH,
    "soundfile_PAF_PCM_24_*": "it is an Ensoniq PARIS",
    "soundfile_PAF_*": _LENGTH,
    "sox_*.paf": _LENGTH,
    "soundfile_SDS_*": "it is a MIDI sample dump",
    "soundfile_XI_*": "it is a FastTracker instrument",
    "soundfile_MAT*": "it is a MATLAB",
    "soundfile_MPC2K_*": "it is an Akai",
    "ffmpeg_*.tta": "it is a True Audio file",
    "ffmpeg_*.wma": "it is a WMA",
    "ffmpeg_*.ac3": "it is an AC-3 file",
}
"""What the error says, by pattern of the name."""


def is_expected(name: str, line: str) -> bool:
    """Whether this file may be refused with this line."""
    return any(fnmatch(name, pattern) and re.search(reason, line) for pattern, reason in REFUSED.items())


def on_purpose(name: str, line: str) -> bool:
    """Whether the file is cut or has no length, so that no reader can promise anything of its end."""
    return line.startswith(_LENGTH) or fnmatch(name, "wild_cut*") or fnmatch(name, "wild_*_claimed_*")
