"""Makes each deliberate mistake of the lists in a copy of the project and runs the test that must notice it.

    python -m tests.mutants [WORD ...] [--json FILE] [--jobs N]

Words choose mutants whose change or file contains one of them. Status 1 where a mistake goes unnoticed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tqdm import tqdm

from tests.mutants.mutants import ROOT, Mutant, load

_SECONDS = 600
"""A test that takes longer noticed something: it waits for ever."""
_FAILED, _PASSED = 1, 0
"""pytest's status where tests ran; others mean that they did not even start."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only mutants whose change or file contains one of them")
    parser.add_argument("--json", type=Path, help="also write the outcomes to this file")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="tests at a time")
    asked = parser.parse_args()
    chosen = [m for m in load() if not asked.words or any(word in f"{m.change} {m.file}" for word in asked.words)]
    if not chosen:
        print("no mutant has these words", file=sys.stderr)
        return 2
    start = time.perf_counter()
    outcomes = run(chosen, asked.jobs)
    width = max(len(m.change) for m in chosen)
    for mutant, outcome in zip(chosen, outcomes, strict=True):
        print(f"{mutant.change:<{width}}  {outcome:<9}  {mutant.noticed_by}")
    noticed = sum(outcome == "noticed" for outcome in outcomes)
    print(f"{noticed} of {len(chosen)} mistakes noticed, in {time.perf_counter() - start:.0f} s")
    if asked.json:
        rows = [{**asdict(m), "outcome": outcome} for m, outcome in zip(chosen, outcomes, strict=True)]
        asked.json.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    return 0 if noticed == len(chosen) else 1


def run(mutants: list[Mutant], jobs: int = 1, root: Path = ROOT) -> list[str]:
    """What came of each mistake: "noticed", "UNNOTICED", or why that cannot be said."""
    with tempfile.TemporaryDirectory() as scratch:
        copies: SimpleQueue[Path] = SimpleQueue()
        for job in range(jobs):
            copies.put(_copy(root, Path(scratch) / str(job)))
        with ThreadPoolExecutor(jobs) as threads:
            tests = sorted({m.noticed_by for m in mutants})
            untouched = _each(threads, lambda test: _untouched(test, copies), tests, "as it is")
            passes = dict(zip(tests, untouched, strict=True))
            return _each(threads, lambda m: _outcome(m, copies, passes[m.noticed_by]), mutants, "mutants")


def _each(threads: ThreadPoolExecutor, do: Callable[[Any], Any], items: list[Any], what: str) -> list[Any]:
    return list(tqdm(threads.map(do, items), what, total=len(items), file=sys.stderr))


def _copy(root: Path, folder: Path) -> Path:
    """The files that git knows or does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        check=True,
        capture_output=True,
    ).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, folder / name)
    return folder


def _untouched(test: str, copies: SimpleQueue[Path]) -> bool:
    """Whether the test passes without a mistake."""
    copy = copies.get()
    try:
        return _run(test, copy) == _PASSED
    finally:
        copies.put(copy)


def _outcome(mutant: Mutant, copies: SimpleQueue[Path], passing: bool) -> str:
    if not passing:
        return "test fails without it"
    copy = copies.get()
    before = mutant.apply(copy)
    try:
        status = _run(mutant.noticed_by, copy)
    finally:
        (copy / mutant.file).write_text(before, encoding="utf-8")
        copies.put(copy)
    if status in (_FAILED, None):
        return "noticed"
    return "UNNOTICED" if status == _PASSED else "no test ran"


def _run(test: str, copy: Path) -> int | None:
    """pytest's status; None where it had to be stopped."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", test]
    # bytecode is told by time and size, which a change of one character within a second may leave equal
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    try:
        return subprocess.run(
            command, cwd=copy, env=environment, timeout=_SECONDS, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ).returncode
    except subprocess.TimeoutExpired:
        return None


if __name__ == "__main__":
    sys.exit(main())
