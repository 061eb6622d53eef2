"""Readers of public data sets, one file each: manifests from their distributed folders.

A reader is a function that yields records, registered by one decorator line with its name and options.
"""

import hashlib
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pal.config import StrictConfig, parse
from pal.data.manifest import Record, write_manifest
from pal.errors import ConfigError, ManifestError

Reader = Callable[[Path, Any], Iterable[Record]]
"""(the data set's folder, its options) -> records."""

_READERS: dict[str, tuple[Reader, type[StrictConfig]]] = {}


def dataset(name: str, options: type[StrictConfig]) -> Callable[[Reader], Reader]:
    """Function decorator that registers a reader as `name`."""

    def add(reader: Reader) -> Reader:
        assert name not in _READERS, f"data set '{name}' is registered twice"
        _READERS[name] = (reader, options)
        return reader

    return add


def names() -> list[str]:
    """The known data sets, sorted."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return sorted(_READERS)


def read(name: str, root: str | Path, **options: Any) -> list[Record]:
    """The records of a data set.

    Args:
        name: one of `names()`.
        root: the data set's folder.
        options: of the reader; strings are parsed, as from a command line.

    Raises:
        ConfigError: unknown data set or option, with the known ones.
        ManifestError: the folder is not laid out as expected; names the file and the fault.
    """
    known = names()
    if name not in known:
        raise ConfigError(f"unknown data set '{name}'; known: {', '.join(known)}")
    reader, options_class = _READERS[name]
    checked = parse(options_class, options, where=f"data set '{name}'")
    root = Path(root).expanduser()
    if not root.is_dir():
        raise ManifestError(f"{root}: no such folder; give the folder that holds the data set's files as the root")
    records = list(reader(root, checked))
    if not records:
        raise ManifestError(f"{root}: no clip is left by the options {checked.model_dump(exclude_none=True)}")
    return records


def prepare(name: str, root: str | Path, out: str | Path, **options: Any) -> Path:
    """Write the manifest of a data set and return its path. Arguments and errors are those of `read`.

    Audio paths below the folder of `out`, a JSON Lines file, are written relative to it.
    """
    write_manifest(out, read(name, root, **options))
    return Path(out)


def question_for(record_id: str, questions: Sequence[str], paraphrase: bool) -> str:
    """The first of the questions, or with `paraphrase` one chosen by the id's digest."""
    if not paraphrase:
        return questions[0]
    digest = hashlib.sha256(record_id.encode()).digest()
    return questions[int.from_bytes(digest[:8], "big") % len(questions)]


def choose(option: str | None, known: Sequence[str], what: str) -> list[str]:
    """Parse a comma-separated option of known values; None means all of them."""
    if option is None:
        return list(known)
    chosen = [value.strip() for value in option.split(",") if value.strip()]
    for value in chosen:
        if value not in known:
            raise ConfigError(f"unknown {what} '{value}'; known: {', '.join(known)}")
    return chosen
