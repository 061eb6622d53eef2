"""Folders that are written whole or not at all, and notice when a byte changes."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def verify(folder: Path) -> dict[str, str]:
    """Check every file of a folder against its manifest; gives the digests.

    Raises:
        BundleError: no manifest, a missing file or one whose bytes changed.
    """
    recover(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(f"{folder}: no {MANIFEST}; not a folder that pal wrote, or an incomplete copy")
    try:
        digests = json.loads(path.read_text())["sha256"]
    except (ValueError, KeyError, TypeError):
        raise BundleError(f"{path}: damaged; copy the folder again") from None
    for name, digest in digests.items():
        if not (folder / name).is_file():
            raise BundleError(f"{folder}: '{name}' is missing; copy the folder again")
        if sha256(folder / name) != digest:
            raise BundleError(f"{folder / name}: its SHA-256 is not the manifest's; copy the file again")
    return digests


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """The same for any bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    _sync(temporary)
    temporary.replace(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
