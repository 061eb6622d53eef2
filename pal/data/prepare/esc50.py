"""ESC-50 and its part ESC-10: environmental sounds of 5 s in five folds (Piczak, 2015)."""

import csv
from collections.abc import Iterator
from pathlib import Path

from pal.config import StrictConfig
from pal.data.manifest import Record, Turn
from pal.data.prepare import choose, dataset, question_for
from pal.errors import ManifestError
from pal.types import TagSpan

QUESTIONS = (
    "What sound is this?",
    "Which sound do you hear?",
    "What do you hear in this recording?",
    "What is making this sound?",
    "Name the sound.",
)

_COLUMNS = ("filename", "fold", "category")
_SUFFIXES = (".wav", ".ogg", ".flac")


class Options(StrictConfig):
    """Which clips, and how they are asked about."""

    folds: str | None = None
    """Comma-separated folds, such as "1,2,3"; all by default."""
    esc10: bool = False
    """Only the ten classes under the freer licence. A folder that holds nothing else does not need it."""
    paraphrase: bool = False
    """Vary the question from clip to clip, for training."""


@dataset("esc50", Options)
def esc50(root: Path, options: Options) -> Iterator[Record]:
    """One record a clip: what sound it is, out of the categories of the table (all folds')."""
    table = next((path for path in (root / "esc50.csv", root / "meta" / "esc50.csv") if path.is_file()), None)
    if table is None:
        raise ManifestError(f"{root}: neither esc50.csv nor meta/esc50.csv is there; give ESC-50's main folder")
    rows = _rows(table)
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
            clips=(str(_clip(root / "audio", row["filename"], table)),),
            turns=(Turn(question_for(record_id, QUESTIONS, options.paraphrase), label),),
            task="classification",
            dataset="esc50",
            choices=choices,
            tags=(TagSpan(label),),
        )


def _rows(table: Path) -> list[dict[str, str]]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                raise ManifestError(f"{table}: no column '{missing[0]}'; ESC-50's has {', '.join(_COLUMNS)}")
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"{table}: not a CSV table: {error}") from error
    for number, row in enumerate(rows, start=2):
        if not all(row[column] for column in _COLUMNS):
            raise ManifestError(f"{table}, line {number}: a column is empty")
    return rows


def _label(row: dict[str, str]) -> str:
    return row["category"].replace("_", " ")


def _clip(folder: Path, name: str, table: Path) -> Path:
    """The file of the table, or the same clip in another format."""
    path = folder / name
    for candidate in (path, *(path.with_suffix(suffix) for suffix in _SUFFIXES)):
        if candidate.is_file():
            return candidate
    raise ManifestError(f"{path}: missing, but {table.name} lists it; unpack the data set again")
