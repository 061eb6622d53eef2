"""Mutated bytes of every container through `load` and `seconds`: a result or one line, in bounded time and memory.

    python -m tests.audio.fuzz [COUNT] [--seed N] [--folder FOLDER]

The files to mutate are those of a folder, or else of `tests/audio/corpus/files` and what soundfile writes. Mutants run in
a process of their own, so that a decoder that crashes is counted like an exception. Status 1 where one did.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import soundfile

from tests.audio.corpus.generate import sound

FILES = Path(__file__).parent / "corpus" / "files"
SECONDS = 20.0
"""For one mutant, on a machine that does other things too."""
MEMORY = 1 << 20
"""KiB that mutants may take beyond what the first took; a clip may hold an hour of sound."""
_EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_LENGTH = 300


def mutate(data: bytes, chance: random.Random) -> bytes:
    """One to four changes: bits, bytes, cuts, insertions, repeated and missing ranges, extreme numbers in the header."""
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        data = _changed(data, chance) or data
    return data


def _changed(data: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(data)) if chance.random() < 0.5 else chance.randrange(min(200, len(data)))
    end = min(len(data), start + chance.choice((1, 2, 4, 8, 100, 4096)))
    how = chance.randrange(8)
    if how == 0:
        return data[:start] + bytes([data[start] ^ 1 << chance.randrange(8)]) + data[start + 1 :]
    if how == 1:
        return data[:start] + chance.randbytes(end - start) + data[end:]
    if how == 2:
        return data[:start]
    if how == 3:
        return data[:start] + chance.randbytes(end - start) + data[start:]
    if how == 4:
        return data[:end] + data[start:]
    if how == 5:
        return data[:start] + data[end:]
    width = chance.choice((1, 2, 4, 8))
    value = chance.choice((*_EXTREMES, len(data), 2 * len(data), len(data) - 8)) % (1 << 8 * width)
    place = chance.randrange(min(200, len(data))) & ~(how % 2)
    return data[:place] + value.to_bytes(width, chance.choice(("big", "little"))) + data[place + width :]


def seeds(folder: Path | None) -> list[tuple[str, bytes]]:
    """(name, bytes) of the files to mutate, in the order of their names."""
    if folder is not None:
        files = [path for path in sorted(folder.iterdir()) if path.stat().st_size < 200_000]
        return [(path.name, path.read_bytes()) for path in files]
    found = [(path.name, path.read_bytes()) for path in sorted(FILES.iterdir())] if FILES.exists() else []
    for format in soundfile.available_formats():
        for subtype in soundfile.available_subtypes(format) if format not in ("RAW", "SD2") else ():
            file = io.BytesIO()
            try:
                soundfile.write(file, sound(8_000, 1, 0.2), 8_000, subtype, format=format)
            except (soundfile.SoundFileError, TypeError):
                continue
            found.append((f"{format}_{subtype}", file.getvalue()))
    return found


def mutant(number: int, seed: int, files: list[tuple[str, bytes]]) -> tuple[str, bytes]:
    """The mutant of a number: always the same for the same files."""
    chance = random.Random(seed * 1_000_003 + number)
    name, data = files[number % len(files)]
    return name, mutate(data, chance)


def run(count: int, seed: int = 0, folder: Path | None = None) -> list[str]:
    """One line for each of `count` mutants that broke a promise."""
    faults: list[str] = []
    start = 0
    command = [sys.executable, "-m", "tests.audio.fuzz", str(count), "--seed", str(seed)]
    command += [] if folder is None else ["--folder", str(folder)]
    while start < count:
        done = subprocess.run([*command, "--child", str(start)], capture_output=True, text=True, check=False)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        faults += [line["fault"] for line in lines if "fault" in line]
        if done.returncode == 0:
            break
        started = max((line["number"] for line in lines if "number" in line), default=start)
        faults.append(f"mutant {started}: the process ended with status {done.returncode}: {done.stderr[-500:]}")
        start = started + 1
    return faults


def _child(start: int, count: int, seed: int, folder: Path | None) -> None:
    from pal.audio import load, seconds
    from pal.errors import AudioError

    if "PAL_FUZZ_BREAK" in os.environ:  # to see that a fault is found
        load = seconds = lambda *_, **__: 1 // 0
    files = seeds(folder)
    memory = 0
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "mutant"
        for number in range(start, count):
            name, data = mutant(number, seed, files)
            print(json.dumps({"number": number}), flush=True)
            path.write_bytes(data)
            began = time.perf_counter()
            fault = ""
            for call in (
                lambda to_end=number % 2 == 1: load(path, 16_000, read_to_end=to_end),
                lambda to_end=number % 2 == 1: seconds(path, read_to_end=to_end),
            ):
                try:
                    call()
                except AudioError as error:
                    line = str(error)
                    if not (line.isprintable() and len(line) <= _LENGTH and "; " in line):
                        fault = f"a line of {len(line)} characters: {line!r}"
                except Exception:
                    fault = traceback.format_exc(limit=-2).replace("\n", " | ")
            if (took := time.perf_counter() - began) > SECONDS:
                fault = f"took {took:.0f} s"
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            memory = memory or peak
            if peak > memory + MEMORY:
                fault, memory = f"took {(peak - memory) >> 10} MiB", peak
            if fault:
                print(json.dumps({"fault": f"mutant {number} of {name}: {fault}"}), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.audio.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int, nargs="?", default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="mutate the files of this folder")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child is not None:
        _child(asked.child, asked.count, asked.seed, asked.folder)
        return 0
    faults = run(asked.count, asked.seed, asked.folder)
    print(*faults, f"{asked.count} mutants, {len(faults)} faults", sep="\n")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
