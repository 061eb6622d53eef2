"""Audio clips: `read_clip` accepts every input form and returns one of three types.

These are `Waveform`, `EncodedClip` (encoder features) and `AudioKV` (audio keys and values). As input, a clip is one of
them or

| form | meaning |
|---|---|
| path, bytes, file object | of an audio file |
| URL | http, https and file (with `allow_urls`), and data |
| `(array, rate)`, `(rate, array)` | see `pal.audio.arrays`; numpy, torch on any device, lists |
| array or tensor | samples at the rate in `source_rate` |
| `{"array", "sampling_rate"}` | as in datasets 1 to 3 and transformers; also `raw` or `waveform`, and `sample_rate` |
| `{"bytes", "path"}` | datasets' undecoded audio; either may be None |
| decoder | torchcodec's `AudioDecoder` (datasets 4 and 5) or `AudioSamples` |

In a chat message, an audio part holds a clip (`part_clip`):

| part | its clip |
|---|---|
| `{"type": "audio", ...}` | `audio`, `url`, `path`, `audio_url`, `base64` or `data`; or the keys of a clip as a dict |
| `{"type": "audio_url", "audio_url": ...}` | a URL, or `{"url": ...}` (Qwen, vLLM) |
| `{"type": "input_audio", "input_audio": {"data": ..., "format": ...}}` | base64 (OpenAI), or a URL |
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from torch import Tensor

from pal.audio import Limits, Waveform, load
from pal.audio.arrays import (
    Array,
    DecodedSamples,
    SamplesDecoder,
    channels_last,
    decode_all,
    is_array,
    is_decoder,
    read_pair,
)
from pal.audio.stream_info import DecodeError
from pal.audio.urls import from_base64, is_url, read_url, redacted
from pal.backbone.audio_kv import AudioKV
from pal.errors import AudioError, AudioWarning, shortened
from pal.types import AudioFeatures, EncodedClip, PreparedClips

Clip = Waveform | EncodedClip | AudioKV
"""One clip as the model takes it; `seconds` is its length."""
AudioInput = (
    str
    | os.PathLike[str]
    | bytes
    | bytearray
    | memoryview
    | IO[bytes]
    | tuple[Array, float]
    | tuple[float, Array]
    | np.ndarray
    | Tensor
    | Mapping[str, object]
    | SamplesDecoder
    | DecodedSamples
    | Clip
)
"""One clip in any input form, as users and other libraries give it."""
Clips = (
    PreparedClips | Sequence[Tensor] | Sequence[Waveform] | Sequence[EncodedClip] | Sequence[AudioKV] | Sequence[Clip]
)
"""The clips of a batch, all of one kind; tensors are waveforms [N] at the model's rate."""

LONG_SECONDS = 120
"""Clips that are longer are encoded one by one and in blocks, for little memory."""

_ARRAYS, _RATES = ("array", "raw", "waveform"), ("sampling_rate", "sample_rate")
"""Keys of samples, and of their rate, in a clip given as a dict."""
_LIMITS = Limits()
_PART_CLIPS = ("audio", "url", "path", "audio_url", "input_audio")
"""Keys of a chat's audio part that hold a clip or its URL."""
_PART_BASE64 = ("base64", "data")
_PART_CUTS = ("audio_start", "audio_end", "start", "end", "offset", "duration")
"""Keys with which other libraries select a part of a clip; they are refused."""


def read_clip(
    clip: AudioInput,
    rate: int,
    *,
    source_rate: int | None = None,
    allow_urls: bool = False,
    limits: Limits = _LIMITS,
    read_to_end: bool = False,
) -> Clip:
    """Read a clip of any input form; audio becomes a waveform at `rate`, never shortened.

    Args:
        clip: see the module's tables.
        rate: sampling rate of the result in Hz.
        source_rate: sampling rate of a bare array; None means `rate`, as in transformers.
        allow_urls: whether http, https and file URLs are read.
        limits: input limits.
        read_to_end: see `pal.audio.load`.

    Raises:
        AudioError: one line with name, fault and remedy.
    """
    if isinstance(clip, AudioKV):
        return one_clip(clip)
    if isinstance(clip, EncodedClip) or (isinstance(clip, Waveform) and clip.rate == rate):
        return clip
    given: Any = (clip.samples_N, clip.rate) if isinstance(clip, Waveform) else clip
    name = clip.name if isinstance(clip, Waveform) else None
    try:
        if isinstance(given, Mapping):
            given, name = _of_mapping(given)
        elif isinstance(given, str) and is_url(given):
            name = redacted(given)
        if isinstance(given, str) and is_url(given):
            given = read_url(given, allow_urls, limits.max_bytes)
        elif is_decoder(given):
            given = decode_all(given)
        elif isinstance(given, tuple):
            given = read_pair(given, limits)
        elif is_array(given):
            given = (channels_last(given, limits), source_rate or rate)
    except DecodeError as error:
        raise AudioError(f"{shortened(name or _name(given), 140)}: {error.what}; {error.remedy}") from None
    return load(given, rate, limits, name=name, read_to_end=read_to_end)


