"""Manifests: questions and answers about clips, in OpenAQA's format.

A manifest is a file of records, either JSON Lines or one JSON list (as LTU distributes OpenAQA). A
record has OpenAQA's keys

    {"instruction": "...", "input": "", "audio_id": "x.flac", "dataset": "...", "task": "...", "output": "..."}

and may have ours: `id`; `turns`, a list of `{"question", "answer"}` instead of instruction and output;
`choices`, the allowed answers; `tags`, a list of `{"label", "start", "end"}` that says what sounds in
the first clip. `audio_id` may be a list of clips; `<audio>` in a question says where each stands.

Files of several GB are fine: only the places of the records are held, and a record is read, parsed
and checked when it is asked for.
"""

import hashlib
import json
import math
import mmap
import os
import re
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, overload

from pal.errors import ManifestError
from pal.types import TagSpan

PLACEHOLDER = "<audio>"
"""Stands in a question where a clip goes."""

_KEYS = ("instruction", "input", "audio_id", "dataset", "task", "output", "id", "turns", "choices", "tags")
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+("?)|[{}\[\]]', re.DOTALL)
"""A JSON string (with its closing quote, if any), or a bracket outside of strings."""


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Record:
    """One conversation about some clips, with the answers that are right."""

    id: str
    clips: tuple[str, ...]
    """Paths of the audio files."""
    turns: tuple[Turn, ...]
    task: str
    dataset: str
    choices: tuple[str, ...] | None = None
    """The allowed last answers; None when any text may be right."""
    tags: tuple[TagSpan, ...] | None = None
    """What sounds in the first clip; None when unknown."""


class Manifest(Sequence[Record]):
    """The records of a manifest file, read when asked for.

    Args:
        path: JSON Lines or a JSON list, UTF-8.
        root: folder of the audio. Without it relative paths are relative to the manifest's folder.
            With it they are relative to `root`, and an absolute path becomes its longest suffix that
            exists under `root`, so that a corpus may have moved.

    Raises:
        ManifestError: names the file, the line (or item of a list) and the fault: here for files that
            cannot be divided into records, on access for a faulty record.
    """

    def __init__(self, path: str | Path, root: str | Path | None = None) -> None:
        self.path = Path(path)
        self.folder = os.path.abspath(self.path.parent)
        self.root = None if root is None else os.path.abspath(os.path.expanduser(root))
        if self.root is not None and not os.path.isdir(self.root):
            raise ManifestError(f"{self.path}: the audio root '{root}' is not a folder")
        try:
            self._is_list = _starts_with_list(self.path)
            self._starts, self._sizes = _index_list(self.path) if self._is_list else _index_lines(self.path)
            self._state = _state(self.path)
        except OSError as error:
            raise ManifestError(f"{self.path}: cannot be read: {error.strerror}") from error

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        raw = self._read(at)
        try:
            return _record(json.loads(raw, object_pairs_hook=_unique), self, at)
        except (ValueError, RecursionError) as error:
            fault = str(error) if isinstance(error, _Fault) else f"not valid JSON: {error}"
            raise ManifestError(f"{self.path}, {self.where(at)}: {fault}") from None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file's bytes, in hexadecimal."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def where(self, index: int) -> str:
        """The place of a record in words: "line 3", or "item 3" of a JSON list; both count from 1."""
        if self._is_list:
            return f"item {index + 1}"
        with self.path.open("rb") as file:
            before = sum(chunk.count(b"\n") for chunk in _chunks(file, self._starts[index]))
        return f"line {before + 1}"

    def validate(self, files: bool = False) -> None:
        """Parse every record.

        Args:
            files: also require each audio file to be there. Reading them is `pal.data.check`'s.

        Raises:
            ManifestError: the first faulty record, missing file, or id that comes twice.
        """
        first: dict[str, int] = {}
        for at, record in enumerate(self):
            if record.id in first:
                raise ManifestError(
                    f"{self.path}, {self.where(at)}: id '{record.id}' is taken by {self.where(first[record.id])}"
                )
            first[record.id] = at
            for clip in record.clips if files else ():
                if not os.path.isfile(clip):
                    raise ManifestError(f"{self.path}, {self.where(at)}: no audio file '{clip}'; is the root right?")

    def locate(self, audio_id: str) -> str:
        """The path of a clip, by the rules of `root`."""
        if not os.path.isabs(audio_id):
            return os.path.normpath(os.path.join(self.root or self.folder, audio_id))
        if self.root is None:
            return os.path.normpath(audio_id)
        parts = Path(audio_id).parts[1:]
        for first in range(len(parts)):
            candidate = os.path.join(self.root, *parts[first:])
            if os.path.isfile(candidate):
                return os.path.normpath(candidate)
        raise _Fault(f"no part of the path '{audio_id}' exists under the root '{self.root}'")

    def _read(self, at: int) -> bytes:
        with self.path.open("rb") as file:
            if _state(file.fileno()) != self._state:
                raise ManifestError(f"{self.path}: changed since it was opened; open it again")
            file.seek(self._starts[at])
            return file.read(self._sizes[at])


def write_manifest(path: str | Path, records: Iterable[Record]) -> int:
    """Write records as JSON Lines, atomically: the old file stays until the new one is whole.

    Audio below the manifest's folder is written relative to it, so that the folder can be moved.
    Returns the number of records.
    """
    path = Path(path)
    folder = os.path.abspath(path.parent)
    os.makedirs(folder, exist_ok=True)
    count = 0
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=folder)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            for record in records:
                file.write(json.dumps(_raw(record, folder), ensure_ascii=False, allow_nan=False) + "\n")
                count += 1
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o666 & ~_umask())
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.unlink(partial)
    return count


