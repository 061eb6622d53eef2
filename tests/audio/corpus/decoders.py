"""Decoders that share no code with `pal.audio`: what they make of a file, and whether they complain.

FFmpeg's program (or its libraries in the `av` package where the program is not there), libsndfile reading the whole
file in one go, and SoX.
"""

from __future__ import annotations

import io
import re
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

_SECONDS = 120
"""A decoder that takes longer is counted as one that cannot read the file."""


@dataclass(frozen=True)
class Heard:
    """What one decoder made of a file."""

    decoder: str
    rate: int
    mono_N: np.ndarray
    """Mean of the channels, float64 [N]."""
    codec: str = ""
    """As FFmpeg calls it, or as libsndfile does."""
    complaint: str = ""
    """The first line that the decoder wrote about something wrong; empty where it read the file without complaint."""


def hear(path: Path, programs: bool = True) -> list[Heard]:
    """What each decoder makes of a file, or only those of this process; those that cannot read it are left out."""
    heard = [_ffmpeg(path) if programs and shutil.which("ffmpeg") else _av(path), _soundfile(path)]
    if programs and shutil.which("sox"):
        heard.append(_sox(path))
    return [one for one in heard if one is not None and len(one.mono_N)]


def _ffmpeg(path: Path) -> Heard | None:
    start, end = ["ffmpeg", "-nostdin", "-v", "level+info"], ["-i", str(path), "-map", "0:a:0", "-bitexact"]
    end += ["-c:a", "pcm_f32le", "-f", "wav", "-"]
    done = _run(start + end)
    if done is not None and b"Audio: opus" in done.stderr:
        # FFmpeg's own decoder gives other samples at low bit rates (SILK); its container code stays independent of ours
        done = _run([*start, "-c:a", "libopus", *end])
    if done is None or done.returncode != 0:
        return None
    lines = done.stderr.decode("utf-8", "replace").splitlines()
    wrong = [line for line in lines if re.search(r"\[(error|fatal|panic)\]", line)]
    codec = next((found[1] for line in lines if (found := re.search(r"Stream #0.*: Audio: (\w+)", line))), "")
    return _from_wav("ffmpeg", done.stdout, codec, wrong[0] if wrong else "")


def _sox(path: Path) -> Heard | None:
    done = _run(["sox", "-V2", str(path), "-t", "wav", "-e", "floating-point", "-b", "32", "-"])
    if done is None or done.returncode != 0:
        return None
    # that a stream's header cannot be mended is about our pipe
    lines = [line for line in done.stderr.decode("utf-8", "replace").splitlines() if "can't seek" not in line]
    return _from_wav("sox", done.stdout, "", lines[0] if lines else "")


def _run(command: list[str]) -> subprocess.CompletedProcess[bytes] | None:
    try:
        return subprocess.run(command, capture_output=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return None


def _from_wav(decoder: str, data: bytes, codec: str, complaint: str) -> Heard | None:
    """From float32 WAV as programs write it to a pipe, where its sizes mean nothing."""
    fmt, start = data.find(b"fmt "), data.find(b"data")
    if fmt < 0 or start < fmt:
        return None
    channels, rate = struct.unpack_from("<HI", data, fmt + 10)
    body = data[start + 8 :]
    samples_N = np.frombuffer(body[: len(body) // (4 * channels) * 4 * channels], "<f4").astype(np.float64)
    return Heard(decoder, rate, samples_N.reshape(-1, channels).mean(1), codec, complaint)


def _soundfile(path: Path) -> Heard | None:
    try:
        data = path.read_bytes()
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            samples_NC = file.read(file.frames, dtype="float64", always_2d=True)
            short = "" if len(samples_NC) == file.frames else f"{len(samples_NC)} of {file.frames} samples"
            return Heard("soundfile", file.samplerate, samples_NC.mean(1), file.subtype.lower(), short)
    except (soundfile.SoundFileError, TypeError, ValueError, MemoryError):
        return None


def _av(path: Path) -> Heard | None:
    import av
    import av.logging

    blocks = []
    av.logging.set_level(av.logging.ERROR)
    try:
        with (
            np.errstate(invalid="ignore"),
            av.logging.Capture() as logs,
            av.open(str(path), metadata_errors="ignore") as container,
        ):
            stream = container.streams.audio[0]
            decoder = stream.codec_context
            if decoder.name == "opus":  # as for the program
                decoder = av.CodecContext.create("libopus", "r")
                decoder.extradata = stream.codec_context.extradata
            for packet in container.demux(stream):
                for frame in decoder.decode(packet):
                    block = frame.to_ndarray()
                    block_CN = block if frame.format.is_planar else block.reshape(-1, frame.layout.nb_channels).T
                    full = {"u": 128.0, "i": 2.0 ** (8 * block.itemsize - 1), "f": 1.0}[block.dtype.kind]
                    blocks.append(((block_CN.astype(np.float64) - (128 if full == 128 else 0)) / full).mean(0))
            rate, codec = decoder.sample_rate, stream.codec_context.name
    except (av.error.FFmpegError, IndexError, ValueError):
        return None
    finally:
        av.logging.set_level(None)
    complaint = next((line for level, _, line in logs if level <= av.logging.ERROR), "")
    return Heard("av", rate, np.concatenate(blocks), codec, complaint) if blocks else None