def read_waveform(
    clip: AudioInput,
    rate: int,
    *,
    source_rate: int | None = None,
    allow_urls: bool = False,
    limits: Limits = _LIMITS,
    read_to_end: bool = False,
) -> Waveform:
    """`read_clip` for callers that need samples.

    Raises:
        AudioError: as `read_clip`, and for an `EncodedClip` or `AudioKV`.
    """
    found = read_clip(
        clip, rate, source_rate=source_rate, allow_urls=allow_urls, limits=limits, read_to_end=read_to_end
    )
    if not isinstance(found, Waveform):
        raise AudioError(f"{type(found).__name__} holds no samples; give the audio itself, or ask the model with it")
    return found


def is_clip(value: object) -> bool:
    """Whether a value has the type of an input form; its content is not checked."""
    known = str | os.PathLike | bytes | bytearray | memoryview | tuple | Mapping | Waveform | EncodedClip | AudioKV
    return isinstance(value, known) or is_array(value) or is_decoder(value) or callable(getattr(value, "read", None))


def is_clip_list(clips: object) -> bool:
    """Whether a value is several clips: a list or another sequence. A tuple is one clip, (array, rate).

    Raises:
        AudioError: a list of numbers, which is neither.
    """
    if not isinstance(clips, Sequence) or isinstance(clips, str | bytes | bytearray | memoryview | tuple):
        return False
    if len(clips) and isinstance(clips[0], int | float | np.number):
        raise AudioError("a list of numbers is no clip; give an array, or (array, rate)")
    return True


def clip_list(clips: AudioInput | Sequence[AudioInput]) -> list[AudioInput]:
    """One clip or several, as a list; an `AudioKV` of several clips is taken apart."""
    several: Any = clips
    given = list(several) if is_clip_list(clips) else [several]
    found: list[AudioInput] = []
    for clip in given:
        several_at_once = isinstance(clip, AudioKV) and len(clip) > 1
        found += [clip[i] for i in range(len(clip))] if several_at_once else [clip]
    return found


def one_clip(clip: AudioKV) -> AudioKV:
    """The clip; raises AudioError if it is none, or several."""
    if len(clip) != 1:
        raise AudioError(f"{clip!r} stands for {len(clip)} clips, not for one; give each by itself, as kv[0]")
    return clip


def clip_notes(clips: Sequence[Clip]) -> tuple[str, ...]:
    """One sentence for each clip whose length could not be checked."""
    waves = [clip for clip in clips if isinstance(clip, Waveform)]
    return tuple(f"{wave.name}: {wave.note}" for wave in waves if wave.note is not None)


def warn_of(notes: Sequence[str], stacklevel: int = 3) -> None:
    """Issue an `AudioWarning` for each note, located at the caller's caller by default."""
    for line in notes:
        warnings.warn(line, AudioWarning, stacklevel=stacklevel)


def to_one_kind(
    clips: Sequence[Clip], encode: Callable[[Waveform], EncodedClip], index: Callable[[Clip], AudioKV]
) -> list[Clip]:
    """Convert the clips of a batch to one type: the most processed one among them (`AudioKV`, then `EncodedClip`).

    A waveform of more than `LONG_SECONDS` is encoded, which is done in blocks.

    Args:
        clips: of any types.
        encode: runs the encoders on a waveform.
        index: computes audio keys and values; checks those of an `AudioKV`.
    """
    clips = [encode(clip) if isinstance(clip, Waveform) and clip.seconds > LONG_SECONDS else clip for clip in clips]
    if any(isinstance(clip, AudioKV) for clip in clips):
        return [index(clip) for clip in clips]
    if any(isinstance(clip, EncodedClip) for clip in clips):
        return [encode(clip) if isinstance(clip, Waveform) else clip for clip in clips]
    return list(clips)


@dataclass(frozen=True)
class ClipBatch:
    """Clips of a batch, all of one type, in the field of that type; the other fields are empty."""

    waveforms: tuple[Tensor, ...] = ()
    """[N] at the model's rate."""
    encoded: tuple[EncodedClip, ...] = ()
    prepared: PreparedClips | None = None
    """Waveforms or encoded clips after preprocessing (`AudioTower.prepare`)."""
    indexed: tuple[AudioKV, ...] = ()

    @classmethod
    def of(cls, clips: Clips) -> ClipBatch:
        """Sort clips into the field of their type."""
        if isinstance(clips, PreparedClips):
            return cls(prepared=clips)
        batch = cls(
            waveforms=tuple(
                c.samples_N if isinstance(c, Waveform) else c for c in clips if isinstance(c, Waveform | Tensor)
            ),
            encoded=tuple(clip for clip in clips if isinstance(clip, EncodedClip)),
            indexed=tuple(one_clip(clip) for clip in clips if isinstance(clip, AudioKV)),
        )
        assert len(clips) in map(len, (batch.waveforms, batch.encoded, batch.indexed)), (
            "a batch's clips are of one kind"
        )
        return batch


