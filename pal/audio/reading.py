"""Bytes of an audio source, and its name in messages."""

import errno
import io
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from pal.audio.limits import Limits
from pal.audio.members import member_of, read_member
from pal.audio.stream_info import DecodeError
from pal.errors import shortened

_NAME = 140
"""Most characters of a name in an error."""
_PART = 16 << 20
"""Bytes that are read at a time."""
MAP_BYTES = 64 << 20
"""Files from this size on are decoded from a memory map and never held whole."""


def read(source: Any, limits: Limits) -> bytes:
    """Bytes of a path, of bytes or of a file object, at most `limits.max_bytes`.

    A path may name a member of another file, see `pal.audio.members`.

    Raises:
        DecodeError: unreadable, or larger.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
    elif isinstance(source, (str, os.PathLike)):
        found = _of_member(source, limits)
        if isinstance(found, bytes):
            data = found
        else:
            with _opened(found, limits) as stream:
                data = read_stream(stream, limits.max_bytes)
    elif callable(getattr(source, "read", None)):
        try:
            data = read_stream(source, limits.max_bytes)
        except DecodeError:
            raise
        except Exception as error:  # any error of a library's file object
            raise DecodeError(f"the file object cannot be read ({error})", "open it anew with mode 'rb'") from None
    else:
        raise DecodeError(
            f"{type(source).__name__} is no source of audio", "pass a path, bytes, a file object or (array, rate)"
        )
    if len(data) > limits.max_bytes:
        raise _too_big(limits)
    return data


@contextmanager
def held(source: Any, limits: Limits) -> Iterator[bytes]:
    """As `read`, but a file of `MAP_BYTES` or more is `mapped`."""
    if isinstance(source, (str, os.PathLike)) and member_of(source) is None and _size(source) >= MAP_BYTES:
        with mapped(source, limits) as data:
            yield data
    else:
        yield read(source, limits)


def file_of(data: bytes, span: tuple[int, int] | None = None) -> IO[bytes]:
    """File object of the bytes, or of those of a span; a memory map is not copied."""
    if isinstance(data, mmap.mmap):
        return cast(IO[bytes], _MapFile(data, *(span or (0, len(data)))))
    return io.BytesIO(data if span is None else data[slice(*span)])


@contextmanager
def mapped(path: str | os.PathLike[str], limits: Limits) -> Iterator[bytes]:
    """Memory-mapped file, which is indexed, sliced and searched like bytes; the bytes of a member of another file.

    Raises:
        DecodeError: as `read`.
    """
    found = _of_member(path, limits)
    if isinstance(found, bytes):
        yield found
        return
    with _opened(found, limits) as stream:
        try:
            data: Any = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError):  # an empty file, or a file system that cannot
            data = read_stream(stream, limits.max_bytes)
    try:
        yield cast(bytes, data)
    finally:
        if isinstance(data, mmap.mmap):
            data.close()


def name_of(source: Any) -> str:
    """Name of a source in messages."""
    if isinstance(source, (str, os.PathLike)):
        return os.fsdecode(source) or "audio"
    if isinstance(source, tuple):
        return "array"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return "bytes"
    name = getattr(source, "name", None)
    return name if isinstance(name, str) else "audio"


def printable(name: str) -> str:
    """The name on one line, without control characters."""
    return shortened(name, _NAME, space="?")


class _MapFile(io.RawIOBase):
    """Reads a part of a memory map from a position of its own, and does not keep it from being closed."""

    def __init__(self, data: mmap.mmap, start: int, end: int) -> None:
        self._data, self._start, self._length, self._at = data, start, end - start, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        begin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if begin + offset < 0:
            raise ValueError(f"there is no position {begin + offset}")
        self._at = begin + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._length)
        part = self._data[self._start + self._at : self._start + stop]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)


def _size(path: str | os.PathLike[str]) -> int:
    """Bytes of a file; 0 where there is none, which is said when it is opened."""
    try:
        return Path(path).stat().st_size
    except (OSError, ValueError):
        return 0


def _of_member(source: str | os.PathLike[str], limits: Limits) -> bytes | str | os.PathLike[str]:
    """The bytes of a member of another file; else the path of a file."""
    member = member_of(source)
    if member is None:
        return source
    data = read_member(member, limits.max_bytes)
    if data is None:
        raise _too_big(limits)
    return data


@contextmanager
def _opened(source: str | os.PathLike[str], limits: Limits) -> Iterator[IO[bytes]]:
    shown = os.fsdecode(source)
    if "://" in shown:
        raise DecodeError("it is a URL, not a file", "download it and give its path")
    try:
        if not shown:
            raise DecodeError("the path is empty", "name a file")
        file = Path(shown)
        if file.is_dir():
            raise DecodeError("it is a folder", "name one file in it")
        if not file.exists():
            raise DecodeError("there is no such file", "check the path")
        if not file.is_file():
            raise DecodeError("it is no ordinary file", "write it to a file first")
        if file.stat().st_size > limits.max_bytes:
            raise _too_big(limits)
        with file.open("rb") as stream:
            yield stream
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise DecodeError("no file has so long a name", "pass a path; base64 goes as a data: URL") from None
        raise DecodeError(f"it cannot be read ({error.strerror})", "check the path and its permissions") from None
    except ValueError:  # a zero byte in the path
        raise DecodeError("there is no such file", "check the path") from None


def read_stream(stream: IO[bytes], limit: int) -> bytes:
    """All bytes of a file object, or `limit` + 1 of them; memory is taken as they come.

    Raises:
        DecodeError: it gives something else.
    """
    parts = []
    left = limit + 1
    while left > 0:
        part = stream.read(min(left, _PART))  # which allocates as many
        if not isinstance(part, (bytes, bytearray)):
            raise DecodeError("the file object gives no bytes", "open it with mode 'rb'")
        if not part:
            break
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _too_big(limits: Limits) -> DecodeError:
    return DecodeError(f"it is larger than {limits.max_bytes} bytes", "split it")
