"""Audio loading: any source becomes a mono waveform at the requested rate, or an AudioError is raised."""

from pal.audio.decode import Limits, Source, Waveform, load, load_into, seconds, seconds_of
from pal.audio.members import clip_bytes, clip_exists, clip_sha256, clip_size, clip_state
from pal.audio.pcm import resample
from pal.audio.stream_info import DecodeError

__all__ = [
    "DecodeError",
    "Limits",
    "Source",
    "Waveform",
    "clip_bytes",
    "clip_exists",
    "clip_sha256",
    "clip_size",
    "clip_state",
    "load",
    "load_into",
    "resample",
    "seconds",
    "seconds_of",
]
