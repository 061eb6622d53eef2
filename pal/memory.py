"""Memory of the process: its peak, and whether the C library (glibc) keeps what was freed."""

import ctypes
import gc
import sys

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


def give_back_freed_memory() -> None:
    """Give freed memory back to the system, before it is too fragmented to be of use (glibc)."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return
