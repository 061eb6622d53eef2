"""Memory of the process: its peak, and what the C library (glibc) keeps of what was freed."""

import ctypes
import gc
import os
import sys
from pathlib import Path

import torch


def peak_memory(device: torch.device) -> int | None:
    """Bytes at the peak so far: allocated on a CUDA device, else resident in the process; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory, for the life of the process; returns whether that is possible (glibc).

    By default it gives large blocks back to the system at once, and the next step must have every page made again. On
    some machines that takes longer than the step itself. `give_back_freed_memory` does it at a time of one's choice.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    # from malloc.h: M_MMAP_MAX, number of blocks outside of the heap; M_TRIM_THRESHOLD, where -1 is never
    return bool(mallopt(-4, 0)) and bool(mallopt(-1, -1))


def give_back_freed_memory(collect: bool = True) -> None:
    """Give freed memory back to the system, before it is too fragmented to be of use (glibc).

    Args:
        collect: whether to look for garbage in cycles before, which holds all threads for some tenths of a second.
    """
    if collect:
        gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return


def resident_memory() -> int | None:
    """Bytes of the process that are in memory now; None where unknown (Linux only)."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


class FreedMemory:
    """Gives freed memory back between steps, once the process has grown by half.

    Steps of many lengths free blocks of many sizes, and what lies between the used ones fits none that comes later. So
    a process grows for hours, while it uses no more (docs/experiments.md).

    Args:
        steps: fewest steps between two times, since the step after one takes longer.
    """

    GROWTH = 1.5

    def __init__(self, steps: int = 50) -> None:
        self._steps = steps
        self._since = 0
        self._usual = 0
        """Most bytes after a step that followed the start or a giving back."""

    def check(self) -> bool:
        """To be called after each step; True if memory was given back."""
        now = resident_memory()
        if now is None:
            return False
        self._since += 1
        if self._since == 1:
            self._usual = max(self._usual, now)
        if self._since < self._steps or now < self.GROWTH * self._usual:
            return False
        give_back_freed_memory()
        self._since = 0
        return True
