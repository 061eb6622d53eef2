"""Encoders and decoders that share no code with `pal.audio`; a test that needs one is skipped where it is missing."""

import io
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import soundfile


def run(*command: str, data: bytes | None = None) -> bytes:
    """What a program writes on stdout; `IN` and `OUT` stand for a file with `data` and one whose bytes are returned."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    with tempfile.TemporaryDirectory() as scratch:
        given, made = Path(scratch, "in"), Path(scratch, "out.wav")
        if data is not None:
            given.write_bytes(data)
        names = [str({"IN": given, "OUT": made}.get(word, word)) for word in command]
        done = subprocess.run(names, capture_output=True, check=True)
        return made.read_bytes() if made.exists() else done.stdout


def wav(samples: np.ndarray, rate: int) -> bytes:
    """16-bit WAV."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


def mono(wave: bytes) -> np.ndarray:
    """Mean of the channels of a WAV, which may have been written to a pipe."""
    samples_NC, _ = soundfile.read(io.BytesIO(wave), dtype="float32", always_2d=True)
    return np.asarray(samples_NC.mean(1, dtype=np.float32))


def mpg123(data: bytes) -> np.ndarray:
    """What mpg123 makes of MPEG audio, in mono."""
    return mono(run("mpg123", "-q", "-e", "f32", "-w", "OUT", "IN", data=data))


def opusdec(data: bytes) -> np.ndarray:
    """What opusdec makes of an Opus file at 48 kHz, in mono."""
    return mono(run("opusdec", "--quiet", "--float", "--rate", "48000", "IN", "OUT", data=data))


def by_av(data: bytes, format: str) -> np.ndarray:
    """What FFmpeg's libraries make of a file, in mono."""
    av = pytest.importorskip("av")
    blocks = []
    with av.open(io.BytesIO(data), format=format) as container:
        for frame in container.decode(container.streams.audio[0]):
            block = frame.to_ndarray()
            block_CN = block if frame.format.is_planar else block.reshape(-1, frame.layout.nb_channels).T
            full = {"i": 2.0 ** (8 * block.itemsize - 1), "f": 1.0}[block.dtype.kind]
            blocks.append((block_CN / full).mean(0))
    return np.concatenate(blocks)


def sound(rate: int, seconds: float, channels: int = 2, seed: int = 0) -> np.ndarray:
    """Tones, noise and clicks [N, channels], which need long reaches of a bit reservoir."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(rate * seconds)) / rate
    tone = np.sin(2 * np.pi * 0.11 * rate * time * (1 + 0.2 * time)) * (time % 0.3 < 0.2)
    out = 0.3 * tone[:, None] + 0.1 * rng.standard_normal((len(time), channels)) * (time % 0.7 < 0.15)[:, None]
    out[:: rate // 3] = 0.7
    return np.clip(out, -0.95, 0.95)
