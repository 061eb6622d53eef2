"""m4a, mp4 and webm through FFmpeg's libraries, where the optional `av` package is installed."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np

from pal.audio.boxes import check
from pal.audio.declared import DecodeError
from pal.audio.pcm import to_float

_PACKETS = 2
"""Packets by which a container's duration may miss the samples: encoders pad the first and the last."""
_SECONDS = 0.02
"""Beside them: webm gives its duration in milliseconds, of packet starts rather than ends."""


class Track:
    """The one sound track of a file in memory: `rate`, `channels`, `seconds` and its blocks."""

    def __init__(self, data: bytes) -> None:
        self._av = _library()
        check(data)
        try:
            # named, so that FFmpeg does not guess at its hundreds of formats
            self._container = self._av.open(io.BytesIO(data), format=_format(data), metadata_errors="ignore")
        except self._av.error.FFmpegError as error:
            raise DecodeError(f"it cannot be opened ({error.strerror})") from None
        tracks = self._container.streams.audio
        if len(tracks) != 1:
            self._container.close()
            what = f"it holds {len(tracks)} sound tracks" if tracks else "it holds no sound"
            raise DecodeError(what, "write the one you mean to a file of its own: ffmpeg -i IN -map 0:a:0 OUT.wav")
        self._stream = tracks[0]
        self.rate: int = self._stream.codec_context.sample_rate
        self.channels: int = self._stream.codec_context.channels
        self.seconds: float | None = None
        """What the container declares; recordings made by browsers declare nothing, and bare AAC is guessed at."""
        if self._container.format.name == "aac":
            return
        if self._stream.duration is not None:
            self.seconds = float(self._stream.duration * self._stream.time_base)
        elif self._container.duration is not None:
            self.seconds = self._container.duration / self._av.time_base

    def length(self) -> float:
        """Seconds that the container declares, or else those up to the end of its last packet; nothing is decoded."""
        if self.seconds is not None:
            return self.seconds
        end = 0.0
        try:
            for packet in self._container.demux(self._stream):
                if packet.pts is not None:
                    end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        except self._av.error.FFmpegError as error:
            raise DecodeError(f"it is damaged ({error.strerror})") from None
        finally:
            self._container.close()
        return end

    def blocks(self) -> Iterator[np.ndarray]:
        """Float32 blocks [n, channels]; raises DecodeError where decoding fails or the length is not the declared."""
        packet_frames = samples = 0
        try:
            for frame in self._container.decode(self._stream):
                if (frame.sample_rate, frame.layout.nb_channels) != (self.rate, self.channels):
                    raise DecodeError("its rate or number of channels changes on the way")
                packet_frames = max(packet_frames, frame.samples)
                samples += frame.samples
                yield _block(frame)
        except self._av.error.FFmpegError as error:
            raise DecodeError(f"it is damaged {samples / self.rate:.2f} s after its start ({error.strerror})") from None
        finally:
            self._container.close()
        slack = _SECONDS + _PACKETS * packet_frames / self.rate
        if self.seconds is not None and abs(samples / self.rate - self.seconds) > slack:
            raise DecodeError(f"it declares {self.seconds:.2f} s and holds {samples / self.rate:.2f} s")


def _block(frame: Any) -> np.ndarray:
    block = frame.to_ndarray()
    channels = frame.layout.nb_channels
    return to_float(block.T if frame.format.is_planar else block.reshape(-1, channels))


def _format(data: bytes) -> str:
    if data[4:8] == b"ftyp":
        return "mov"
    return "matroska" if data[:4] == b"\x1a\x45\xdf\xa3" else "aac"


def _library() -> Any:
    try:
        import av
    except ImportError:
        raise DecodeError("m4a, mp4 and webm need the av package", "pip install 'pal-audio[av]'") from None
    return av
