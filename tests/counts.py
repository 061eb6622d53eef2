"""How often a test repeats what may go wrong by chance: a few times in `make test`, in full behind `make torture`."""

from __future__ import annotations

import os

FULL = os.environ.get("PAL_TORTURE") == "1"
"""True behind `make torture`."""


def repeats(full: int, reduced: int) -> int:
    """Number of repetitions: `full` behind `make torture`, else `reduced`."""
    return full if FULL else reduced
