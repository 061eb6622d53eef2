"""Decoding of m4a, mp4 and webm by FFmpeg's libraries, with the optional `av` package."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from pal.audio import opus
from pal.audio.boxes import check
from pal.audio.pcm import to_float
from pal.audio.reading import file_of
from pal.audio.sndfile import Md5
from pal.audio.stream_info import CONVERT, TO_THE_END, DecodeError, StreamInfo

_PACKETS = 2
"""Largest difference of a container's duration from its samples in packets: encoders pad the first and the last."""
_NEED = "m4a, mp4 and webm need the av package"
_PLANES = 8
"""Fewest channels of planar frames that are packed before they are read."""
_ENDLESS = 1e9
"""Upper bound of a plausible length in seconds."""
_SECONDS = 0.02
"""Further tolerance in seconds: webm has its duration in milliseconds, of packet starts rather than ends."""


class Track:
    """Audio track of a file in memory, decoded by FFmpeg's libraries.

    Args:
        data: the file.
        info: stream info from its header, for a FLAC of an odd number of bits.
        read_to_end: whether a truncated file is read to its end; `doubt` then has the reason.

    Raises:
        DecodeError: no `av`, no audio track or several, or a truncated file.
    """

    def __init__(self, data: bytes, info: StreamInfo | None = None, read_to_end: bool = False) -> None:
        self._av = _library(
            _NEED
            if info is None
            else f"{str(info.av_format).upper()} of {info.bits} bits a sample needs the av package"
        )
        self._info, self._read_to_end = info, read_to_end
        self._ahead = 0
        self.doubt: str | None = None
        """Why the end of the sound cannot be verified; final after the last block."""
        try:
            check(data)
        except DecodeError as error:
            self._doubt(error.what)
        format = _format(data) if info is None else info.av_format
        with self._errors("it cannot be opened"):
            # with a format name, so that FFmpeg does not probe its hundreds of formats
            self._container = self._av.open(file_of(data), format=format, metadata_errors="ignore")
        tracks = self._container.streams.audio
        if len(tracks) != 1:
            self._container.close()
            what = f"it holds {len(tracks)} sound tracks" if tracks else "it holds no sound"
            raise DecodeError(what, "write the one you mean to a file of its own: ffmpeg -i IN -map 0:a:0 OUT.wav")
        self._stream = tracks[0]
        context = self._stream.codec_context
        if context is None:
            self._container.close()
            raise DecodeError("its sound is in a codec that FFmpeg does not know", CONVERT)
        self.rate: int = context.sample_rate
        self.channels: int = context.channels
        self.seconds: float | None = None
        """Declared length; None for browsers' recordings, which have none, and for bare AAC, which FFmpeg estimates."""
        if info is not None and info.frames is not None:
            self.seconds = info.frames / self.rate
        elif format == "aac" or info is not None:
            pass
        elif self._stream.duration is not None:
            self.seconds = float(self._stream.duration * self._stream.time_base)
        elif self._container.duration is not None:
            self.seconds = self._container.duration / self._av.time_base
        if self.rate < 1 or (self.seconds is not None and not 0 <= self.seconds < _ENDLESS):
            self._container.close()
            raise DecodeError("its header gives no rate or no possible length")

    @property
    def frames(self) -> int | None:
        """Approximate declared number of samples of each channel."""
        return None if self.seconds is None else round(self.seconds * self.rate)

    def length(self) -> float:
        """Declared length in seconds, else that up to the end of the last packet; nothing is decoded."""
        if self.seconds is not None and self.doubt is None:
            self._container.close()
            return self.seconds
        end = 0.0
        with self._errors("it is damaged"):
            try:
                for packet in self._container.demux(self._stream):
                    if packet.pts is not None:
                        end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            finally:
                self._container.close()
        return end

    def blocks(self) -> Iterator[np.ndarray]:
        """Float32 blocks [n, channels]; raises DecodeError if decoding fails or the length is not as declared."""
        packet_frames = samples = 0
        md5 = None
        if self._info is not None and self._info.md5 is not None and self._info.bits is not None:
            md5 = Md5(self._info.bits)
        frames = self._decoded()
        try:
            while True:
                try:
                    with self._errors(f"it is damaged {samples / self.rate:.2f} s after its start"):
                        frame = next(frames, None)
                        if frame is None:
                            break
                        changed = (frame.sample_rate, frame.layout.nb_channels) != (self.rate, self.channels)
                        block_NC = np.zeros((0, self.channels)) if changed else self._block(frame)
                except DecodeError as error:
                    self._doubt(error.what)
                    break
                if changed:
                    raise DecodeError("its rate or number of channels changes on the way")
                packet_frames = max(packet_frames, frame.samples)
                if self._ahead:
                    block_NC, self._ahead = block_NC[self._ahead :], max(0, self._ahead - len(block_NC))
                samples += len(block_NC)
                if md5 is not None:
                    md5.add(block_NC.astype(np.int32) << (32 - 8 * block_NC.dtype.itemsize))
                yield to_float(block_NC)
        finally:
            self._container.close()
        slack = _SECONDS + _PACKETS * packet_frames / self.rate if self._info is None else 0.0
        if self.seconds is not None and abs(samples / self.rate - self.seconds) > slack:
            self._doubt(f"it declares {self.seconds:.2f} s and holds {samples / self.rate:.2f} s")
        elif md5 is not None and self._info is not None:
            md5.check(self._info)

    def _decoded(self) -> Iterator[Any]:
        """Decoded frames; sets the number of leading Opus samples that FFmpeg has not dropped.

        FFmpeg 8 counts them at the container's rate, which is that before encoding; FFmpeg 5 does not.
        """
        context = self._stream.codec_context
        head = context.extradata or b""
        decoder = self._decoder()
        seen: int | None = 0 if "matroska" in self._container.format.name and head[:8] == b"OpusHead" else None
        for packet in self._container.demux(self._stream):
            if seen is not None and packet.size:
                seen += opus.samples(bytes(packet))
            for frame in decoder.decode(packet if packet.size else None):
                if seen is not None:
                    self._ahead = max(0, int.from_bytes(head[10:12], "little") - (seen - frame.samples))
                    seen = None
                yield frame

    def _decoder(self) -> Any:
        """Decoder of the packets: libopus for Opus, from which FFmpeg's own decoder differs at low bit rates."""
        context = self._stream.codec_context
        if context.name != "opus":
            return context
        try:
            decoder = self._av.codec.CodecContext.create("libopus", "r")
        except self._av.error.FFmpegError:  # FFmpeg was built without it
            return context
        decoder.extradata, decoder.sample_rate, decoder.layout = context.extradata, context.sample_rate, context.layout
        decoder.options = {"request_sample_fmt": "flt"}
        return decoder

    def _block(self, frame: Any) -> np.ndarray:
        """Samples [n, channels] of a frame."""
        channels = frame.layout.nb_channels
        if frame.format.is_planar and channels >= _PLANES:
            # the bindings count one plane too many and would read beyond the last
            packed = self._av.AudioResampler(format=frame.format.packed, layout=frame.layout, rate=frame.sample_rate)
            return np.concatenate([part.to_ndarray().reshape(-1, channels) for part in packed.resample(frame)])
        block: np.ndarray = frame.to_ndarray()
        return block.T if frame.format.is_planar else block.reshape(-1, channels)

    def _doubt(self, what: str) -> None:
        if not self._read_to_end:
            raise DecodeError(what, TO_THE_END)
        self.doubt = self.doubt or what

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Turn errors of FFmpeg, and of the bindings on invalid values, into DecodeError."""
        try:
            yield
        except self._av.error.FFmpegError as error:
            raise DecodeError(f"{what} ({error.strerror})") from None
        except (ValueError, OverflowError, ArithmeticError, MemoryError, NotImplementedError) as error:
            raise DecodeError(f"{what} ({' '.join(str(error).split())[:60]})") from None


def _format(data: bytes) -> str:
    if data[4:8] == b"ftyp":
        return "mov"
    return "matroska" if data[:4] == b"\x1a\x45\xdf\xa3" else "aac"


def _library(need: str) -> Any:
    try:
        import av
    except ImportError:
        raise DecodeError(need, "pip install 'pal-audio[av]'") from None
    return av
