"""Audio in: any source becomes a mono waveform at the rate asked for, or an AudioError says why not."""

from pal.audio.decode import Limits, Source, Waveform, load, seconds
from pal.audio.pcm import resample
from pal.audio.sources import is_clip, is_list, read_clip

__all__ = ["Limits", "Source", "Waveform", "is_clip", "is_list", "load", "read_clip", "resample", "seconds"]