class _Fault(ValueError):
    """A fault of one record; `Manifest` adds the file and the line."""


def _record(raw: Any, manifest: Manifest, at: int) -> Record:
    if not isinstance(raw, dict):
        raise _Fault("a record must be a JSON object")
    unknown = [key for key in raw if key not in _KEYS]
    if unknown:
        raise _Fault(f"unknown key '{unknown[0]}'; known: {', '.join(_KEYS)}")
    clips = tuple(manifest.locate(clip) for clip in _audio_ids(raw))
    turns = _turns(raw)
    placed = sum(turn.question.count(PLACEHOLDER) for turn in turns)
    if placed not in (0, len(clips)):
        raise _Fault(f"{placed} '{PLACEHOLDER}' in the questions but {len(clips)} clips; write one for each, or none")
    choices = _choices(raw)
    if choices is not None and turns[-1].answer not in choices:
        raise _Fault(f"the answer '{turns[-1].answer}' is not among the choices")
    return Record(
        id=_text(raw, "id", f"{manifest.path.stem}:{at + 1}"),
        clips=clips,
        turns=turns,
        task=_text(raw, "task", "question"),
        dataset=_text(raw, "dataset", manifest.path.stem),
        choices=choices,
        tags=_tags(raw),
    )


def _text(raw: dict[str, Any], key: str, default: str | None = None) -> str:
    value = raw.get(key, default)
    if value is None:
        raise _Fault(f"missing key '{key}'")
    if not isinstance(value, str):
        raise _Fault(f"'{key}' must be a string, not {json.dumps(value)[:40]}")
    return value


def _audio_ids(raw: dict[str, Any]) -> list[str]:
    if "audio_id" not in raw:
        raise _Fault("missing key 'audio_id' (a path, a list of paths, or [] for text alone)")
    value = raw["audio_id"]
    clips = [value] if isinstance(value, str) else value
    if not isinstance(clips, list) or not all(isinstance(clip, str) and clip for clip in clips):
        raise _Fault("'audio_id' must be a path or a list of paths")
    return clips


def _turns(raw: dict[str, Any]) -> tuple[Turn, ...]:
    if "turns" not in raw:
        question = _text(raw, "instruction")
        # LTU puts the optional input (in LTU-AS the spoken text) on a line of its own.
        given = _text(raw, "input", "")
        turns = [Turn(f"{question}\n{given}" if given else question, _text(raw, "output"))]
    else:
        twice = [key for key in ("instruction", "input", "output") if raw.get(key)]
        if twice:
            raise _Fault(f"'turns' stands instead of '{twice[0]}'; give one of them")
        items = raw["turns"]
        if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
            raise _Fault("'turns' must be a list of {question, answer}")
        for item in items:
            _known(item, ("question", "answer"), "turns")
        turns = [Turn(_text(item, "question"), _text(item, "answer")) for item in items]
    for turn in turns:
        if not turn.question.strip():
            raise _Fault("a question is empty")
        if PLACEHOLDER in turn.answer:
            raise _Fault(f"an answer holds '{PLACEHOLDER}'; clips may stand in questions only")
    return tuple(turns)


def _choices(raw: dict[str, Any]) -> tuple[str, ...] | None:
    choices = raw.get("choices")
    if choices is None:
        return None
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise _Fault("'choices' must be a list of strings")
    if len(set(choices)) != len(choices):
        raise _Fault("'choices' has an answer twice")
    return tuple(choices)


