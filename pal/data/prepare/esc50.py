"""ESC-50 and its part ESC-10: environmental sounds of 5 s in five folds (Piczak, 2015)."""

from collections.abc import Iterator
from pathlib import Path

from pal.config import StrictConfig
from pal.data import tables
from pal.data.manifest import Record, Turn
from pal.data.prepare import choose, dataset, question_for
from pal.data.tables import find_clip, first_file
from pal.types import TagSpan

QUESTIONS = (
    "What sound is this?",
    "Which sound do you hear?",
    "What do you hear in this recording?",
    "What is making this sound?",
    "Name the sound.",
)

_COLUMNS = ("filename", "fold", "category")


class ESC50Options(StrictConfig):
    """Options: clips and questions."""

    folds: str | None = None
    """Comma-separated folds, such as "1,2,3"; all by default."""
    esc10: bool = False
    """Only the ten classes under the freer licence. A folder that holds nothing else does not need it."""
    paraphrase: bool = False
    """Vary the question from clip to clip, for training."""


@dataset("esc50", ESC50Options)
def esc50(root: Path, options: ESC50Options) -> Iterator[Record]:
    """One record per clip: which sound it is, among the categories of all folds in the table."""
    table = first_file(root, ("esc50.csv", "meta/esc50.csv"), "ESC-50's main folder")
    rows = tables.rows(table, _COLUMNS, "ESC-50")
    if options.esc10:
        rows = [row for row in rows if row.get("esc10") == "True"]
    choices = tuple(sorted({_label(row) for row in rows}))
    folds = choose(options.folds, sorted({row["fold"] for row in rows}), "fold")
    for row in rows:
        if row["fold"] not in folds:
            continue
        record_id = f"esc50/{Path(row['filename']).stem}"
        label = _label(row)
        yield Record(
            id=record_id,
            clips=(str(find_clip([root / "audio"], [row["filename"]], table)),),
            turns=(Turn(question_for(record_id, QUESTIONS, options.paraphrase), label),),
            task="classification",
            dataset="esc50",
            choices=choices,
            tags=(TagSpan(label),),
        )


def _label(row: dict[str, str]) -> str:
    return row["category"].replace("_", " ")
