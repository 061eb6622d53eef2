"""MusicCaps: descriptions of music from AudioSet, 10 s a clip (Agostinelli et al., 2023)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pal.config import StrictConfig
from pal.data import tables
from pal.data.manifest import Record, Turn
from pal.data.prepare import dataset, question_for
from pal.data.tables import find_clip
from pal.errors import ManifestError

QUESTIONS = (
    "Describe this music in detail.",
    "Write a description of this piece of music.",
    "What is this music like?",
)


class MusicCapsOptions(StrictConfig):
    """Options: clips and questions."""

    split: Literal["train", "eval"] = "train"
    """`eval` are the clips of AudioSet's evaluation set, as the table says."""
    paraphrase: bool = False
    """Vary the question from clip to clip, for training."""
    missing: Literal["error", "skip"] = "error"
    """Handling of listed clips whose files are missing; some videos are no longer available."""


@dataset("musiccaps", MusicCapsOptions)
def musiccaps(root: Path, options: MusicCapsOptions) -> Iterator[Record]:
    """One record per clip, by `musiccaps-public.csv`; a clip is `YTID` or `[YTID]-[START-END]`, in `audio/` or here."""
    table = root / "musiccaps-public.csv"
    columns = ("ytid", "start_s", "end_s", "caption", "is_audioset_eval")
    for row in tables.rows(table, columns, "MusicCaps"):
        if (row["is_audioset_eval"].strip().lower() == "true") != (options.split == "eval"):
            continue
        video = row["ytid"]
        names = [f"[{video}]-[{row['start_s']}-{row['end_s']}]", video, f"{video}_{row['start_s']}"]
        try:
            clip = find_clip([root / "audio", root], names, table)
        except ManifestError:
            if options.missing == "skip":
                continue
            raise
        record_id = f"musiccaps/{video}"
        yield Record(
            id=record_id,
            clips=(str(clip),),
            turns=(Turn(question_for(record_id, QUESTIONS, options.paraphrase), row["caption"].strip()),),
            task="caption",
            dataset="musiccaps",
        )
