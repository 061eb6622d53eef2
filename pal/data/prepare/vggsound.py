"""VGGSound: ten seconds of videos whose sound source is visible, 309 classes (Chen et al., 2020)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pal.config import StrictConfig
from pal.data import tables
from pal.data.manifest import Record, Turn
from pal.data.prepare import dataset, question_for
from pal.data.prepare.esc50 import QUESTIONS
from pal.data.tables import find_clip
from pal.errors import ManifestError
from pal.types import TagSpan


class VGGSoundOptions(StrictConfig):
    """Options: clips and questions."""

    split: Literal["train", "test"] = "train"
    """Split in the table."""
    choices: bool = False
    """Put the 309 labels into every record, for likelihood ranking."""
    paraphrase: bool = False
    """Vary the question from clip to clip, for training."""
    missing: Literal["error", "skip"] = "error"
    """Handling of listed clips whose files are missing; many videos are no longer available."""


@dataset("vggsound", VGGSoundOptions)
def vggsound(root: Path, options: VGGSoundOptions) -> Iterator[Record]:
    """One record per clip: its label.

    `vggsound.csv` holds ytid, start, label, split without a heading. A clip is `YTID_000012`, `YTID_12`
    or `YTID`, in the folder, in `audio/` or in the split's folder.
    """
    table = root / "vggsound.csv"
    rows = tables.rows(table, ("ytid", "start", "label", "split"), "VGGSound", header=False)
    labels = tuple(sorted({row["label"] for row in rows}))
    folders = [root / "audio", root / options.split, root / "audio" / options.split, root]
    for number, row in enumerate(rows, start=1):
        if row["split"] != options.split:
            continue
        try:
            start = int(float(row["start"]))
        except ValueError:
            raise ManifestError(f"{table}, line {number}: the start must be seconds") from None
        name = f"{row['ytid']}_{start:06d}"
        try:
            clip = find_clip(folders, [name, f"{row['ytid']}_{start}", row["ytid"]], table)
        except ManifestError:
            if options.missing == "skip":
                continue
            raise
        record_id = f"vggsound/{name}"
        yield Record(
            id=record_id,
            clips=(str(clip),),
            turns=(Turn(question_for(record_id, QUESTIONS, options.paraphrase), row["label"]),),
            task="classification",
            dataset="vggsound",
            choices=labels if options.choices else None,
            tags=(TagSpan(row["label"]),),
        )
