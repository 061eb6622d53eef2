"""Clotho: Freesound clips of 15 to 30 s with five captions each (Drossos et al., 2020)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pal.config import StrictConfig
from pal.data import tables
from pal.data.manifest import Record, Turn
from pal.data.prepare import dataset, question_for
from pal.data.prepare.audiocaps import QUESTIONS
from pal.data.tables import find_clip


class ClothoOptions(StrictConfig):
    """Options: clips and questions."""

    split: Literal["development", "validation", "evaluation"] = "development"
    """The table `clotho_captions_SPLIT.csv` and the folder `SPLIT/`."""
    paraphrase: bool = False
    """Vary the question from caption to caption, for training."""


@dataset("clotho", ClothoOptions)
def clotho(root: Path, options: ClothoOptions) -> Iterator[Record]:
    """One record per caption, five per clip."""
    table = root / f"clotho_captions_{options.split}.csv"
    captions = tuple(f"caption_{number}" for number in range(1, 6))
    folders = [root / options.split, root / f"clotho_audio_{options.split}", root / "audio" / options.split, root]
    for row in tables.rows(table, ("file_name", *captions), "Clotho"):
        clip = str(find_clip(folders, [row["file_name"]], table))
        for number, caption in enumerate(captions, start=1):
            record_id = f"clotho/{row['file_name'].removesuffix('.wav')}#{number}"
            yield Record(
                id=record_id,
                clips=(clip,),
                turns=(Turn(question_for(record_id, QUESTIONS, options.paraphrase), row[caption].strip()),),
                task="caption",
                dataset="clotho",
            )
