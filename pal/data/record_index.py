"""Index of a manifest: where its records are, and their tasks, datasets and groups, without parsing them.

The index of a large manifest is a folder beside it, NAME.index, or one in the cache where that cannot be written:

    index.json      size, time and SHA-256 of the manifest; names of the tasks and datasets
    starts.npy, ... arrays, which are memory-mapped
    manifest.json   SHA-256 of these files, checked when the index is opened

It is made once, when the manifest is first opened, and again when the manifest has changed or the index is damaged.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pal.data.json_offsets import find_records
from pal.errors import BundleError
from pal.files import amend, atomic_folder, sha256, verify
from pal.pretrained import cache_folder

logger = logging.getLogger(__name__)

LARGE = 10_000_000
"""Size in bytes from which a manifest has an index on disk; smaller ones are read at each start."""

_FORMAT = 1
_HEADER = "index.json"

Summary = tuple[tuple[str, ...], str, str] | None
"""Clips, task and dataset of a record; None for a faulty record."""


class RowGroups(Sequence[tuple[int, ...]]):
    """Groups of rows in two arrays, for millions of groups.

    Args:
        rows_X: rows of all groups, one group after the other.
        bounds_G1: where each group begins in `rows_X`, and the end; None for groups of one row.
    """

    def __init__(self, rows_X: NDArray[Any], bounds_G1: NDArray[Any] | None = None) -> None:
        self.rows_X = rows_X
        self.bounds_G1 = bounds_G1

    @property
    def single(self) -> bool:
        """True if each group is one row."""
        return self.bounds_G1 is None

    def __len__(self) -> int:
        return len(self.rows_X) if self.bounds_G1 is None else len(self.bounds_G1) - 1

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        if self.bounds_G1 is None:
            return (int(self.rows_X[index]),)
        return tuple(self.rows_X[int(self.bounds_G1[index]) : int(self.bounds_G1[index + 1])].tolist())

    def only(self, keep_R: NDArray[np.bool_]) -> RowGroups:
        """The groups with only the rows in the mask, without empty groups, in the order of their first rows."""
        if self.bounds_G1 is None:
            return RowGroups(self.rows_X[keep_R[self.rows_X]])
        kept_X = keep_R[self.rows_X]
        groups_X = np.repeat(np.arange(len(self)), np.diff(self.bounds_G1).astype(np.int64))[kept_X]
        return _ordered(self.rows_X[kept_X], np.flatnonzero(np.diff(groups_X, prepend=-1)))


@dataclass(frozen=True)
class Columns:
    """Task, dataset and group of all records of a manifest."""

    tasks: tuple[str, ...]
    """Names of the tasks; `task_R` has their indices."""
    datasets: tuple[str, ...]
    task_R: NDArray[Any]
    dataset_R: NDArray[Any]
    groups: RowGroups
    """Rows with the same list of clips, in the order of their first rows; a row without clips is a group."""
    faulty: int | None = None
    """First faulty record."""


@dataclass(frozen=True)
class RecordIndex:
    """Places of the records of a manifest in its file."""

    is_list: bool
    """True for a JSON list, False for JSON Lines."""
    starts_R: NDArray[Any]
    """Offset of each record in bytes."""
    sizes_R: NDArray[Any]
    """Size of each record in bytes."""
    columns: Columns | None = None
    """None if they were not computed yet."""
    digest: str | None = None
    """SHA-256 of the manifest; None if it was not computed yet."""


def columns_of(summaries: Iterable[Summary], count: int, name: str | None = None) -> Columns:
    """Columns of `count` records.

    Args:
        summaries: of the records, in order.
        count: number of records.
        name: shown with a progress bar; None for no bar.
    """
    tasks: dict[str, int] = {}
    datasets: dict[str, int] = {}
    task_R, dataset_R = np.zeros(count, np.uint32), np.zeros(count, np.uint32)
    keys = bytearray()
    faulty = None
    bar = tqdm(summaries, name, count, delay=2, disable=True if name is None else None, file=sys.stderr)
    for row, summary in enumerate(bar):
        clips: tuple[str, ...] = ()
        if summary is None:
            faulty = row if faulty is None else faulty
        else:
            clips, task, dataset = summary
            task_R[row] = tasks.setdefault(task, len(tasks))
            dataset_R[row] = datasets.setdefault(dataset, len(datasets))
        text = "\0".join(clips) if clips else f"\0{row}"
        keys += hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    keys_R2 = np.frombuffer(keys, np.uint64).reshape(-1, 2)
    rows_R = np.lexsort((keys_R2[:, 1], keys_R2[:, 0])).astype(np.uint32 if count < 1 << 32 else np.uint64)
    keys_R2 = keys_R2[rows_R]
    begins = np.concatenate([np.ones(min(count, 1), bool), (keys_R2[1:] != keys_R2[:-1]).any(1)])
    return Columns(
        tuple(tasks),
        tuple(datasets),
        _narrow(task_R, len(tasks)),
        _narrow(dataset_R, len(datasets)),
        _ordered(rows_R, np.flatnonzero(begins)),
        faulty,
    )


def open_index(
    path: Path, state: tuple[int, int], summaries: Callable[[RecordIndex], Iterable[Summary]]
) -> RecordIndex:
    """Open the index of a manifest; make it if it is missing or not usable, which is logged.

    Args:
        path: the manifest.
        state: its size in bytes and its time of change in ns.
        summaries: gives the summaries of all records, with an index that has only their places.

    Raises:
        ManifestError: the manifest cannot be divided into records.
    """
    places = [path.with_name(f"{path.name}.index"), _in_cache(path)]
    for place in places:
        found = _read(place, path, state)
        if found is not None:
            return found
    logger.info("%s: being indexed, once", path)
    bare = RecordIndex(*find_records(path))
    columns = columns_of(summaries(bare), len(bare.starts_R), f"index of {path.name}")
    made = RecordIndex(bare.is_list, bare.starts_R, bare.sizes_R, columns, sha256(path))
    for place in places:
        try:
            _write(place, path, state, made)
        except OSError as error:
            logger.info("%s: cannot be written (%s)", place, error.strerror)
            continue
        return _read(place, path, state) or made
    logger.warning("%s: its index can be written nowhere, and will be made again at the next start", path)
    return made


def _in_cache(path: Path) -> Path:
    name = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:16]
    return cache_folder() / "manifests" / f"{path.name}-{name}.index"


def _read(place: Path, path: Path, state: tuple[int, int]) -> RecordIndex | None:
    """The index in a folder; None if there is none, or not one of this manifest as it is now."""
    if not place.is_dir():
        return None
    try:
        verify(place)
        header = json.loads((place / _HEADER).read_text())
        if header["format"] != _FORMAT or header["stem"] != path.stem:
            raise ValueError("it is of another version or another manifest")
        if header["size"] != state[0] or (header["time"] != state[1] and header["sha256"] != sha256(path)):
            logger.info("%s: the manifest has changed since it was indexed", place)
            return None
        if header["time"] != state[1]:
            _touch(place, header | {"time": state[1]})
        return _opened(place, header)
    except (BundleError, OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s: this index is not used (%s); the manifest is indexed again", place, error)
        return None


def _touch(place: Path, header: dict[str, Any]) -> None:
    """Note the new time of a manifest whose content is the same, so that it is not hashed again."""
    try:
        amend(place, {_HEADER: json.dumps(header).encode()})
    except OSError as error:
        logger.info("%s: cannot be written (%s)", place, error.strerror)


def _opened(place: Path, header: dict[str, Any]) -> RecordIndex:
    names = ("starts", "sizes", "task", "dataset", "rows", "bounds")
    arrays = {name: np.load(place / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}
    # plain arrays: an access to a memmap's item takes five times as long
    arrays = {name: array.view(np.ndarray) for name, array in arrays.items()}
    if any(len(arrays[name]) != header["records"] for name in names if name != "bounds"):
        raise ValueError("its arrays differ in length")
    groups = RowGroups(arrays["rows"], arrays["bounds"])
    columns = Columns(
        tuple(header["tasks"]),
        tuple(header["datasets"]),
        arrays["task"],
        arrays["dataset"],
        groups,
        header["faulty"],
    )
    return RecordIndex(header["list"], arrays["starts"], arrays["sizes"], columns, header["sha256"])


def _write(place: Path, path: Path, state: tuple[int, int], index: RecordIndex) -> None:
    if place.exists() and not (place / _HEADER).is_file():
        raise FileExistsError(errno.EEXIST, "something else has its name", str(place))
    columns = index.columns
    assert columns is not None and columns.groups.bounds_G1 is not None, "an index on disk has the columns"
    header = {
        "format": _FORMAT,
        "stem": path.stem,
        "size": state[0],
        "time": state[1],
        "sha256": index.digest,
        "list": index.is_list,
        "records": len(index.starts_R),
        "tasks": columns.tasks,
        "datasets": columns.datasets,
        "faulty": columns.faulty,
    }
    arrays = {
        "starts": index.starts_R,
        "sizes": index.sizes_R,
        "task": columns.task_R,
        "dataset": columns.dataset_R,
        "rows": columns.groups.rows_X,
        "bounds": columns.groups.bounds_G1,
    }
    with atomic_folder(place) as folder:
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array, allow_pickle=False)
        (folder / _HEADER).write_text(json.dumps(header))


def _ordered(rows_X: NDArray[Any], starts_G: NDArray[Any]) -> RowGroups:
    """Groups of rows, each in ascending order and beginning at `starts_G`, sorted by their first rows."""
    sizes_G = np.diff(starts_G, append=len(rows_X))
    order_G = np.argsort(rows_X[starts_G], kind="stable")
    sizes_G = sizes_G[order_G]
    bounds_G1 = np.concatenate([[0], np.cumsum(sizes_G)])
    from_X = np.repeat(starts_G[order_G] - bounds_G1[:-1], sizes_G) + np.arange(len(rows_X))
    return RowGroups(rows_X[from_X], bounds_G1.astype(np.uint32 if len(rows_X) < 1 << 32 else np.uint64))


def _narrow(codes_R: NDArray[Any], names: int) -> NDArray[Any]:
    return codes_R.astype(np.uint16) if names < 1 << 16 else codes_R
