"""Audio in: any source becomes a mono waveform at the rate asked for, or an AudioError says why not."""

from pal.audio.decode import Limits, Source, Waveform, load, seconds
from pal.audio.pcm import resample

__all__ = ["Limits", "Source", "Waveform", "load", "resample", "seconds"]
