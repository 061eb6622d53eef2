"""Coverage-guided fuzzing of the decoder path: bytes that reach new lines of `pal/audio/` are kept and changed further.

    pip install atheris
    python -m tests.audio.fuzz_guided FOLDER [--minutes 20]

Every input must give finite samples within the limits, or an AudioError of one line. FOLDER keeps the inputs that reached
something new (`corpus/`, with which the next run goes on), and those that broke the promise (`findings/`). The fuzzer runs
in a process of its own, so that a decoder that crashes is counted and the rest of the time is used. Status 1 where
anything was found.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

from tests.audio.fuzz import seeds

SECONDS = 20
"""For one input."""
MEMORY = 4096
"""MiB of the fuzzer's process."""
LARGEST = 60_000
"""Bytes of a seed; small ones are changed faster."""
_COUNTS = 50


def _child(folder: Path, seconds: int, seed: int) -> None:
    import atheris

    with atheris.instrument_imports(include=["pal.audio"], enable_loader_override=False):
        from pal.audio import Limits, load

    from pal.errors import AudioError

    limits = Limits(max_seconds=30, max_bytes=1 << 20)
    counts = {"inputs": 0, "samples": 0, "refused": 0}

    def one(data: bytes) -> None:
        counts["inputs"] += 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                wave = load(data, 16_000, limits, read_to_end=counts["inputs"] % 4 == 0)
            if not (len(wave.samples_N) and wave.samples_N.isfinite().all() and 0 < wave.seconds <= 30):
                raise ValueError(f"{len(wave.samples_N)} samples of {wave.seconds} s")
            counts["samples"] += 1
        except AudioError as error:
            counts["refused"] += 1
            if not (str(error).isprintable() and len(str(error)) <= 300):
                _keep(folder, data, f"a message of {len(str(error))} characters: {error!r}")
        except Exception:
            _keep(folder, data, traceback.format_exc(limit=-2))
        if counts["inputs"] % _COUNTS == 0:
            (folder / f"counts-{seed}.json").write_text(json.dumps(counts))

    options = [f"-max_total_time={seconds}", f"-timeout={SECONDS}", f"-rss_limit_mb={MEMORY}", f"-seed={seed}"]
    options += [f"-artifact_prefix={folder}/findings/", "-max_len=200000", "-print_final_stats=1"]
    atheris.Setup(["fuzz", *options, str(folder / "corpus")], one)
    atheris.Fuzz()


def _keep(folder: Path, data: bytes, said: str) -> None:
    """Keep an input that broke the promise; one for each place in the code."""
    name = hashlib.sha256(said.encode()).hexdigest()[:12]
    (folder / "findings" / name).write_bytes(data)
    (folder / "findings" / f"{name}.txt").write_text(said)


def run(folder: Path, seconds: float) -> tuple[dict[str, int], list[str]]:
    """Fuzz for so long; what was counted, and the names of the files in `findings/`."""
    for name in ("corpus", "findings"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for old in folder.glob("counts-*.json"):
        old.unlink()
    for name, data in seeds(None):
        if len(data) <= LARGEST:
            (folder / "corpus" / name).write_bytes(data)
    began, seed = time.monotonic(), 1
    while (left := seconds - (time.monotonic() - began)) > 1:
        command = [sys.executable, "-m", "tests.audio.fuzz_guided", str(folder), "--child", str(seed)]
        with (folder / f"log-{seed}.txt").open("w") as log:
            subprocess.run([*command, "--seconds", str(int(left))], stdout=log, stderr=log, check=False)
        seed += 1
    total: dict[str, int] = {"processes": seed - 1}
    for path in folder.glob("counts-*.json"):
        for name, count in json.loads(path.read_text()).items():
            total[name] = total.get(name, 0) + count
    return total, sorted(path.name for path in (folder / "findings").iterdir())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.audio.fuzz_guided", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child is not None:
        _child(asked.folder, asked.seconds, asked.child)
        return 0
    counts, findings = run(asked.folder, 60 * asked.minutes)
    print(json.dumps(counts), *findings, f"{len(findings)} findings", sep="\n")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
