"""Real recordings that the curriculum uses: ESC-10's clips and FSDD's digits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from pal.audio import load, seconds
from pal.data import tables
from pal.data.curriculum.effects import Samples
from pal.data.curriculum.questions import Rng
from pal.data.manifest import Record
from pal.data.prepare import read as records_of
from pal.data.synth.waves import RATE


@dataclass(frozen=True)
class Recording:
    """An audio file with its label; `speaker` is "" for environmental sounds."""

    path: Path
    label: str
    speaker: str = ""


def esc10(root: Path, folds: tuple[str, ...]) -> tuple[list[Recording], list[Record]]:
    """Clips of some folds of ESC-10, and the records that `pal data prepare esc50` makes of them.

    Of a folder with all of ESC-50, only the ten classes of ESC-10 are taken.
    """
    table = tables.first_file(root, ("esc50.csv", "meta/esc50.csv"), "ESC-50's main folder")
    rows = tables.rows(table, ("filename",), "ESC-50")
    records = records_of("esc50", root, folds=",".join(folds), esc10="esc10" in rows[0])
    return [Recording(Path(record.clips[0]), record.turns[0].answer) for record in records], records


def fsdd(root: Path, **speakers: str) -> tuple[list[Recording], list[Record]]:
    """Digits of some speakers, and the records that `pal data prepare fsdd` makes of them.

    Args:
        root: folder of the data set.
        speakers: the reader's options `speakers` or `exclude`.
    """
    records = records_of("fsdd", root, **speakers)
    found = []
    for record in records:
        path = Path(record.clips[0])
        found.append(Recording(path, record.turns[0].answer, path.stem.split("_")[1]))
    return found, records


def by_turns(recordings: list[Recording], rng: Rng) -> list[Recording]:
    """The recordings in random order, but with the labels by turns, so that any beginning is balanced."""
    shuffled = [recordings[at] for at in rng.permutation(len(recordings))]
    labels = sorted({one.label for one in recordings})
    stacks = {label: [one for one in shuffled if one.label == label] for label in labels}
    out = []
    while any(stacks.values()):
        out += [stacks[label].pop() for label in labels if stacks[label]]
    return out


def lengths(recordings: list[Recording]) -> dict[Path, float]:
    """Length of each recording in seconds."""
    return {one.path: seconds(one.path) for one in recordings}


@lru_cache(maxsize=512)
def read(path: str) -> Samples:
    """Samples of a file [N] at 16 kHz, mono; do not change them."""
    x_N = load(path, RATE).samples_N.numpy()
    x_N.setflags(write=False)
    return np.asarray(x_N, np.float32)