@dataclass(frozen=True)
class ClipFeatures:
    """The clips of a batch as an integration takes them."""

    features: Sequence[AudioFeatures] | Sequence[AudioKV]
    """Features [B, A, E] of each stream, or each clip's keys and values; empty without clips."""
    seconds: Sequence[float] = ()
    """Seconds of each clip that the encoders' tokens cover. (A connector's tokens may have no time scale.)"""

    @classmethod
    def of_streams(cls, streams: Sequence[AudioFeatures], encoded: Sequence[AudioFeatures]) -> ClipFeatures:
        """`ClipFeatures` from the features of each stream, and those of each encoder, which give the seconds."""
        counts = zip(*(part.lengths for part in encoded), strict=True)
        scales = [part.seconds_per_token for part in encoded]
        return cls(streams, [min(n * scale for n, scale in zip(own, scales, strict=True)) for own in counts])

    def tokens(self) -> list[int]:
        """Audio tokens of each clip, of all streams together."""
        streams = [part.lengths for part in self.features if isinstance(part, AudioFeatures)]
        if streams:
            return [sum(counts) for counts in zip(*streams, strict=True)]
        return [part.tokens for part in self.features if isinstance(part, AudioKV)]


def part_clip(part: Mapping[str, Any]) -> Any:
    """Clip in an audio part of a chat message, as `read_clip` takes it; None if the part is only a placeholder.

    Raises:
        AudioError: two clips, a selected part of one, or invalid base64.
    """
    cuts = [key for key in _PART_CUTS if part.get(key) is not None]
    if cuts:
        raise AudioError(f"an audio part has '{cuts[0]}', and clips are used whole; cut the clip yourself")
    if any(part.get(key) is not None for key in (*_ARRAYS, "bytes")):
        return part
    given = [key for key in (*_PART_CLIPS, *_PART_BASE64) if part.get(key) is not None]
    if len(given) > 1:
        raise AudioError(f"an audio part has {' and '.join(given)}; give one of {', '.join(_PART_CLIPS)}")
    if not given:
        return None
    clip = part[given[0]]
    encoded = given[0] in (*_PART_BASE64, "input_audio")
    if isinstance(clip, Mapping) and given[0] in ("input_audio", "audio_url", "audio", "url"):
        inner = [key for key in ("url", *_PART_BASE64) if isinstance(clip.get(key), str | bytes)]
        if len(inner) == 1:
            encoded, clip = inner[0] in _PART_BASE64, clip[inner[0]]
        elif given[0] in ("input_audio", "audio_url"):
            raise AudioError(f"the '{given[0]}' of an audio part needs 'data' or 'url'; give one of them")
    if given[0] == "path" and isinstance(clip, bytes):
        return os.fsdecode(clip)
    if encoded and isinstance(clip, str | bytes) and not (isinstance(clip, str) and is_url(clip)):
        try:
            return from_base64(clip, _LIMITS.max_bytes)
        except DecodeError as error:
            if isinstance(clip, bytes):
                return clip  # the bytes of a file as they are
            raise AudioError(f"'{given[0]}' of an audio part: {error.what}; {error.remedy}") from None
    rate = part.get("sampling_rate")
    bare = isinstance(clip, list) or is_array(clip)
    return {"array": clip, "sampling_rate": rate} if bare and rate is not None else clip


def _of_mapping(clip: Mapping[str, Any]) -> tuple[Any, str | None]:
    """(clip in a dict, its name for messages); decoded samples are preferred to the file that they come from."""
    path = clip.get("path")
    path = os.fsdecode(path) if isinstance(path, bytes) else path
    name = os.fsdecode(path) if isinstance(path, str | os.PathLike) else None
    arrays = [key for key in _ARRAYS if clip.get(key) is not None]
    rates = [key for key in _RATES if clip.get(key) is not None]
    if len(arrays) == 1 and len(rates) == 1:
        return (clip[arrays[0]], clip[rates[0]]), name
    if not arrays and clip.get("bytes") is not None:
        if not isinstance(clip["bytes"], bytes | bytearray | memoryview):
            raise DecodeError(f"its 'bytes' are of type {type(clip['bytes']).__name__}", "give the bytes of a file")
        return clip["bytes"], name
    if not arrays and path is not None:
        return path, None if name is None or not is_url(name) else redacted(name)
    if not arrays and ("bytes" in clip or "path" in clip):
        raise DecodeError("it holds neither bytes nor a path", "leave the record out")
    raise DecodeError("a clip given as a dict needs 'array' and 'sampling_rate'", "or give 'bytes' or 'path' of a file")


def _name(clip: object) -> str:
    if isinstance(clip, str):
        return redacted(clip)
    return "array" if isinstance(clip, tuple) or is_array(clip) else "clip"
