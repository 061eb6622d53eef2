"""Records in Parquet files, and in folders of Hugging Face `datasets` (`save_to_disk`), by a mapping of columns.

Rows are read on access. A clip is the cell with its audio, named FILE/COLUMN/ROW (`pal.audio.members`), and its bytes
are decoded by `pal.audio`: neither `datasets` nor torchcodec is needed, only pyarrow.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import numpy as np
from pydantic import Field, model_validator

from pal.audio import DecodeError
from pal.audio.table_cells import TableFile, opened_table
from pal.config import StrictConfig
from pal.data.manifest import PLACEHOLDER, Record, Turn
from pal.data.record_index import Columns, RowGroups
from pal.data.record_source import RecordSource
from pal.errors import ConfigError, ManifestError

_TEXTS = ("question", "answer", "id", "task", "dataset")
_PART = 1 << 20
"""Bytes at a file's start and end that its digest covers; Parquet's footer is at its end."""


class TableColumns(StrictConfig):
    """Columns of a table that hold the parts of a record."""

    audio: str | None = "audio"
    """Bytes, a struct of `bytes` and `path` (as `datasets.Audio`), or paths; None for text alone."""
    question: str | None = None
    answer: str | None = None
    id: str | None = None
    """Default: the file's name and the row."""
    task: str | None = None
    dataset: str | None = None
    choices: str | None = None
    """Lists of allowed answers."""


class TableSource(StrictConfig):
    """Table of records: Parquet files, or a folder that `datasets` saved."""

    path: Path
    """File, pattern of files (`data/train-*.parquet`), or folder."""
    split: str | None = None
    """Split of a folder with several."""
    columns: TableColumns = TableColumns()
    constants: dict[str, str] = Field(default_factory=dict)
    """Parts that are the same in all records, such as `question` or `task`."""

    @model_validator(mode="after")
    def _complete(self) -> TableSource:
        for part in self.constants:
            if part not in _TEXTS or part == "id":
                raise ValueError(f"no constant '{part}'; known: {', '.join(text for text in _TEXTS if text != 'id')}")
            if getattr(self.columns, part) is not None:
                raise ValueError(f"'{part}' is both a column and a constant; give one of them")
        if self.split is not None and self.path.suffix == ".parquet":
            raise ValueError("'split' chooses in a folder, but 'path' names files; remove it")
        for part in ("question", "answer"):
            if part not in self.constants and getattr(self.columns, part) is None:
                raise ValueError(f"'{part}' is neither a column nor a constant; give one of them")
        return self

    def files(self) -> list[Path]:
        """Its files, in order; none if they are missing.

        Raises:
            ConfigError: a folder with several splits, or without the one that is named.
        """
        path = self.path
        if any(letter in path.name for letter in "*?["):
            return sorted(path.parent.glob(path.name))
        if not path.is_dir():
            return [path] if path.is_file() else []
        if (path / "dataset_dict.json").is_file():
            splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
            if self.split not in splits:
                raise ConfigError(f"{path}: has the splits {', '.join(splits)}; set 'split' to one of them")
            path = path / str(self.split)
        if (path / "state.json").is_file():
            return [path / file["filename"] for file in json.loads((path / "state.json").read_text())["_data_files"]]
        found = sorted(path.rglob("*.parquet"))
        if self.split is None:
            return found
        return [file for file in found if file.name.startswith((f"{self.split}-", f"{self.split}."))]


