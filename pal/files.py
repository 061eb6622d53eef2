"""Atomic writing of files and folders, and folders with a manifest of SHA-256 digests."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pal.errors import BundleError, ConfigError, PalError

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")
"""Name of a temporary file of `replacing`."""


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Context manager of a temporary folder, which replaces `folder` at the end, complete and on disk.

    A manifest of its files is added. If the process is killed, either the old or the new folder remains. Between two
    renames, the old one is only at NAME.old, from where `recover` restores it.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        publish(temporary, folder, digests_in(temporary))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def digests_in(folder: Path) -> dict[str, str]:
    """SHA-256 of all files in a folder, by name."""
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def publish(temporary: Path, folder: Path, digests: Mapping[str, str]) -> None:
    """Write the manifest of a temporary folder, and put it in the place of `folder`, complete and on disk.

    Args:
        temporary: folder beside `folder`.
        folder: is replaced.
        digests: SHA-256 of all files in `temporary`, by name.
    """
    (temporary / MANIFEST).write_text(json.dumps({"sha256": dict(digests)}, indent=1) + "\n")
    for path in temporary.rglob("*"):
        if path.is_file():
            _sync(path)
    _sync(temporary)
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """Undo a replacement by `atomic_folder` that was killed between its two renames."""
    old = folder.with_name(f"{folder.name}.old")
    if old.is_dir() and not folder.exists():
        old.rename(folder)


def verify(folder: Path, suffixes: Iterable[str] | None = None) -> dict[str, str]:
    """Check a folder against its manifest; returns the digests of all files in it, by name.

    Args:
        folder: a folder of `atomic_folder`.
        suffixes: check only files with these endings; None for all.

    Raises:
        BundleError: no manifest, a missing file, or a changed file.
    """
    endings = None if suffixes is None else tuple(suffixes)
    recover(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(f"{folder}: no {MANIFEST}; not a folder that pal wrote, or an incomplete copy")
    try:
        digests = json.loads(path.read_text())["sha256"]
    except (ValueError, KeyError, TypeError):
        raise BundleError(f"{path}: damaged; copy the folder again") from None
    for name, digest in digests.items():
        if endings is not None and not name.endswith(endings):
            continue
        if not (folder / name).is_file():
            raise BundleError(f"{folder}: '{name}' is missing; copy the folder again")
        if sha256(folder / name) != digest:
            raise BundleError(f"{folder / name}: its SHA-256 is not the manifest's; copy both again")
    return digests


def amend(folder: Path, files: Mapping[str, bytes]) -> None:
    """Add or replace files of a folder with a manifest, and update the manifest.

    Raises:
        BundleError: a file has changed since the manifest was written; see `verify`.
    """
    digests = verify(folder)
    for name, data in files.items():
        write_bytes(folder / name, data)
        digests[name] = sha256(folder / name)
    write_text(folder / MANIFEST, json.dumps({"sha256": dict(sorted(digests.items()))}, indent=1) + "\n")


def unlisted_files(folder: Path) -> set[str]:
    """Files in a folder that its manifest does not list; all files if there is no manifest."""
    return _files_in(folder) - _listed(folder)


def move_into(source: Path, folder: Path) -> None:
    """Move the files of a folder with a manifest into `folder`, and remove those of the manifest that was there.

    Other files in `folder` stay. The old manifest is removed first and the new one moved last, so that an incomplete
    result has no manifest.
    """
    new = _listed(source)
    # only files inside the folder: a forged manifest could name any path
    old = _listed(folder) & _files_in(folder)
    (folder / MANIFEST).unlink(missing_ok=True)
    for name in old - new - {MANIFEST}:
        (folder / name).unlink()
    for name in [*sorted(new - {MANIFEST}), MANIFEST]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).replace(folder / name)
    _sync(folder)


def _listed(folder: Path) -> set[str]:
    """Files that the manifest lists, and the manifest itself; empty without a valid manifest."""
    try:
        return {MANIFEST, *json.loads((folder / MANIFEST).read_text())["sha256"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `jsonable(value)` as a JSON file, atomically."""
    write_text(path, json.dumps(jsonable(value), indent=1, ensure_ascii=False) + "\n")


def jsonable(value: Any) -> Any:
    """`value` with JSON types only: tuples become lists; NaN and infinity become None."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically; several threads or machines may write it at once."""
    with writing(path) as file:
        file.write(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Context manager of a temporary path, whose file replaces `path` at the end, unless the block raises an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
    except OSError as error:
        if error.filename == str(temporary):
            error.filename, error.filename2 = str(path), None  # the name that the user knows
        raise
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write contiguous tensors as a safetensors file, atomically.

    Raises:
        PalError: the system refused; nothing is left behind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with replacing(path) as temporary:
            save_file(dict(tensors), temporary, metadata=None if metadata is None else dict(metadata))
    except SafetensorError as error:  # which safetensors raises in place of an OSError
        why = str(error).removeprefix("Error while serializing: ").removeprefix("I/O error: ").split(" at path ")[0]
        raise PalError(f"{path}: cannot be written: {why}; make room, or give another path") from None


def remove_unfinished(folder: Path, older_than: float = 3600.0) -> None:
    """Remove the temporary files of `replacing` in a folder and those below, which killed processes left there.

    Args:
        folder: of files that `replacing` writes.
        older_than: seconds since a file was last changed; another process may still write a younger one.
    """
    for path in folder.rglob(".*.tmp"):
        with suppress(FileNotFoundError):
            if _TEMPORARY.fullmatch(path.name) and time.time() - path.stat().st_mtime > older_than:
                path.unlink()


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Context manager of a temporary file, which replaces `path` at the end, unless the block raises an error."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        yield file


@contextmanager
def locked(path: Path, refusal: str) -> Iterator[None]:
    """Hold a lock file, which the operating system frees when the process ends.

    Where the file system has no locks, a warning says so.

    Raises:
        ConfigError: with the text of `refusal`, where another process holds it.
    """
    import fcntl

    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(refusal) from None
        except OSError as error:
            logger.warning("%s: cannot be locked (%s); let no other process write there", path, error.strerror)
        yield


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
