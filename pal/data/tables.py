"""Shared helpers of the readers of published data sets: tables, and the files of their clips."""

import csv
import json
import logging
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pal.errors import ManifestError

logger = logging.getLogger(__name__)

SUFFIXES = (
    *(".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".au", ".webm", ".oga", ".aiff", ".aif", ".aifc"),
    *(".snd", ".caf", ".w64", ".rf64", ".wave", ".aac", ".mp2", ".mka"),
)
"""Audio file suffixes; also tried for a clip that a table lists with another suffix or without one."""

_NOT_UTF_8 = "it is {0}, not UTF-8; convert it: iconv -f {0} -t UTF-8 IN > OUT"
_PUT_BY_SYSTEMS = frozenset(
    [
        *("__macosx", ".ds_store", ".appledouble", ".spotlight-v100", ".trashes", ".fseventsd", ".temporaryitems"),
        *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "@eadir"),
    ]
)
"""Names of system files and folders of macOS, Windows and storage boxes, in lower case."""


def is_metadata(path: Path) -> bool:
    """Whether a path is a system file, by the names of its parts; macOS writes "._x" beside x."""
    return any(part.startswith("._") or part.lower() in _PUT_BY_SYSTEMS for part in path.parts)


def files_in(root: Path, pattern: str, suffixes: Iterable[str] = ()) -> list[Path]:
    """Files below a folder, sorted, without system files, whose number is logged.

    Args:
        root: the folder.
        pattern: of paths below it, as `Path.glob` takes it.
        suffixes: in lower case; none for all.

    Raises:
        ManifestError: a name that is not UTF-8, which no manifest can hold.
    """
    wanted = frozenset(suffixes)
    found = sorted(path for path in root.glob(pattern) if not wanted or path.suffix.lower() in wanted)
    left_out = [path for path in found if is_metadata(path.relative_to(root))]
    if left_out:
        logger.warning(
            "%s: %d files that macOS or Windows put there are left out, such as '%s'",
            root,
            len(left_out),
            left_out[0].relative_to(root),
        )
    kept = [path for path in found if not is_metadata(path.relative_to(root)) and not path.is_dir()]
    for path in kept:
        try:
            str(path.relative_to(root)).encode()
        except UnicodeEncodeError:
            raise ManifestError(f"{path}: the name is not UTF-8, as a manifest is; rename the file") from None
    return kept


def text_of(path: Path) -> str:
    """Text of a UTF-8 file. Raises ManifestError if it has another encoding."""
    data = path.read_bytes()
    if fault := not_utf_8(data):
        raise ManifestError(f"{path}: {fault}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: it is not UTF-8 (at byte {error.start}); write it as UTF-8") from None


def not_utf_8(start: bytes) -> str | None:
    """Fault and remedy if a file starts as UTF-16 or UTF-32, by its byte order mark or zeros in its first letters."""
    zeros = [byte == 0 for byte in start[:4]]
    if start.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")) or zeros in ([False] + [True] * 3, [True] * 3 + [False]):
        return _NOT_UTF_8.format("UTF-32")
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or zeros in ([False, True] * 2, [True, False] * 2):
        return _NOT_UTF_8.format("UTF-16")
    return None


def lines_of(path: Path) -> list[str]:
    """Lines of a file, split at line feeds only: other separators of `str.splitlines` may be in a JSON string.

    Raises:
        ManifestError: the file is not UTF-8.
    """
    return [line.removesuffix("\r") for line in text_of(path).split("\n")]


