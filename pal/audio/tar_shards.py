"""Tar shards: many clips in one uncompressed tar file, each read by one access through an index of byte offsets.

The index of `00000.tar` is `00000.tar.index.npy`, an array of `ENTRY` sorted by the members' keys. `pal data shard`
writes both. A tar file without an index, of another program, is scanned once in each process.
"""

from __future__ import annotations

import hashlib
import logging
import os
import posixpath
import tarfile
from bisect import bisect_left
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pal.audio.stream_info import DecodeError

logger = logging.getLogger(__name__)

ENTRY = np.dtype(
    [("key", "<u8", 2), ("offset", "<u8"), ("size", "<u8"), ("seconds", "<f8"), ("sha256", "u1", 32)],
)
"""One member: key (`member_key`), offset and size of its bytes, its length if known (else NaN), and its SHA-256."""

BLOCK = tarfile.BLOCKSIZE
_OPEN = 256
"""Most shards that a process keeps open."""
_CHECK = "check the shards: pal data shard --check DIR"


def index_path(shard: str | os.PathLike[str]) -> Path:
    """Path of a shard's index."""
    return Path(f"{os.fsdecode(shard)}.index.npy")


def member_key(name: str) -> tuple[int, int]:
    """Key of a member: a hash of its normalised name, of 128 bits."""
    text = posixpath.normpath(name).encode("utf-8", "surrogateescape")
    hashed = hashlib.blake2b(text, digest_size=16).digest()
    return int.from_bytes(hashed[:8], "little"), int.from_bytes(hashed[8:], "little")


class TarShard:
    """Open tar file with its index. Reading is safe from several threads.

    Args:
        path: of the tar file.

    Raises:
        DecodeError: not an uncompressed tar file, or an index that is damaged.
        OSError: the file cannot be read.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._file = Path(path).open("rb")  # noqa: SIM115
        index = index_path(path)
        self.indexed = index.is_file()
        self.entries = _load(index) if self.indexed else _scan(path)
        # as memory views, since a search by numpy takes longer than the reading
        self._first, self._second = (np.ascontiguousarray(self.entries["key"][:, i]).data for i in (0, 1))

    def find(self, name: str) -> NDArray[np.void]:
        """Index entry of a member.

        Raises:
            DecodeError: no such member.
        """
        first, second = member_key(name)
        at = bisect_left(self._first, first)
        while at < len(self._first) and self._first[at] == first:
            if self._second[at] == second:
                return self.entries[at]
            at += 1
        raise DecodeError("the shard has no such member", "check the path")

    def read(self, name: str, max_bytes: int) -> bytes | None:
        """Bytes of a member, by one access to the file; None if they are more than `max_bytes`.

        Raises:
            DecodeError: no such member, or the index does not fit the file.
        """
        entry = self.find(name)
        offset, size = int(entry["offset"]), int(entry["size"])
        if size > max_bytes:
            return None
        data = os.pread(self._file.fileno(), size + BLOCK, max(0, offset - BLOCK))
        if len(data) != size + BLOCK:
            raise DecodeError("its shard ends before it", f"copy the shard again, and {_CHECK}")
        header = data[:BLOCK]
        # What stands before the member says how long it is: another file, or an index of one, is noticed.
        try:
            fits = _number(header[124:136]) == size and _is_checksum(_number(header[148:156]), header)
        except ValueError:
            fits = False
        if not fits:
            raise DecodeError("the index of its shard does not fit the shard", _CHECK)
        return data[BLOCK:]


def _is_checksum(number: int, header: bytes) -> bool:
    """Whether a tar header [512] has this checksum: of unsigned bytes (POSIX), or signed ones (old programs)."""
    rest = header[:148] + b" " * 8 + header[156:]
    unsigned = sum(rest)
    return number == unsigned or number == unsigned - 256 * sum(byte > 127 for byte in rest)


def _number(field: bytes) -> int:
    """Number in a tar header: octal digits, or from 8 GiB on a byte 0x80 and a binary number."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.rstrip(b" \0"), 8)


def opened_shard(path: str) -> TarShard:
    """The shard at a path; the last few are kept open.

    Raises:
        DecodeError, OSError: as `TarShard`.
    """
    status = os.stat(path)  # noqa: PTH116 (for each clip that is read)
    return _opened(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=_OPEN)
def _opened(path: str, size: int, changed: int) -> TarShard:
    return TarShard(path)


def sorted_entries(entries: list[tuple[tuple[int, int], int, int, float, bytes]]) -> NDArray[np.void]:
    """Array of `ENTRY`, sorted by key, of (key, offset, size, seconds, SHA-256) of each member."""
    found = np.zeros(len(entries), ENTRY)
    for at, (key, offset, size, seconds, digest) in enumerate(entries):
        found[at] = (key, offset, size, seconds, np.frombuffer(digest, np.uint8))
    return found[np.lexsort((found["key"][:, 1], found["key"][:, 0]))]


def _load(index: Path) -> NDArray[np.void]:
    remedy = "delete it, or copy the shards again"
    try:
        entries: NDArray[Any] = np.load(index, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception:  # numpy evaluates the header as Python's literals, and raises what that raises
        raise DecodeError(f"'{index.name}' is no index of a shard", remedy) from None
    if entries.dtype != ENTRY or entries.ndim != 1:
        raise DecodeError(f"'{index.name}' is no index of a shard", remedy)
    return entries.view(np.ndarray)


def _scan(path: str) -> NDArray[np.void]:
    logger.info("%s: has no index and is scanned", path)
    try:
        with tarfile.open(path, "r:") as tar:
            members = [member for member in tar if member.isreg() and not member.issparse()]
    except tarfile.TarError:
        raise DecodeError(f"'{Path(path).name}' is no uncompressed tar file", "unpack it, or copy it again") from None
    last = {posixpath.normpath(member.name): member for member in members}  # as `tar -x`, the last of a name counts
    return sorted_entries(
        [(member_key(name), m.offset_data, m.size, float("nan"), bytes(32)) for name, m in last.items()]
    )
