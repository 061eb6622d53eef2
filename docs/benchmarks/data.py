"""Large manifests, and shards against folders: what docs/data.md states.

    python docs/benchmarks/data.py manifest --records 5700000 --folder scratch
    python docs/benchmarks/data.py clips --clips 100000 --folder scratch

Each measurement runs in a process of its own, after its imports. Files that are in the folder already are used again.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

import pal.audio
from pal.data.manifest import Manifest, Record, Turn, write_manifest
from pal.data.record_index import RowGroups
from pal.data.sharding import shard
from pal.train.recipe import BatchSize
from pal.train.sampler import Pool, Sampler

RATE = 16_000
QUESTIONS = 3
"""Records about one clip, as in OpenAQA."""


def status(name: str) -> float:
    """A size from this process's status, in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def apart(work: Callable[..., None], *arguments: Any) -> None:
    """Run in a new process."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(process.exitcode)


def write_records(path: Path, count: int) -> None:
    """A manifest of so many records in OpenAQA's form, with answers of its mean length."""
    if path.exists():
        return
    chance = random.Random(0)
    words = ["sound", "dog", "barking", "loud", "distant", "engine", "voice", "music", "the", "of", "with", "suggests"]
    with path.open("w", encoding="utf-8") as file:
        for at in range(count):
            record = {
                "instruction": f"What can be inferred from the audio clip, part {at % 17}?",
                "input": "",
                "audio_id": f"audio/{at // QUESTIONS:08d}.flac",
                "dataset": ("as_strong_train", "audiocaps", "freesound", "vggsound")[at % 4],
                "task": ("open_ended", "cla_label", "temporal")[at % 3],
                "output": " ".join(chance.choices(words, k=25)),
            }
            file.write(json.dumps(record) + "\n")


def open_manifest(path: Path, reads: int) -> None:
    """Time and memory of opening, reading and sampling."""
    before, peak = status("VmRSS"), status("VmHWM")
    began = time.perf_counter()
    manifest = Manifest(path)
    opened = time.perf_counter() - began
    print(f"opened: {len(manifest)} records in {opened:.2f} s, {status('VmRSS') - before:.0f} MiB more resident")
    chance = random.Random(1)
    rows = [chance.randrange(len(manifest)) for _ in range(reads)]
    seconds = []
    for row in rows:
        began = time.perf_counter()
        manifest[row]
        seconds.append(time.perf_counter() - began)
    print(
        f"{reads} random records: median {1000 * np.median(seconds):.3f} ms, 99 % below "
        f"{1000 * np.quantile(seconds, 0.99):.3f} ms"
    )
    for name, batch, groups in (
        ("single records", BatchSize(rows=256), RowGroups(np.arange(len(manifest), dtype=np.uint32))),
        ("records by clip", BatchSize(clips=64, rows_per_clip=2), manifest.columns.groups),
    ):
        began = time.perf_counter()
        sampler = Sampler([Pool(groups)], batch, seed=0, stage=0)
        steps = sampler.steps(1)
        first = time.perf_counter()
        drawn = [row for step in (0, steps // 2, steps - 1) for group in sampler[step] for row in group.rows]
        assert all(0 <= row < len(manifest) for row in drawn)
        print(
            f"{name}: {steps} steps of an epoch known after {first - began:.2f} s, first, middle and last batch after "
            f"{time.perf_counter() - first:.2f} s more"
        )
    print(
        f"at the end {status('VmRSS') - before:.0f} MiB more resident than after the imports, "
        f"at most {status('VmHWM') - peak:.0f}"
    )


def index_manifest(path: Path) -> None:
    """Time and memory of making the index."""
    before, began = status("VmHWM"), time.perf_counter()
    Manifest(path)
    print(f"indexed in {time.perf_counter() - began:.0f} s, at most {status('VmHWM') - before:.0f} MiB more resident")


def write_clips(folder: Path, count: int, seconds: float) -> Path:
    """A folder of FLAC files of noise, of 64 different ones, with a manifest."""
    manifest = folder / "m.jsonl"
    if not manifest.exists():
        noise, sounds = np.random.default_rng(0), []
        for _ in range(64):
            file = io.BytesIO()
            soundfile.write(file, noise.normal(0, 0.01, int(seconds * RATE)), RATE, format="FLAC")
            sounds.append(file.getvalue())
        for at in range(count):
            path = folder / "audio" / f"{at // 1000:04d}" / f"{at:06d}.flac"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(sounds[at % len(sounds)])
        paths = [str(folder / "audio" / f"{at // 1000:04d}" / f"{at:06d}.flac") for at in range(count)]
        turn = (Turn("What?", "That."),)
        write_manifest(manifest, (Record(f"r{at}", (path,), turn, "t", "d") for at, path in enumerate(paths)))
    return manifest


def read_clips(manifests: dict[str, Path], rounds: int) -> None:
    """Time of reading every clip, in random order: the bytes, and decoded."""
    clips = {name: [record.clips[0] for record in Manifest(path)] for name, path in manifests.items()}
    order = list(range(len(next(iter(clips.values())))))
    random.Random(0).shuffle(order)
    times: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds):
        for name in list(clips)[:: 1 if number % 2 else -1]:
            for what, read in (("bytes", read_bytes), ("decoded", decode)):
                some = order if what == "bytes" else order[: len(order) // 50]
                began = time.perf_counter()
                for at in some:
                    read(clips[name][at])
                times.setdefault((what, name), []).append(len(some) / (time.perf_counter() - began))
    for (what, name), found in times.items():
        print(f"{what}, {name}: {np.median(found):.0f} clips/s (rounds: {', '.join(f'{x:.0f}' for x in found)})")


def read_bytes(path: str) -> None:
    """The bytes as the decoder gets them."""
    from pal.audio.limits import Limits
    from pal.audio.reading import read

    read(path, Limits())


def decode(path: str) -> None:
    """The samples."""
    pal.audio.load(path, RATE)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["manifest", "clips"])
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder for the files")
    parser.add_argument("--records", type=int, default=5_700_000)
    parser.add_argument("--reads", type=int, default=20_000)
    parser.add_argument("--clips", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a clip")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.what == "manifest":
        path = args.folder / f"{args.records}.jsonl"
        write_records(path, args.records)
        print(f"{path.name}: {path.stat().st_size / 1e9:.2f} GB", flush=True)
        apart(index_manifest, path)
        apart(open_manifest, path, args.reads)
        return
    folder = args.folder / f"{args.clips}-clips"
    manifest = write_clips(folder, args.clips, args.seconds)
    began = time.perf_counter()
    done = shard(manifest, folder / "shards", 1 << 28)
    print(f"{done.to_text()}, after {time.perf_counter() - began:.0f} s", flush=True)
    apart(read_clips, {"folder": manifest, "shards": Path(done.manifest)}, args.rounds)


if __name__ == "__main__":
    main()
