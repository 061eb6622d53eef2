"""`load_into`: paths, bytes, file objects and arrays become mono samples, whole or not at all.

Decoders conceal damage: libsndfile silently plays half a WAV, an MP3 with a hole or a truncated Ogg file.
So each container's header or checksums are read first (`containers`, `flac`, `mpeg`, `ogg`), and the
decoded samples must have the declared length. Files are decoded in blocks, each mixed down and
resampled, so that no header can cause a large allocation. Nothing here needs torch, so that the processes in which a
server decodes (`pal.serve.decode_worker`) are small: a fork of a process with torch takes several times as long.
"""

import os
from collections.abc import Callable
from typing import IO, Any, Protocol

import numpy as np

from pal.audio import containers, flac, mpeg, ogg, sndfile
from pal.audio.libav import Track
from pal.audio.limits import Limits
from pal.audio.members import known_seconds, member_of
from pal.audio.pcm import Mixer, to_float
from pal.audio.reading import held, mapped, name_of, printable
from pal.audio.stream_info import TO_THE_END, DecodeError, StreamInfo
from pal.errors import AudioError

_LIMITS = Limits()
_APPLE_DOUBLE = b"\x00\x05\x16\x07"
"""Magic number of AppleDouble (RFC 1740, appendix B): ._x beside x, from macOS on foreign file systems and in zips."""


Source = str | os.PathLike[str] | bytes | IO[bytes] | tuple[Any, int]
"""Audio source of `load`: a path, the bytes of a file, an open file, or samples and their rate."""


class Parts(Protocol):
    """What takes decoded samples part by part, as a list does."""

    def append(self, part_N: np.ndarray, /) -> object:
        """Take a part, float32 [n]."""
        ...


def load_into(
    parts: Parts,
    source: Source,
    rate: int,
    limits: Limits = _LIMITS,
    name: str | None = None,
    read_to_end: bool = False,
) -> tuple[float, str, str | None]:
    """As `load`, but give the samples part by part, so that they are never all in memory.

    Args:
        parts: where each part, float32 [n], is appended. What came before an error is not to be used.
        source: as in `load`, as are the others.

    Returns:
        Seconds, name and note of the `Waveform`.
    """
    shown = printable(name or name_of(source))
    note = None
    try:
        if isinstance(source, tuple):
            seconds = _from_array(source, rate, limits, parts)
        else:
            with held(source, limits) as data:
                seconds, note = _from_file(data, rate, limits, read_to_end, parts)
    except DecodeError as error:
        raise AudioError(f"{shown}: {error.what}; {error.remedy}") from None
    return seconds, shown, note


def seconds(path: str | os.PathLike[str], limits: Limits = _LIMITS, read_to_end: bool = False) -> float:
    """Length of a file by its header, or by its packets if the header has none.

    For sorting clips and for planning: only `load` verifies the length. Nothing is decoded except FLAC of unknown
    length, and only the header is read if it has the length.

    Args:
        path: of the file.
        limits: input limits.
        read_to_end: as in `load`.

    Raises:
        AudioError: no such file, or one whose header `load` would refuse.
    """
    member = member_of(path)
    try:
        known = None if member is None or limits is not _LIMITS else known_seconds(member)
        if known is not None:
            return known
        with mapped(path, limits) as data:
            return _length(data, limits, read_to_end)
    except DecodeError as error:
        raise AudioError(f"{printable(name_of(path))}: {error.what}; {error.remedy}") from None


def seconds_of(data: bytes) -> float:
    """As `seconds`, of the bytes of a file."""
    try:
        return _length(data, _LIMITS, read_to_end=False)
    except DecodeError as error:
        raise AudioError(f"bytes: {error.what}; {error.remedy}") from None


def _length(data: bytes, limits: Limits, read_to_end: bool) -> float:
    body, reader = _kind(data)
    if reader is None:
        return Track(body[:], read_to_end=read_to_end).length()
    whole = reader(body)
    if whole.doubt is not None and not read_to_end:
        raise DecodeError(whole.doubt, TO_THE_END)
    total, rate = 0, whole.rate
    for part in (whole, *whole.rest):
        frames = part.frames
        if frames is None and part.av_format is not None:
            frames = sum(map(len, Track(body[:], part, read_to_end).blocks()))
        if frames is None or rate is None:
            with sndfile.opened(body, part) as file:
                frames, rate = sndfile.length(file, part), file.samplerate
                if frames is None:  # a streamed file: decode to count the samples
                    frames = sum(map(len, sndfile.blocks(file, part, limits.block)))
        total += frames - part.slack
    assert rate is not None
    limits.check(rate, whole.channels or 1, total)
    return total / rate


