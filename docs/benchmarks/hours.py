"""Time and memory of a long recording: a file indexed, then asked.

    python docs/benchmarks/hours.py --hours 1
    python docs/benchmarks/hours.py --hours 10 --int8 --model runs/demo/lal/model

The recording is noise in a FLAC file, which another process writes. The index is saved, and loaded to be asked.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

import pal
from pal import long_clips
from pal.backbone.audio_kv import AudioKV

RATE = 16_000


def peak() -> float:
    """Largest resident size of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def write(path: Path, hours: float) -> None:
    """A FLAC file of noise."""
    random = np.random.default_rng(0)
    with soundfile.SoundFile(path, "w", RATE, 1, format="FLAC") as file:
        for _ in range(round(hours * 60)):
            file.write(random.normal(0, 0.05, 60 * RATE))


def main() -> None:
    """Index and ask."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--int8", action="store_true", help="keep keys and values in int8")
    parser.add_argument("--questions", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sound, index = Path(folder, "noise.flac"), Path(folder, "noise.safetensors")
        writer = multiprocessing.get_context("spawn").Process(target=write, args=(sound, args.hours))
        writer.start()
        writer.join()
        model = pal.load(args.model)
        print(f"the model: {peak():.2f} GiB; the file: {sound.stat().st_size / 1e6:.0f} MB", flush=True)
        began = time.perf_counter()
        made, _ = long_clips.index(model, sound, int8=args.int8)
        made.save(index)
        print(f"indexed in {time.perf_counter() - began:.0f} s: {made}, {index.stat().st_size / 1e6:.0f} MB stored")
        print(f"at most {peak():.2f} GiB", flush=True)
        del made
        clip = AudioKV.load(index)
        for _ in range(args.questions):
            began = time.perf_counter()
            model.ask(clip, "What sound is this?", max_new_tokens=8)
            print(f"asked in {time.perf_counter() - began:.0f} s, {peak():.2f} GiB at most", flush=True)


if __name__ == "__main__":
    main()