class TableRecords(RecordSource):
    """Records of a table, read on access.

    Args:
        source: the table and the mapping of its columns.

    Raises:
        ConfigError: no files, no such column, or pyarrow is missing.
        ManifestError: a file that cannot be read; on access, a row that is no record.
    """

    def __init__(self, source: TableSource) -> None:
        self.source = source
        self.path = source.path
        self.files = [file.absolute() for file in source.files()]
        if not self.files:
            raise ConfigError(f"{self.path}: no such table; give Parquet files or a folder that `datasets` saved")
        self._ends = list(accumulate(len(self._table(file)) for file in self.files))
        names = self._table(self.files[0]).names
        for part, column in source.columns.model_dump().items():
            if column is not None and column not in names:
                raise ConfigError(f"{self.path}: no column '{column}' for '{part}'; known: {', '.join(names)}")

    def __reduce__(self) -> tuple[Callable[..., TableRecords], tuple[object, ...]]:
        return _reopened, (self.source.model_copy(update={"path": self.path.absolute()}), self.digest)

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        file, row = self._place(index)
        columns = self.source.columns
        try:
            table = opened_table(str(file))
            texts = {part: self._text(table, part, row) for part in _TEXTS}
            choices = None if columns.choices is None else table.cell(columns.choices, row)
        except (DecodeError, OSError) as error:
            raise ManifestError(f"{file}, row {row}: {error}") from None
        clips = () if columns.audio is None else (f"{file}/{columns.audio}/{row}",)
        question, answer = texts["question"] or "", texts["answer"] or ""
        fault = _fault(question, answer, choices, len(clips))
        if fault is not None:
            raise ManifestError(f"{file}, row {row}: {fault}")
        return Record(
            id=texts["id"] or f"{file.stem}:{row}",
            clips=clips,
            turns=(Turn(question, answer),),
            task=texts["task"] or "question",
            dataset=texts["dataset"] or self.path.stem,
            choices=None if choices is None else tuple(choices),
        )

    def __iter__(self) -> Iterator[Record]:
        return (self[at] for at in range(len(self)))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the mapping, and of each file's name, size, and first and last MiB, in hexadecimal."""
        sha = hashlib.sha256(self.source.model_dump_json(exclude={"path"}).encode())
        for path in self.files:
            with path.open("rb") as file:
                size = path.stat().st_size
                sha.update(f"\0{path.name}\0{size}\0".encode() + file.read(_PART))
                file.seek(max(0, size - _PART))
                sha.update(file.read())
        return sha.hexdigest()

    @cached_property
    def columns(self) -> Columns:
        """Task and dataset of every record; each record is a group, since its clip is its own."""
        (tasks, task_R), (datasets, dataset_R) = self._codes("task", "question"), self._codes("dataset", self.path.stem)
        return Columns(tasks, datasets, task_R, dataset_R, RowGroups(np.arange(len(self), dtype=np.uint32)))

    def where(self, index: int) -> str:
        """Position of a record in words: "row 3 of train.parquet", counted from 0 as in its clip's name."""
        file, row = self._place(index)
        return f"row {row} of {file.name}"

    def locate(self, audio_id: str) -> str:
        """The path of a clip: relative to the table's folder, or absolute."""
        return os.path.normpath(self.files[0].parent / audio_id)

    def _place(self, index: int) -> tuple[Path, int]:
        number = bisect_right(self._ends, index)
        return self.files[number], index - (self._ends[number - 1] if number else 0)

    def _table(self, file: Path) -> TableFile:
        try:
            return opened_table(str(file))
        except (DecodeError, OSError) as error:
            remedy = f"; {error.remedy}" if isinstance(error, DecodeError) else ""
            raise ManifestError(f"{file}: {error}{remedy}") from None

    def _text(self, table: TableFile, part: str, row: int) -> str | None:
        column = getattr(self.source.columns, part)
        if column is None:
            return self.source.constants.get(part)
        value = table.cell(column, row)
        if isinstance(value, int) and not isinstance(value, bool) and column in table.labels:
            value = table.labels[column][value]
        if part == "id" and isinstance(value, int):
            value = str(value)
        if not isinstance(value, str):
            raise DecodeError(f"column '{column}' holds {type(value).__name__}, not text, for '{part}'")
        return value

    def _codes(self, part: str, default: str) -> tuple[tuple[str, ...], np.ndarray]:
        column = getattr(self.source.columns, part)
        if column is None:
            return (self.source.constants.get(part, default),), np.zeros(len(self), np.uint16)
        names: dict[Any, int] = {}
        codes_R = np.zeros(len(self), np.uint32)
        for at in range(len(self)):
            file, row = self._place(at)
            try:
                text = self._text(self._table(file), part, row)
            except DecodeError as error:
                raise ManifestError(f"{file}, row {row}: {error}") from None
            codes_R[at] = names.setdefault(text, len(names))
        return tuple(names), codes_R


def _reopened(source: TableSource, digest: str) -> TableRecords:
    records = TableRecords(source)
    if records.digest != digest:
        raise ManifestError(f"{source.path}: changed since it was opened; open it again")
    return records


def _fault(question: str, answer: str, choices: Sequence[str] | None, clips: int) -> str | None:
    """What is wrong with a row, as in a manifest."""
    if not question.strip():
        return "the question is empty"
    if PLACEHOLDER in answer:
        return f"the answer holds '{PLACEHOLDER}'; clips may stand in questions only"
    if question.count(PLACEHOLDER) not in (0, clips):
        return f"{question.count(PLACEHOLDER)} '{PLACEHOLDER}' in the question but {clips} clips"
    if choices is not None and answer not in choices:
        return f"the answer '{answer}' is not among the choices"
    return None