def rows(
    table: Path,
    columns: Sequence[str],
    dataset: str,
    *,
    header: bool = True,
    delimiter: str = ",",
    optional: bool = False,
) -> list[dict[str, str]]:
    """Rows of a CSV table, as column -> cell.

    Args:
        table: CSV, UTF-8.
        columns: required columns; without a header, the names of the columns in order.
        dataset: its name, for messages.
        header: whether the first line names the columns.
        delimiter: between the columns.
        optional: cells of `columns` may be empty.

    Raises:
        ManifestError: no such file, not a table, a column is missing or, unless `optional`, empty.
    """
    if not table.is_file():
        raise ManifestError(f"{table}: missing; give the folder of {dataset} as it was unpacked")
    try:
        with table.open("rb") as start:
            if fault := not_utf_8(start.read(4)):
                raise ManifestError(f"{table}: not a CSV table: {fault}")
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, None if header else list(columns), delimiter=delimiter)
            missing = [column for column in columns if column not in (reader.fieldnames or ())]
            if missing:
                raise ManifestError(f"{table}: no column '{missing[0]}'; {dataset}'s has {', '.join(columns)}")
            found = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"{table}: not a CSV table: {error}") from error
    for number, row in enumerate(found, start=2 if header else 1):
        if any(row[column] is None or not (optional or row[column].strip()) for column in columns):
            raise ManifestError(f"{table}, line {number}: a column is empty")
    return found


def records(path: Path, keys: Sequence[str], dataset: str) -> list[dict[str, Any]]:
    """Objects of a JSON list or of JSON Lines, each of which must have `keys`.

    Raises:
        ManifestError: no such file, not JSON, or an object without one of the keys.
    """
    if not path.is_file():
        raise ManifestError(f"{path}: missing; give the folder of {dataset} as it was unpacked")
    text = text_of(path)
    found = []
    if text.lstrip().startswith("["):
        found = _json(text, str(path))
    else:
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                found.append(_json(line, f"{path}, line {number}"))
    for number, one in enumerate(found, start=1):
        missing = [key for key in keys if not isinstance(one, dict) or key not in one]
        if missing:
            raise ManifestError(f"{path}, item {number}: no key '{missing[0]}'; {dataset}'s have {', '.join(keys)}")
    return found


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{where}: not valid JSON: {error}") from None


_FORMS: tuple[Literal["NFC", "NFD"], ...] = ("NFC", "NFD")


def find_clip(folders: Iterable[Path], names: Iterable[str], listed_in: Path) -> Path:
    """File of a clip: the first match of `names` in `folders`, else the same name with another audio suffix.

    Raises:
        ManifestError: not found; names the first path tried and the table.
    """
    # composed and decomposed Unicode are different file names; macOS and its archives use the latter
    forms = dict.fromkeys(n for name in names for n in (name, *(unicodedata.normalize(f, name) for f in _FORMS)))
    places = [folder / name for folder in folders for name in forms if not is_metadata(Path(name))]
    if not places:
        raise ManifestError(f"{listed_in}: lists '{next(iter(forms))}', which macOS put there; remove the line")
    for place in places:
        if place.is_file():
            return place
    for place in places:
        # not with_suffix: a name without a suffix may hold a dot
        stem = place.name.removesuffix(place.suffix) if place.suffix.lower() in SUFFIXES else place.name
        for suffix in SUFFIXES:
            other = place.with_name(stem + suffix)
            if other.is_file():
                return other
    raise ManifestError(f"{places[0]}: missing, but {listed_in.name} lists it; unpack the data set again")


def json_file(root: Path, names: Sequence[str], what: str) -> Path:
    """First existing file of `names`, each also tried with `.jsonl` for `.json` and the reverse.

    Publishers change between the two; `records` reads either. Raises ManifestError that names them all.
    """
    swapped = {".json": ".jsonl", ".jsonl": ".json"}
    others = {name: str(Path(name).with_suffix(swapped.get(Path(name).suffix, Path(name).suffix))) for name in names}
    return first_file(root, list(dict.fromkeys(one for name in names for one in (name, others[name]))), what)


def first_file(root: Path, names: Sequence[str], what: str) -> Path:
    """First existing file of `names`. Raises ManifestError that names them all."""
    for name in names:
        if (root / name).is_file():
            return root / name
    listed = f"neither {' nor '.join(names)}" if len(names) > 1 else f"no {names[0]}"
    raise ManifestError(f"{root}: {listed} is there; give {what}")
