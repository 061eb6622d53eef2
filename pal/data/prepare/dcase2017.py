"""DCASE 2017 task 4: warning and vehicle sounds in clips of 10 s, several at once (Mesaros et al., 2017)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pal.config import StrictConfig
from pal.data import tables
from pal.data.manifest import Record, Turn
from pal.data.prepare import dataset, question_for
from pal.data.tables import find_clip, first_file
from pal.errors import ManifestError
from pal.types import TagSpan

LABELS = (
    *("Train horn", "Air horn, truck horn", "Car alarm", "Reversing beeps", "Ambulance (siren)"),
    *("Police car (siren)", "Fire engine, fire truck (siren)", "Civil defense siren", "Screaming", "Bicycle"),
    *("Skateboard", "Car", "Car passing by", "Bus", "Truck", "Motorcycle", "Train"),
)
"""The 17 classes, in the challenge's order."""

QUESTIONS = (
    "Which warning or vehicle sounds are in this recording?",
    "What warning or vehicle sounds do you hear?",
    "Name the warning and vehicle sounds of this clip.",
)

_FOLDED = {label.lower().replace(",", ""): label for label in LABELS}


class DCASE2017Options(StrictConfig):
    """Options: clips and questions."""

    split: Literal["training", "testing", "evaluation"] = "training"
    """Split of the challenge."""
    paraphrase: bool = False
    """Vary the question from clip to clip, for training."""


@dataset("dcase2017", DCASE2017Options)
def dcase2017(root: Path, options: DCASE2017Options) -> Iterator[Record]:
    """One record per clip: its labels, joined by "; " in the order of `LABELS`, with their times in strong labels.

    The table is `groundtruth_{strong,weak}_label_SPLIT_set.csv`, in the folder or in `metadata/`: tab
    lines of file, start, end and label without a heading. The audio lies in `SPLIT/` or `audio/SPLIT/`.
    """
    kinds = [f"groundtruth_{kind}_label_{options.split}_set.csv" for kind in ("strong", "weak")]
    places = [f"{folder}{name}" for name in kinds for folder in ("", "metadata/", "groundtruth_release/")]
    table = first_file(root, places, "the folder with the ground truth of DCASE 2017 task 4")
    columns = ("file", "start", "end", "label")
    strong = "strong" in table.name
    sounds: dict[str, list[TagSpan]] = {}
    for number, row in enumerate(
        tables.rows(table, columns, "DCASE 2017 task 4", header=False, delimiter="\t", optional=True), start=1
    ):
        label = _FOLDED.get(row["label"].strip().lower().replace(",", ""))
        if label is None:
            raise ManifestError(f"{table}, line {number}: '{row['label']}' is none of the 17 classes")
        try:
            # weak labels are of the whole clip; the times beside them are the clip's position in its video
            span = TagSpan(label, float(row["start"]), float(row["end"])) if strong else TagSpan(label)
        except ValueError:
            raise ManifestError(f"{table}, line {number}: start and end must be seconds") from None
        sounds.setdefault(row["file"], []).append(span)
    folders = [root / options.split, root / "audio" / options.split, root / "audio", root]
    for file, spans in sounds.items():
        record_id = f"dcase2017/{Path(file).stem if file.endswith('.wav') else file}"
        held = {span.label for span in spans}
        yield Record(
            id=record_id,
            clips=(str(find_clip(folders, [file, f"Y{file}"], table)),),
            turns=(
                Turn(
                    question_for(record_id, QUESTIONS, options.paraphrase),
                    "; ".join(label for label in LABELS if label in held),
                ),
            ),
            task="tagging",
            dataset="dcase2017",
            tags=tuple(spans),
        )
