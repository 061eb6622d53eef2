"""Folders that are written whole or not at all, and notice when a byte changes."""

import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from pal.errors import BundleError

MANIFEST = "manifest.json"


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder that takes the name of `folder` once it is complete and on disk.

    A SHA-256 manifest of the files is added. Killed at any moment, either the old folder or the new
    one is there: between the two renames the old one stands beside under a name ending in `.old`,
    which `recover` puts back.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        digests = {
            str(path.relative_to(temporary)): sha256(path) for path in sorted(temporary.rglob("*")) if path.is_file()
        }
        (temporary / MANIFEST).write_text(json.dumps({"sha256": digests}, indent=1) + "\n")
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
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def recover(folder: Path) -> None:
    """Undo a replacement that was killed between its two renames."""
    old = folder.with_name(f"{folder.name}.old")
    if old.is_dir() and not folder.exists():
        old.rename(folder)


def verify(folder: Path, suffixes: Iterable[str] | None = None) -> dict[str, str]:
    """Check every file of a folder against its manifest; gives the digests of them all.

    Args:
        folder: one that `atomic_folder` wrote.
        suffixes: check only files that end so.

    Raises:
        BundleError: no manifest, a missing file or one whose bytes changed.
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
            raise BundleError(f"{folder / name}: its SHA-256 is not the manifest's; copy the file again")
    return digests


def amend(folder: Path, files: Mapping[str, bytes]) -> None:
    """Add or replace files of a folder with a manifest, and say so there.

    Raises:
        BundleError: a file of the folder has changed before; see `verify`.
    """
    digests = verify(folder)
    for name, data in files.items():
        write_bytes(folder / name, data)
        digests[name] = sha256(folder / name)
    write_text(folder / MANIFEST, json.dumps({"sha256": dict(sorted(digests.items()))}, indent=1) + "\n")


def strangers(folder: Path) -> set[str]:
    """What lies in a folder and is none of the files its manifest names; everything where there is none."""
    return _inside(folder) - _own(folder)


def move_into(source: Path, folder: Path) -> None:
    """Move the files of a folder with a manifest beside others' files, in place of an older manifest's.

    The manifest goes first and comes last, so that what is there half is no bundle.
    """
    new = _own(source)
    # only what lies inside: a manifest from elsewhere could name anybody's file
    old = _own(folder) & _inside(folder)
    (folder / MANIFEST).unlink(missing_ok=True)
    for name in old - new - {MANIFEST}:
        (folder / name).unlink()
    for name in [*sorted(new - {MANIFEST}), MANIFEST]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).replace(folder / name)
    _sync(folder)


def _own(folder: Path) -> set[str]:
    try:
        return {MANIFEST, *json.loads((folder / MANIFEST).read_text())["sha256"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _inside(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `jsonable(value)` as JSON, whole or not at all."""
    write_text(path, json.dumps(jsonable(value), indent=1, ensure_ascii=False) + "\n")


def jsonable(value: Any) -> Any:
    """`value` with tuples as lists and NaN or infinity as null, which JSON has no words for."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, by any number of threads and machines at once."""
    with writing(path) as file:
        file.write(data)


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` once the block has ended without an error, and it is on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
