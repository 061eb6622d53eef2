"""`load`: paths, bytes, file objects and arrays become mono waveforms, whole or not at all.

Decoders repair: libsndfile plays half a WAV, an MP3 with a hole or an Ogg file without its end, and
says nothing. So each container's own header or checksums are read first (`riff`, `flac`, `mpeg`,
`ogg`), and what is decoded must be as long as they say. Everything is decoded in blocks, mixed down
and resampled on the way, so that no header can ask for memory.
"""

import errno
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import soundfile
from torch import Tensor

from pal.audio import flac, mpeg, ogg, riff
from pal.audio.declared import TO_THE_END, Declared, DecodeError
from pal.audio.libav import Track
from pal.audio.pcm import Mixer, to_float
from pal.errors import AudioError, shortened

_BLOCK = 1 << 16
_CONVERT = "convert it: ffmpeg -i IN OUT.wav"
_APPLE_DOUBLE = b"\x00\x05\x16\x07"
"""RFC 1740, appendix B: the file ._x beside x, which macOS writes on foreign file systems and into archives."""
_NAME = 140
"""Characters of a name that an error shows."""


Source = str | os.PathLike[str] | bytes | IO[bytes] | tuple[Any, int]
"""What `load` takes: a path, the bytes of a file, an open file, or samples and their rate."""


@dataclass(frozen=True)
class Limits:
    """What is taken; everything beyond is refused before it is decoded or as soon as it shows."""

    max_seconds: float = 3600.0
    max_bytes: int = 1 << 30
    """Of the source as it is given."""
    max_decoded_bytes: int = 1 << 32
    """Of its samples as float32, all channels; they are never in memory at once."""
    min_rate: int = 4_000
    max_rate: int = 192_000
    max_channels: int = 8


@dataclass(frozen=True)
class Waveform:
    """A clip, ready for an encoder."""

    samples_N: Tensor
    """Mono float32 at the rate that was asked for."""
    seconds_given: float
    """Length of the source, by its own rate."""
    name: str
    """The path, or what else the source was."""
    note: str | None = None
    """With `read_to_end`, where the length could not be checked: one sentence that says why."""


def load(
    source: Source, rate: int, limits: Limits = Limits(), name: str | None = None, read_to_end: bool = False
) -> Waveform:
    """Decode a clip, mix it down to mono and resample it.

    Args:
        source: a path; the bytes of a file; a file object open for reading bytes; or (array, rate)
            with samples [N] or [N, channels], floats in -1..1 or integers of full scale.
        rate: Hz of the result.
        limits: what to refuse.
        name: what messages call the source, where it has no path.
        read_to_end: take a file whose end cannot be known (a WAV or FLAC written to a stream, a recording that was
            cut) as far as it goes; `note` of the result then says so.

    Files may be WAV, FLAC, MP3, Ogg Vorbis and Opus, and with the `av` package m4a, mp4 and webm.

    Raises:
        AudioError: one line with name, fault and remedy. Never a shortened result: a file that ends
            before its declared end, or declares none (a streamed WAV or FLAC), is refused.
    """
    shown = _printable(name or _name(source))
    note = None
    try:
        if isinstance(source, tuple):
            samples_N, seconds = _from_array(source, rate, limits)
        else:
            samples_N, seconds, note = _from_file(_read(source, limits), rate, limits, read_to_end)
    except DecodeError as error:
        raise AudioError(f"{shown}: {error.what}; {error.remedy}") from None
    return Waveform(samples_N, seconds, shown, note)


def seconds(path: str | os.PathLike[str], limits: Limits = Limits(), read_to_end: bool = False) -> float:
    """Length of a file by its header, or by its packets where the header gives none; nothing is decoded.

    Good for sorting clips and for planning: only `load` finds out whether a file keeps what it promises.

    Raises:
        AudioError: no such file, or none of a kind that `load` takes.
    """
    try:
        return float(soundfile.info(os.fspath(path)).duration)
    except soundfile.SoundFileError as error:
        fault = _reason(error)
    try:
        data = _read(path, limits)
        if _kind(data) is None:
            return Track(data).length()
        raise DecodeError(f"it is damaged or of an unknown kind ({fault})")
    except DecodeError as error:
        raise AudioError(f"{_printable(_name(path))}: {error.what}; {error.remedy}") from None


