"""Errors of a disk that is full or cannot be written, in one line."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pal.errors import TrainingError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


@contextmanager
def naming_disk_faults(folder: Path) -> Iterator[None]:
    """Raise TrainingError with the remedy where writing into a run's folder fails in the block."""
    try:
        yield
    except Exception as error:  # safetensors and tokenizers have errors of their own
        number = _errno(error)
        name = getattr(error, "filename", None)
        place = folder if name is None else Path(os.fsdecode(name))
        if not place.is_absolute() and not place.is_relative_to(folder):
            place = folder / place  # shutil.rmtree names what is in a folder without the folder
        remedy = "continue with --resume; checkpoints written before are unchanged"
        if number in _FULL:
            fault = f"{os.strerror(number)} ({_free(place)} free)"
            raise TrainingError(f"{place}: {fault}. Make room, and {remedy}") from None
        if number in _REFUSED and place.absolute().is_relative_to(folder.absolute()):
            raise TrainingError(f"{place}: {os.strerror(number)}. Make {folder} writable, and {remedy}") from None
        raise


def _errno(error: Exception) -> int:
    """Number of the system's error, also from the message of a library in Rust; 0 if there is none."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0


def _free(place: Path) -> str:
    while not place.exists() and place != place.parent:
        place = place.parent
    return f"{shutil.disk_usage(place).free / 1e6:,.1f} MB"
