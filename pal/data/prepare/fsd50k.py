"""FSD50K: Freesound clips with labels of AudioSet's ontology, several per clip (Fonseca et al., 2022)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pal.config import StrictConfig
from pal.data import tables
from pal.data.manifest import Record, Turn
from pal.data.prepare import dataset, question_for
from pal.data.tables import find_clip
from pal.errors import ManifestError
from pal.types import TagSpan

QUESTIONS = (
    "Which sounds are in this recording?",
    "What sounds do you hear?",
    "Name the sounds of this clip.",
)


class FSD50KOptions(StrictConfig):
    """Options: clips and questions."""

    split: Literal["train", "val", "eval"] = "train"
    """`train` and `val` are the two parts of the development set."""
    paraphrase: bool = False
    """Vary the question from clip to clip, for training."""


def vocabulary(root: Path) -> tuple[str, ...]:
    """The 200 labels in the order of `vocabulary.csv` (index, label, mid, without a heading), as words."""
    table = _tables(root) / "vocabulary.csv"
    return tuple(_words(row["label"]) for row in tables.rows(table, ("index", "label", "mid"), "FSD50K", header=False))


@dataset("fsd50k", FSD50KOptions)
def fsd50k(root: Path, options: FSD50KOptions) -> Iterator[Record]:
    """One record per clip: its labels joined by "; ", in the table's order.

    `FSD50K.ground_truth/` holds the tables, `FSD50K.dev_audio/` and `FSD50K.eval_audio/` the clips.
    """
    part = "eval" if options.split == "eval" else "dev"
    table = _tables(root) / f"{part}.csv"
    known = set(vocabulary(root))
    columns = ("fname", "labels", "split") if part == "dev" else ("fname", "labels")
    folders = [root / f"FSD50K.{part}_audio", root / f"{part}_audio", root]
    for number, row in enumerate(tables.rows(table, columns, "FSD50K"), start=2):
        if part == "dev" and row["split"] != options.split:
            continue
        labels = [_words(label) for label in row["labels"].split(",")]
        strange = [label for label in labels if label not in known]
        if strange:
            raise ManifestError(f"{table}, line {number}: '{strange[0]}' is not in vocabulary.csv")
        record_id = f"fsd50k/{row['fname']}"
        yield Record(
            id=record_id,
            clips=(str(find_clip(folders, [row["fname"]], table)),),
            turns=(Turn(question_for(record_id, QUESTIONS, options.paraphrase), "; ".join(labels)),),
            task="tagging",
            dataset="fsd50k",
            tags=tuple(TagSpan(label) for label in labels),
        )


def _tables(root: Path) -> Path:
    inside = root / "FSD50K.ground_truth"
    return inside if inside.is_dir() else root


def _words(label: str) -> str:
    # "Crash_cymbal", "Male_speech_and_man_speaking"
    return label.replace("_", " ")