def _from_array(source: tuple[Any, ...], rate: int, limits: Limits) -> tuple[Tensor, float]:
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
    if array.ndim not in (1, 2):
        raise DecodeError(f"an array of shape {list(array.shape)} is no clip", remedy)
    array_NC = array[:, None] if array.ndim == 1 else array
    if array.ndim == 2 and array_NC.shape[1] > limits.max_channels >= array_NC.shape[0]:
        raise DecodeError(f"an array of shape {list(array.shape)} has its axes swapped", remedy)
    mixer = _mixer(source_rate, array_NC.shape[1], len(array_NC), rate, limits)
    for start in range(0, len(array_NC), _BLOCK):
        mixer.add(to_float(array_NC[start : start + _BLOCK]))
    return mixer.finish(), mixer.frames / source_rate


def _from_file(data: bytes, rate: int, limits: Limits, read_to_end: bool) -> tuple[Tensor, float, str | None]:
    kind = _kind(data)
    if kind is None:
        return *_from_track(Track(data), rate, limits), None
    if kind is flac.declared:
        data = data[mpeg.id3_size(data) :]  # taggers put one before FLAC too
    declared = kind(data)
    if declared.doubt is not None and not read_to_end:
        raise DecodeError(declared.doubt, TO_THE_END)
    if declared.rate is not None and declared.channels is not None:
        _mixer(declared.rate, declared.channels, declared.frames, rate, limits)
    try:
        with soundfile.SoundFile(io.BytesIO(declared.payload or data)) as file:
            frames = declared.frames if declared.frames is not None else file.frames
            mixer = _mixer(file.samplerate, file.channels, frames, rate, limits)
            if (declared.rate or file.samplerate, declared.channels or file.channels) != (
                file.samplerate,
                file.channels,
            ):
                raise DecodeError("its header is read in two ways")
            for block_NC in _blocks(file, declared):
                mixer.add(block_NC)
    except soundfile.SoundFileError as error:
        raise DecodeError(f"it is damaged or of an unknown kind ({_reason(error)})") from None
    if mixer.frames != frames:
        raise DecodeError(f"it declares {frames} samples and {mixer.frames} can be decoded")
    note = None if declared.doubt is None else f"read as far as it goes, since {declared.doubt}"
    return mixer.finish(), mixer.frames / file.samplerate, note


def _blocks(file: soundfile.SoundFile, declared: Declared) -> Iterator[np.ndarray]:
    """Float32 blocks [n, channels]; checks the MD5 that a FLAC file gives of its samples."""
    if declared.md5 is None or declared.bits not in (8, 16, 24):
        while len(block_NC := file.read(_BLOCK, dtype="float32", always_2d=True)):
            yield block_NC
        return
    digest = hashlib.md5(usedforsecurity=False)
    size = declared.bits // 8
    while len(block_NC := file.read(_BLOCK, dtype="int32", always_2d=True)):
        little = block_NC.astype("<i4").view(np.uint8).reshape(*block_NC.shape, 4)
        digest.update(little[..., 4 - size :].tobytes())
        yield to_float(block_NC)
    if digest.digest() != declared.md5:
        raise DecodeError("it is damaged: its samples do not have the checksum it gives")


def _from_track(track: Track, rate: int, limits: Limits) -> tuple[Tensor, float]:
    frames = None if track.seconds is None else round(track.seconds * track.rate)
    mixer = _mixer(track.rate, track.channels, frames, rate, limits)
    for block_NC in track.blocks():
        mixer.add(block_NC)
    return mixer.finish(), mixer.frames / track.rate


def _mixer(source_rate: int, channels: int, frames: int | None, rate: int, limits: Limits) -> Mixer:
    """Check what a header says against the limits, and make what decodes under them."""
    if not limits.min_rate <= source_rate <= limits.max_rate:
        raise DecodeError(f"its rate of {source_rate} Hz is not in {limits.min_rate}..{limits.max_rate}", _CONVERT)
    if not 1 <= channels <= limits.max_channels:
        raise DecodeError(f"its {channels} channels are not 1 to {limits.max_channels}", _CONVERT + " -ac 1")
    seconds = "" if frames is None else f" ({frames / source_rate:.0f} s)"
    too_long = DecodeError(f"it is longer than {limits.max_seconds:.0f} s{seconds}", "split it, or raise max_seconds")
    max_frames = int(limits.max_seconds * source_rate)
    if limits.max_decoded_bytes // (4 * channels) < max_frames:
        max_frames = limits.max_decoded_bytes // (4 * channels)
        too_long = DecodeError(
            f"it decodes to more than {limits.max_decoded_bytes} bytes", "split it or mix it to mono"
        )
    if frames is not None and frames > max_frames:
        raise too_long
    return Mixer(source_rate, rate, max_frames, too_long)