def _from_array(source: tuple[Any, ...], rate: int, limits: Limits, parts: Parts) -> float:
    remedy = "pass (samples [N] or [N, channels], rate in Hz)"
    if len(source) != 2 or isinstance(source[0], (int, float)):
        raise DecodeError("the pair is not an array and its rate", remedy)
    try:
        array = np.asarray(source[0])
        source_rate = int(source[1])
        whole = source_rate == source[1]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise DecodeError("the pair is not an array and its rate", remedy) from None
    if not whole:
        raise DecodeError(f"a rate of {source[1]} Hz is not a whole number", remedy)
    if not limits.min_rate <= source_rate <= limits.max_rate:
        raise DecodeError(
            f"its rate of {source_rate} Hz is not in {limits.min_rate}..{limits.max_rate}",
            "pass the rate at which the array was recorded, or resample it",
        )
    if array.ndim not in (1, 2):
        raise DecodeError(f"an array of shape {list(array.shape)} is no clip", remedy)
    array_NC = array[:, None] if array.ndim == 1 else array
    if array.ndim == 2 and array_NC.shape[1] > limits.max_channels >= array_NC.shape[0]:
        raise DecodeError(f"an array of shape {list(array.shape)} has its axes swapped", remedy)
    mixer = limits.mixer(source_rate, array_NC.shape[1], len(array_NC), rate, parts.append)
    for start in range(0, len(array_NC), limits.block):
        mixer.add(to_float(array_NC[start : start + limits.block]))
    mixer.finish()
    return mixer.frames / source_rate


def _from_file(data: bytes, rate: int, limits: Limits, read_to_end: bool, parts: Parts) -> tuple[float, str | None]:
    data, reader = _kind(data)
    if reader is None:
        return _from_track(Track(data, read_to_end=read_to_end), rate, limits, parts)
    if read_to_end and reader is flac.read_header:
        tried: list[np.ndarray] = []
        try:
            found = _from_parts(data, reader(data), rate, limits, read_to_end, tried)
        except DecodeError:  # libFLAC returns nothing of a block whose end is cut
            data = flac.whole_frames(data)
        else:
            for part_N in tried:
                parts.append(part_N)
            return found
    return _from_parts(data, reader(data), rate, limits, read_to_end, parts)


def _from_parts(
    data: bytes, whole: StreamInfo, rate: int, limits: Limits, read_to_end: bool, parts: Parts
) -> tuple[float, str | None]:
    note = whole.doubt
    if note is not None and not read_to_end:
        raise DecodeError(note, TO_THE_END)
    if whole.av_format is not None:
        sound = data if whole.span is None else data[slice(*whole.span)]
        seconds, cut = _from_track(Track(sound, whole, read_to_end), rate, limits, parts)
        return seconds, _note(note) or cut
    if whole.rate is not None and whole.channels is not None:
        limits.check(whole.rate, whole.channels, whole.frames)
    mixer: Mixer | None = None
    stream = (0, 0)
    for part in (whole, *whole.rest):
        with sndfile.opened(data, part) as file:
            frames = sndfile.length(file, part)
            if mixer is None:
                stream = file.samplerate, file.channels
                mixer = limits.mixer(*stream, frames, rate, parts.append)
            elif stream != (file.samplerate, file.channels):
                raise DecodeError("its rate or number of channels changes on the way", "split it there")
            before = mixer.frames
            for block_NC in sndfile.blocks(file, part, limits.block):
                mixer.add(block_NC)
        decoded = mixer.frames - before
        if frames is not None and not frames - part.slack <= decoded <= frames:
            fault = f"it declares {frames} samples and {decoded} can be decoded"
            if not read_to_end or decoded > frames:
                raise DecodeError(fault, TO_THE_END)
            note = note or fault
    assert mixer is not None
    mixer.finish()
    return mixer.frames / stream[0], _note(note)


def _from_track(track: Track, rate: int, limits: Limits, parts: Parts) -> tuple[float, str | None]:
    mixer = limits.mixer(track.rate, track.channels, track.frames, rate, parts.append)
    for block_NC in track.blocks():
        mixer.add(block_NC)
    mixer.finish()
    return mixer.frames / track.rate, _note(track.doubt)


def _note(doubt: str | None) -> str | None:
    return None if doubt is None else f"read as far as it goes, since {doubt}"


def _kind(data: bytes) -> tuple[bytes, Callable[[bytes], StreamInfo] | None]:
    """The file without leading tags, and the reader of its header; None if `av` is needed.

    Raises:
        DecodeError: an unsupported kind of file.
    """
    if not data:
        raise DecodeError("it is empty", "record or download it again")
    if data[:4] == _APPLE_DOUBLE:
        raise DecodeError("it is macOS' AppleDouble metadata of another file, not sound", "delete it")
    start = mpeg.tags_end(data)  # some programs put ID3 tags before other containers, too
    body = data[start:] if start else data
    if (reader := containers.reader(body)) is not None:
        return body, reader
    head = body[:16]
    if head[:4] == b"OggS":
        return body, ogg.read_header
    if head[:4] == b"fLaC":
        return body, flac.read_header
    is_adts = len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0
    if head[4:8] == b"ftyp" or head[:4] == b"\x1a\x45\xdf\xa3" or is_adts:
        return body, None
    if not start and (error := containers.unsupported(data)) is not None:
        raise error
    if start or mpeg.looks_like_frames(data):
        return data, mpeg.read_header
    raise containers.unknown(data)
