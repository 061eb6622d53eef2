"""How often a test repeats what may go wrong by chance: a few times in `make test`, in full behind `make torture`."""

from __future__ import annotations

import os

import pytest

FULL = os.environ.get("PAL_TORTURE") == "1"
"""True behind `make torture`."""


def repeats(full: int, reduced: int) -> int:
    """Number of repetitions: `full` behind `make torture`, else `reduced`."""
    return full if FULL else reduced


full_only = pytest.mark.skipif(not FULL, reason="takes long; `make torture` runs it")
"""Mark of a test that only `make torture` runs, beside the mark `torture`."""