def _kind(data: bytes) -> Callable[[bytes], Declared] | None:
    """The reader of this container's header; None where `av` is needed. Raises DecodeError on unknown data."""
    if not data:
        raise DecodeError("it is empty", "record or download it again")
    if data[:4] == _APPLE_DOUBLE:
        raise DecodeError("it is macOS' AppleDouble metadata of another file, not sound", "delete it")
    if data[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and data[8:12] == b"WAVE":
        return riff.declared
    if data[:4] == b"OggS":
        return ogg.declared
    body = data[mpeg.id3_size(data) :][:16]
    if body[:4] == b"fLaC":
        return flac.declared
    is_adts = len(body) > 1 and body[0] == 0xFF and body[1] & 0xF6 == 0xF0
    if body[4:8] == b"ftyp" or body[:4] == b"\x1a\x45\xdf\xa3" or is_adts:
        return None
    if data[:3] == b"ID3" or (len(body) > 1 and body[0] == 0xFF and body[1] & 0xE0 == 0xE0):
        return mpeg.declared
    raise DecodeError("it is no WAV, FLAC, MP3, Ogg, Opus, m4a or webm file", _CONVERT)


def _read(source: Any, limits: Limits) -> bytes:
    """The bytes of a path, of bytes or of a file object, at most `limits.max_bytes` of them."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
    elif isinstance(source, (str, os.PathLike)):
        data = _read_path(os.fspath(source), limits)
    elif callable(getattr(source, "read", None)):
        try:
            data = _read_stream(source, limits)
        except OSError as error:
            raise DecodeError(f"the file object cannot be read ({error})", "open it anew with mode 'rb'") from None
    else:
        raise DecodeError(
            f"{type(source).__name__} is no source of audio", "pass a path, bytes, a file object or (array, rate)"
        )
    if len(data) > limits.max_bytes:
        raise _too_big(limits)
    return data


def _read_path(path: str | bytes, limits: Limits) -> bytes:
    shown = os.fsdecode(path)
    if "://" in shown:
        raise DecodeError("it is an address, not a file", "download it and give its path")
    try:
        file = Path(shown)
        if file.is_dir():
            raise DecodeError("it is a folder", "name one file in it")
        if not file.exists():
            raise DecodeError("there is no such file", "check the path")
        if not file.is_file():
            raise DecodeError("it is no ordinary file", "write it to a file first")
        if file.stat().st_size > limits.max_bytes:
            raise _too_big(limits)
        with file.open("rb") as stream:
            return _read_stream(stream, limits)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise DecodeError("no file has so long a name", "pass a path; base64 goes as a data: address") from None
        raise DecodeError(f"it cannot be read ({error.strerror})", "check the path and its permissions") from None
    except ValueError:  # a zero byte in the path
        raise DecodeError("there is no such file", "check the path") from None


def _read_stream(stream: IO[bytes], limits: Limits) -> bytes:
    parts = []
    left = limits.max_bytes + 1
    while left > 0:
        try:
            part = stream.read(left)
        except ValueError as error:  # closed, or no text in its encoding
            raise DecodeError(f"the file object cannot be read ({error})", "open it with mode 'rb'") from None
        if not isinstance(part, (bytes, bytearray)):
            raise DecodeError("the file object gives no bytes", "open it with mode 'rb'")
        if not part:
            break
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _too_big(limits: Limits) -> DecodeError:
    return DecodeError(f"it is larger than {limits.max_bytes} bytes", "split it, or raise max_bytes")


def _name(source: Any) -> str:
    if isinstance(source, (str, os.PathLike)):
        return os.fsdecode(source)
    if isinstance(source, tuple):
        return "array"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return "bytes"
    name = getattr(source, "name", None)
    return name if isinstance(name, str) else "audio"


def _printable(name: str) -> str:
    """The name on one line, whatever a file was called."""
    return shortened(name, _NAME, space="?")


def _reason(error: Exception) -> str:
    text = " ".join(str(getattr(error, "error_string", error)).removeprefix("Error : ").split())
    return text.rstrip(".") or "the decoder failed"
