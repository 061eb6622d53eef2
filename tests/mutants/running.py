"""What tests make of mutants: each in a copy of the project, and in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from tqdm import tqdm

from tests.mutants.mutants import ROOT, Mutant

_SECONDS = 600
"""A test that takes longer noticed something: it waits for ever."""
_FAILED, _PASSED = 1, 0
"""pytest's status where tests ran; others mean that they did not even start."""
_PROCESSES = multiprocessing.get_context("forkserver")


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


def preload() -> None:
    """Have what takes most of a test's time to import there before its process is made."""
    os.environ["OMP_NUM_THREADS"] = "1"  # which torch reads when it is imported
    _PROCESSES.set_forkserver_preload(["numpy", "peft", "scipy", "sklearn", "torch", "transformers", "hypothesis"])


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
    process = _PROCESSES.Process(target=_pytest, args=(test, str(copy)))
    process.start()
    process.join(_SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join()
        return None
    # a signal ends a test as a failure does
    return _FAILED if process.exitcode < 0 else process.exitcode


def _pytest(test: str, copy: str) -> None:
    """In a process of its own: the copy's tests on the copy's package, which this process must not have loaded yet."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("pal", "tests")]:
        del sys.modules[name]
    os.chdir(copy)
    os.environ |= {"PYTHONPATH": copy, "PYTHONDONTWRITEBYTECODE": "1"}
    sys.path[:] = [copy, *(place for place in sys.path if Path(place or ".").resolve() not in (ROOT, Path(copy)))]
    # bytecode is told by time and size, which a change of one character within a second may leave equal
    sys.dont_write_bytecode = True
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        sys.exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", test])))
