"""Short names of runs and models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Short distinct names of paths, without the leading and trailing parts that all share; one path: its last part."""
    parts = [list(path.parts) for path in paths]
    if len(parts) == 1:
        return [paths[0].name]
    if not parts:
        return []
    while min(map(len, parts)) > 1 and len({one[-1] for one in parts}) == 1:
        parts = [one[:-1] for one in parts]
    while min(map(len, parts)) > 1 and len({one[0] for one in parts}) == 1:
        parts = [one[1:] for one in parts]
    return ["/".join(one) for one in parts]
