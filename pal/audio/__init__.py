"""Audio loading: any source becomes a mono waveform at the requested rate, or an AudioError is raised."""

from typing import TYPE_CHECKING, Any

from pal.audio.decode import Limits, Source, load_into, seconds, seconds_of
from pal.audio.members import clip_bytes, clip_exists, clip_sha256, clip_size, clip_state
from pal.audio.stream_info import DecodeError

if TYPE_CHECKING:
    from pal.audio.waveform import Waveform, load, resample

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


def __getattr__(name: str) -> Any:
    """What needs torch is imported when it is asked for, so that a process that only decodes starts without it."""
    if name not in ("Waveform", "load", "resample"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pal.audio import waveform

    return getattr(waveform, name)
