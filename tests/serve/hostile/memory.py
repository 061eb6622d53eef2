"""Resident memory and CPU time of a process and its children, while something happens (Linux)."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

MEBI = 1 << 20
_EVERY = 0.05
"""Seconds between two looks."""


def descendants(pid: int) -> list[int]:
    """A process and all that came from it."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(folder.name))
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found


def resident(pid: int) -> int:
    """Bytes that a process and its children have in memory; what several of them share counts once (PSS)."""
    total = 0
    for one in descendants(pid):
        with suppress(OSError):  # it has ended
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return total


def cpu_seconds(pid: int | None) -> float:
    """That a process and its children have computed, with those children that have ended; 0 without a process."""
    ticks = 0
    for one in descendants(pid) if pid is not None else ():
        with suppress(OSError):
            # user and system time, its own and that of children it has waited for
            ticks += sum(map(int, Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


class MemoryWatch:
    """Most resident memory of a process and its children, beyond what they had at the beginning.

    with MemoryWatch(pid) as watch: ...
    watch.peak, watch.kept

    Looks twenty times a second, and asks the kernel for the process' own exact peak.

    Args:
        pid: of the process; None measures nothing.
    """

    def __init__(self, pid: int | None) -> None:
        self.pid = pid
        self.peak = 0
        """Most bytes beyond those of the beginning."""
        self.kept = 0
        """Bytes beyond those of the beginning at the end."""
        self._end = threading.Event()

    def __enter__(self) -> MemoryWatch:
        if self.pid is not None:
            with suppress(OSError):
                Path(f"/proc/{self.pid}/clear_refs").write_text("5")  # the kernel's peak begins anew
            self._before, self._own = resident(self.pid), _status(self.pid, "VmRSS")
            self._thread = threading.Thread(target=self._look, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.pid is not None:
            self._end.set()
            self._thread.join()
            self.kept = resident(self.pid) - self._before
            self.peak = max(self.peak, _status(self.pid, "VmHWM") - self._own, self.kept)

    def _look(self) -> None:
        assert self.pid is not None
        while not self._end.wait(_EVERY):
            self.peak = max(self.peak, resident(self.pid) - self._before)


def _status(pid: int, name: str) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) << 10
    return 0
