"""AudioCaps: captions of AudioSet's clips of 10 s (Kim et al., 2019)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pal.config import StrictConfig
from pal.data import tables
from pal.data.manifest import Record, Turn
from pal.data.prepare import dataset, question_for
from pal.data.tables import find_clip, first_file
from pal.errors import ManifestError

QUESTIONS = (
    "Describe the audio in one sentence.",
    "Write an audio caption describing the sound.",
    "What do you hear? Answer with one sentence.",
    "Summarise this recording in a sentence.",
)


class AudioCapsOptions(StrictConfig):
    """Options: clips and questions."""

    split: Literal["train", "val", "test"] = "train"
    """The table `SPLIT.csv`; in `val` and `test` a clip has several captions."""
    paraphrase: bool = False
    """Vary the question from caption to caption, for training."""
    missing: Literal["error", "skip"] = "error"
    """Handling of listed clips whose files are missing; some videos are no longer available."""


@dataset("audiocaps", AudioCapsOptions)
def audiocaps(root: Path, options: AudioCapsOptions) -> Iterator[Record]:
    """One record per caption.

    `SPLIT.csv`, in the folder or in `dataset/`, has audiocap_id, youtube_id, start_time and caption. A
    clip is `YTID_START`, `YTID`, `YYTID` or `AUDIOCAP_ID`, in `audio/`, `SPLIT/` or `audio/SPLIT/`.
    """
    table = first_file(root, (f"{options.split}.csv", f"dataset/{options.split}.csv"), "AudioCaps' folder")
    folders = [root / "audio" / options.split, root / options.split, root / "audio", root]
    for row in tables.rows(table, ("audiocap_id", "youtube_id", "start_time", "caption"), "AudioCaps"):
        video, start = row["youtube_id"], row["start_time"]
        names = [f"{video}_{start}", f"Y{video}_{start}", video, f"Y{video}", row["audiocap_id"]]
        try:
            clip = find_clip(folders, names, table)
        except ManifestError:
            if options.missing == "skip":
                continue
            raise
        record_id = f"audiocaps/{row['audiocap_id']}"
        yield Record(
            id=record_id,
            clips=(str(clip),),
            turns=(Turn(question_for(record_id, QUESTIONS, options.paraphrase), row["caption"].strip()),),
            task="caption",
            dataset="audiocaps",
        )
