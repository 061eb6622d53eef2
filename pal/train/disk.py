"""Errors of a disk that is full or cannot be written, in one line."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from pal.errors import TrainingError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


@contextmanager
def naming_disk_faults(folder: Path) -> Iterator[None]:
    """Raise TrainingError with the remedy where writing into a run's folder fails in the block."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _errno(error)
        if number in _FULL:
            raise TrainingError(
                f"{folder}: {os.strerror(number)} ({_free(folder)} free). Checkpoints written before are unchanged: "
                "make room, and continue with --resume"
            ) from None
        if number in _REFUSED:
            place = getattr(error, "filename", None) or folder
            raise TrainingError(
                f"{place}: {os.strerror(number)}. Checkpoints written before are unchanged: make {folder} writable, "
                "and continue with --resume"
            ) from None
        raise


def _errno(error: OSError | SafetensorError) -> int:
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"os error (\d+)", str(error))  # from Rust's own message
    return int(found[1]) if found else 0


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB"
    except OSError:
        return "unknown"
