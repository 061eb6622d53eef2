"""What the readers of published data sets share: tables, and the clips that they name."""

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pal.errors import ManifestError

SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".au", ".webm")
"""Formats that a clip is looked for in, where a table names it in another one or in none."""


def rows(
    table: Path,
    columns: Sequence[str],
    whose: str,
    *,
    header: bool = True,
    delimiter: str = ",",
    optional: bool = False,
) -> list[dict[str, str]]:
    """The lines of a table.

    Args:
        table: CSV, UTF-8.
        columns: that must be there; without a header, what the columns are called, in order.
        whose: the data set, for messages.
        header: whether the first line names the columns.
        delimiter: between the columns.
        optional: cells of `columns` may be empty.

    Raises:
        ManifestError: no such file, not a table, a column is missing or, unless `optional`, empty.
    """
    if not table.is_file():
        raise ManifestError(f"{table}: missing; give the folder of {whose} as it was unpacked")
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, None if header else list(columns), delimiter=delimiter)
            missing = [column for column in columns if column not in (reader.fieldnames or ())]
            if missing:
                raise ManifestError(f"{table}: no column '{missing[0]}'; {whose}'s has {', '.join(columns)}")
            found = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"{table}: not a CSV table: {error}") from error
    for number, row in enumerate(found, start=2 if header else 1):
        if any(row[column] is None or not (optional or row[column].strip()) for column in columns):
            raise ManifestError(f"{table}, line {number}: a column is empty")
    return found


def records(path: Path, keys: Sequence[str], whose: str) -> list[dict[str, Any]]:
    """The objects of a JSON list or of JSON Lines, each with the given keys.

    Raises:
        ManifestError: no such file, not JSON, or an object without one of the keys.
    """
    if not path.is_file():
        raise ManifestError(f"{path}: missing; give the folder of {whose} as it was unpacked")
    try:
        text = path.read_text(encoding="utf-8-sig")
        found = json.loads(text) if text.lstrip().startswith("[") else [json.loads(t) for t in text.splitlines() if t]
    except (UnicodeDecodeError, ValueError) as error:
        raise ManifestError(f"{path}: not valid JSON: {error}") from None
    for number, one in enumerate(found, start=1):
        missing = [key for key in keys if not isinstance(one, dict) or key not in one]
        if missing:
            raise ManifestError(f"{path}, item {number}: no key '{missing[0]}'; {whose}'s have {', '.join(keys)}")
    return found


def find_clip(folders: Iterable[Path], names: Iterable[str], listed_in: Path) -> Path:
    """The file of a clip: the first of the names in the first of the folders, else the same in another format.

    Raises:
        ManifestError: it is nowhere; names the first place and the table.
    """
    places = [folder / name for folder in folders for name in names]
    for place in places:
        if place.is_file():
            return place
    for place in places:
        # not with_suffix: a name without a format may hold a dot
        stem = place.name.removesuffix(place.suffix) if place.suffix.lower() in SUFFIXES else place.name
        for suffix in SUFFIXES:
            other = place.with_name(stem + suffix)
            if other.is_file():
                return other
    raise ManifestError(f"{places[0]}: missing, but {listed_in.name} lists it; unpack the data set again")


def first_file(root: Path, names: Sequence[str], what: str) -> Path:
    """The first of the files that is there. Raises ManifestError that names them all."""
    for name in names:
        if (root / name).is_file():
            return root / name
    raise ManifestError(f"{root}: neither {' nor '.join(names)} is there; give {what}")
