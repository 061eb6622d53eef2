"""What decoding in processes of their own costs `pal serve`, beside decoding in its own.

    python docs/benchmarks/decoders.py

Printed are the start of the fork server with the first clip; the median milliseconds of clips of 0.3 and 10 s; and for
long files the seconds, and whether they are decoded within 64 MiB beside the file.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable

import numpy as np
import soundfile

from pal.audio import Limits, Waveform, load
from pal.errors import AudioError
from pal.serve.decode_process import DecodeProcesses

RATE = 16_000
LIMITS = Limits(max_seconds=600.0, max_bytes=64 << 20)


def noise(seconds: float, rate: int, format: str) -> bytes:
    """A file of noise."""
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(0).normal(0, 0.02, round(seconds * rate)), rate, format=format)
    return file.getvalue()


def seconds_of(decode: Callable[[bytes, int, Limits, str], Waveform], data: bytes, times: int) -> float:
    """Median seconds of decoding a file."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        decode(data, RATE, LIMITS, "the clip")
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def main() -> None:
    """Measure and print."""
    start = time.perf_counter()
    processes = DecodeProcesses()
    try:
        processes.load(noise(0.3, RATE, "WAV"), RATE, LIMITS, "the clip")
        print(f"start and first clip: {time.perf_counter() - start:.1f} s")
        for seconds in (0.3, 10.0):
            data = noise(seconds, RATE, "WAV")
            apart, here = (1e3 * seconds_of(decode, data, 50) for decode in (processes.load, load))
            print(f"{seconds} s of WAV: {apart:.1f} ms in a process of its own, {here:.1f} ms in this one")
        processes.memory = 64 << 20
        for format in ("WAV", "FLAC"):
            data = noise(590.0, 48_000, format)
            try:
                apart, here = (seconds_of(decode, data, 3) for decode in (processes.load, load))
                said = f"{apart:.1f} s in a process of its own, {here:.1f} s in this one"
            except AudioError as error:
                said = str(error)
            print(f"590 s of {format}, {len(data) / 1e6:.0f} MB: {said}")
    finally:
        processes.close()


if __name__ == "__main__":
    main()
