"""Offsets of the records in a manifest file, JSON Lines or one JSON list, found without parsing the records."""

from __future__ import annotations

import mmap
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from pal.data.tables import not_utf_8
from pal.errors import ManifestError

_BOM = b"\xef\xbb\xbf"
_STRING = rb'"(?:[^"\\]++|\\.)*+'
_TOKEN = re.compile(_STRING + rb'("?)|[{}]', re.DOTALL)
"""A JSON string (with its closing quote, unless the file ends first), or a brace outside of strings."""
_FLAT_OBJECT = re.compile(rb"\{(?:[^{}\"]++|" + _STRING + rb'")*+\}', re.DOTALL)
"""An object without nested objects, as in OpenAQA: matched in one step, about ten times faster."""
_GAP = re.compile(rb"[ \t\r\n]*+(,?)[ \t\r\n]*+([{\]]?)")


def find_records(path: Path) -> tuple[bool, NDArray[np.uint64], NDArray[np.uint32] | NDArray[np.uint64]]:
    """(whether the file is a JSON list, start [R] and size [R] of each record in bytes).

    Raises:
        ManifestError: the file cannot be divided into records.
        OSError: it cannot be read.
    """
    is_list = _starts_with_list(path)
    starts, sizes = _index_list(path) if is_list else _index_lines(path)
    starts_R, sizes_R = np.frombuffer(starts, np.uint64), np.frombuffer(sizes, np.uint64)
    if not len(sizes_R) or sizes_R.max() < 1 << 32:
        return is_list, starts_R, sizes_R.astype(np.uint32)
    return is_list, starts_R, sizes_R


def chunks(file: BinaryIO, limit: int, size: int = 1 << 20) -> Iterator[bytes]:
    """The first `limit` bytes of an open file, in parts of at most `size` bytes."""
    while limit > 0 and (chunk := file.read(min(size, limit))):
        limit -= len(chunk)
        yield chunk


def _starts_with_list(path: Path) -> bool:
    with path.open("rb") as file:
        # Not by lines: a list of several GB may be a single line.
        for number, chunk in enumerate(chunks(file, path.stat().st_size)):
            if number == 0 and (fault := not_utf_8(chunk)):
                raise ManifestError(f"{path}: {fault}")
            if text := (chunk if number else chunk.removeprefix(_BOM)).strip():
                return text.startswith(b"[")
    raise ManifestError(f"{path}: is empty; write a record into each of its lines, as docs/data.md has it")


def _index_lines(path: Path) -> tuple[array[int], array[int]]:
    starts, sizes = array("Q"), array("Q")
    place = 0
    with path.open("rb") as file:
        for line in file:
            skip = len(_BOM) if place == 0 and line.startswith(_BOM) else 0
            if line[skip:].strip():
                starts.append(place + skip)
                sizes.append(len(line) - skip)
            place += len(line)
    return starts, sizes


def _index_list(path: Path) -> tuple[array[int], array[int]]:
    """Offsets and sizes of the objects of a JSON list, found by matching braces outside of strings.

    The file is memory-mapped, not read as a whole.
    """
    starts, sizes = array("Q"), array("Q")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        place = text.find(b"[") + 1
        while True:
            gap = _GAP.match(text, place)
            assert gap is not None
            comma, bracket = gap.groups()
            if bracket == b"]" and not comma:
                break
            end = _object_end(text, gap.end() - 1) if bracket == b"{" else None
            if end is None and (bracket == b"{" or (not bracket and gap.end() == len(text))):
                raise ManifestError(f"{path}, item {len(starts) + 1}: the file ends in the middle; is it cut off?")
            if end is None or bool(comma) != bool(starts):
                raise ManifestError(
                    f"{path}, item {len(starts) + 1}: a list must hold objects separated by commas, and nothing else"
                )
            starts.append(gap.end() - 1)
            sizes.append(end - gap.end() + 1)
            place = end
        if text[gap.end() :].strip():
            raise ManifestError(f"{path}: text after the end of the list")
    return starts, sizes


def _object_end(text: mmap.mmap, start: int) -> int | None:
    """End offset of the object that starts at `start`; None if the file ends first."""
    flat = _FLAT_OBJECT.match(text, start)
    if flat is not None:
        return flat.end()
    depth = 0
    for token in _TOKEN.finditer(text, start):
        if token[1] is not None:
            if not token[1]:
                return None
        else:
            depth += 1 if token[0] == b"{" else -1
            if depth == 0:
                return token.end()
    return None