def _tags(raw: dict[str, Any]) -> tuple[TagSpan, ...] | None:
    tags = raw.get("tags")
    if tags is None:
        return None
    if not isinstance(tags, list) or not all(isinstance(tag, dict) for tag in tags):
        raise _Fault("'tags' must be a list of {label, start, end}")
    spans = []
    for tag in tags:
        _known(tag, ("label", "start", "end"), "tags")
        start, end = _seconds(tag, "start"), _seconds(tag, "end")
        if start is not None and end is not None and end < start:
            raise _Fault(f"a tag ends at {end} s, before it starts at {start} s")
        spans.append(TagSpan(_text(tag, "label"), start, end))
    return tuple(spans)


def _seconds(tag: dict[str, Any], key: str) -> float | None:
    value = tag.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise _Fault(f"'{key}' of a tag must be seconds from 0, not {json.dumps(value)}")
    return float(value)


def _known(item: dict[str, Any], keys: Sequence[str], where: str) -> None:
    for key in item:
        if key not in keys:
            raise _Fault(f"unknown key '{key}' in '{where}'; known: {', '.join(keys)}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _Fault(f"key '{twice}' comes twice")
    return result


def _raw(record: Record, folder: str) -> dict[str, Any]:
    """A record as it stands in a manifest in `folder`."""
    clips = [_portable(clip, folder) for clip in record.clips]
    raw: dict[str, Any] = {"id": record.id, "audio_id": clips[0] if len(clips) == 1 else clips}
    if len(record.turns) == 1:
        raw |= {"instruction": record.turns[0].question, "input": "", "output": record.turns[0].answer}
    else:
        raw["turns"] = [{"question": turn.question, "answer": turn.answer} for turn in record.turns]
    raw |= {"dataset": record.dataset, "task": record.task}
    if record.choices is not None:
        raw["choices"] = list(record.choices)
    if record.tags is not None:
        raw["tags"] = [
            {key: value for key, value in vars(tag).items() if value is not None} for tag in record.tags
        ]
    return raw


def _portable(clip: str, folder: str) -> str:
    path = os.path.abspath(clip)
    inside = os.path.commonpath([path, folder]) == folder
    return str(PurePosixPath(*Path(os.path.relpath(path, folder)).parts)) if inside else path


def _umask() -> int:
    # The umask can only be read by setting it; mkstemp's files are private without this.
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _state(file: Path | int) -> tuple[int, int]:
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def _chunks(file: Any, limit: int, size: int = 1 << 20) -> Iterator[bytes]:
    while limit > 0 and (chunk := file.read(min(size, limit))):
        limit -= len(chunk)
        yield chunk


def _starts_with_list(path: Path) -> bool:
    with path.open("rb") as file:
        for line in file:
            if text := line.removeprefix(b"\xef\xbb\xbf").strip():
                return text.startswith(b"[")
    raise ManifestError(f"{path}: is empty")


def _index_lines(path: Path) -> tuple[array, array]:
    starts, sizes = array("Q"), array("Q")
    place = 0
    with path.open("rb") as file:
        for line in file:
            skip = 3 if place == 0 and line.startswith(b"\xef\xbb\xbf") else 0
            if not line.isspace():
                starts.append(place + skip)
                sizes.append(len(line) - skip)
            place += len(line)
    return starts, sizes


def _index_list(path: Path) -> tuple[array, array]:
    """Places of the objects of a JSON list, found by counting brackets outside of strings.

    The file is mapped, not read: the system pages it in and out as the search passes through.
    """
    starts, sizes = array("Q"), array("Q")
    depth = start = 0
    between = None
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:

        def fault(what: str) -> ManifestError:
            return ManifestError(f"{path}, item {len(starts) + 1}: {what}")

        for token in _TOKEN.finditer(text):
            kind = token[0][:1]
            if kind == b'"':
                if not token[1]:
                    raise fault("the file ends inside a string; is it cut off?")
                if depth < 2:
                    raise fault("not an object")
                continue
            if depth <= 1:
                gap = text[between:token.start()].strip() if between is not None else b""
                # Only a comma may stand between two objects, and nothing around them.
                if gap != (b"," if starts and kind == b"{" else b"") or (depth == 1 and kind not in b"{]"):
                    raise fault("objects in a list must be divided by commas, with nothing else between them")
            if depth == 0 and between is not None:
                raise fault("text after the end of the list")
            if kind in b"{[":
                if depth == 1:
                    start = token.start()
                depth += 1
            else:
                depth -= 1
                if depth == 1:
                    starts.append(start)
                    sizes.append(token.end() - start)
            between = token.end()
        if depth:
            raise fault("the file ends before the list does; is it cut off?")
        if text[between:].strip():
            raise fault("text after the end of the list")
    return starts, sizes
