"""Clips in cells of Parquet files and of Arrow files (as `datasets` saves them), decoded by us like any other bytes."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import OrderedDict
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

from pal.audio.stream_info import DecodeError

_OPEN = 64
"""Most files that a process keeps open."""
_HELD = 4
"""Row groups that are kept of a Parquet file's column, since a row can only be read with its row group."""


class TableFile:
    """Open Parquet or Arrow file, read cell by cell. Reading is safe from several threads.

    Args:
        path: of the file; the suffix `.parquet` or `.arrow` tells its kind.

    Raises:
        DecodeError: not such a file, or pyarrow is missing.
        OSError: the file cannot be read.
    """

    def __init__(self, path: str) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise DecodeError("Parquet and Arrow files need pyarrow", "pip install 'pal-audio[parquet]'") from None
        self._lock = Lock()
        self._held: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._table: Any = None
        self._parquet: Any = None
        try:
            if path.lower().endswith(".parquet"):
                self._parquet = pq.ParquetFile(path, memory_map=True)
                sizes = [self._parquet.metadata.row_group(i).num_rows for i in range(self._parquet.num_row_groups)]
                self.names: list[str] = self._parquet.schema_arrow.names
            else:
                self._table = _arrow_table(pa, path)
                sizes = [self._table.num_rows]
                self.names = self._table.column_names
        except pa.ArrowException as error:
            first = str(error).splitlines()[0]
            raise DecodeError(f"'{Path(path).name}' cannot be read ({first[:80]})", "copy it again") from None
        self._ends = list(accumulate(sizes))
        schema = self._table.schema if self._parquet is None else self._parquet.schema_arrow
        self.labels = _labels(schema.metadata)
        """Column of class labels (`datasets.ClassLabel`) -> names of the labels."""

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def cell(self, column: str, row: int) -> Any:
        """Python value of a cell.

        Raises:
            DecodeError: no such column or row, or the file is damaged.
        """
        if column not in self.names:
            raise DecodeError(f"there is no column '{column}'", f"known: {', '.join(self.names)}"[:120])
        if not 0 <= row < len(self):
            raise DecodeError(f"there are {len(self)} rows, counted from 0", "check the path")
        if self._table is not None:
            return self._table.column(column)[row].as_py()
        group = bisect_right(self._ends, row)
        return self._group(column, group)[row - (self._ends[group - 1] if group else 0)].as_py()

    def _group(self, column: str, group: int) -> Any:
        with self._lock:  # a ParquetFile is not safe from several threads
            key = (column, group)
            if key not in self._held:
                try:
                    self._held[key] = self._parquet.read_row_group(group, columns=[column]).column(0)
                except OSError as error:
                    raise DecodeError(
                        f"it cannot be read ({str(error).splitlines()[0][:80]})", "copy it again"
                    ) from None
                of_column = [held for held in self._held if held[0] == column]
                if len(of_column) > _HELD:
                    del self._held[of_column[0]]
            self._held.move_to_end(key)
            return self._held[key]


def opened_table(path: str) -> TableFile:
    """The table at a path; the last few are kept open.

    Raises:
        DecodeError, OSError: as `TableFile`.
    """
    status = Path(path).stat()
    return _opened(path, status.st_size, status.st_mtime_ns)


def audio_bytes(path: str, cell: str) -> bytes | Path:
    """Audio in the cell `COLUMN/ROW` of a table: the bytes of a file, or its path.

    A cell holds bytes, a struct of `bytes` and `path` (as `datasets.Audio`), or a path, which is relative to the
    table's folder.

    Raises:
        DecodeError: no such cell, or no audio in it.
        OSError: the file cannot be read.
    """
    column, _, row = cell.rpartition("/")
    if not column or not row.isdecimal():
        raise DecodeError("a clip of a table is named FILE/COLUMN/ROW", "check the path")
    value = opened_table(path).cell(column, int(row))
    if isinstance(value, dict):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes):
        return value
    if isinstance(value, str) and value:
        return Path(path).parent / value
    what = "is empty" if value is None else f"holds {type(value).__name__}"
    raise DecodeError(f"its cell {what}, not the bytes or the path of an audio file", "name another column")


@lru_cache(maxsize=_OPEN)
def _opened(path: str, size: int, changed: int) -> TableFile:
    return TableFile(path)


def _labels(metadata: dict[bytes, bytes] | None) -> dict[str, list[str]]:
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {name: one["names"] for name, one in features.items() if one.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, AttributeError):
        return {}


def _arrow_table(pa: Any, path: str) -> Any:
    """Memory-mapped table of an Arrow file, in the stream format (as `datasets` writes) or the file format."""
    with pa.memory_map(path) as source:
        head = source.read(6)
        source.seek(0)
        reader = pa.ipc.open_file(source) if head == b"ARROW1" else pa.ipc.open_stream(source)
        return reader.read_all()
