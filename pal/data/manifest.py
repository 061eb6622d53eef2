"""Manifests: questions and answers about clips, in OpenAQA's format.

A manifest is a file of records, either JSON Lines or one JSON list (as LTU distributes OpenAQA). A
record has OpenAQA's keys

    {"instruction": "...", "input": "", "audio_id": "x.flac", "dataset": "...", "task": "...", "output": "..."}

and may have ours: `id`; `turns`, a list of `{"question", "answer"}` instead of instruction and output;
`choices`, the allowed answers; `tags`, a list of `{"label", "start", "end"}` of the sound events in
the first clip. `audio_id` may be a list of clips; `<audio>` in a question is the position of each.

Files of several GB are fine: only the offsets of the records are in memory, and a record is read,
parsed and validated on access.
"""

import hashlib
import json
import math
import mmap
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, overload

from pal.data.tables import not_utf_8
from pal.errors import ManifestError
from pal.files import writing
from pal.types import TagSpan

PLACEHOLDER = "<audio>"
"""Position of a clip in a question."""

_KEYS = ("instruction", "input", "audio_id", "dataset", "task", "output", "id", "turns", "choices", "tags")
_BOM = b"\xef\xbb\xbf"
_STRING = rb'"(?:[^"\\]++|\\.)*+'
_TOKEN = re.compile(_STRING + rb'("?)|[{}]', re.DOTALL)
"""A JSON string (with its closing quote, unless the file ends first), or a brace outside of strings."""
_FLAT_OBJECT = re.compile(rb"\{(?:[^{}\"]++|" + _STRING + rb'")*+\}', re.DOTALL)
"""An object without nested objects, as in OpenAQA: matched in one step, about ten times faster."""
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_GAP = re.compile(rb"[ \t\r\n]*+(,?)[ \t\r\n]*+([{\]]?)")


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Record:
    """Conversation about some clips, with the correct answers."""

    id: str
    clips: tuple[str, ...]
    """Paths of the audio files."""
    turns: tuple[Turn, ...]
    task: str
    dataset: str
    choices: tuple[str, ...] | None = None
    """Allowed values of the last answer; None for free text."""
    tags: tuple[TagSpan, ...] | None = None
    """Sound events of the first clip; None when unknown."""


class Manifest(Sequence[Record]):
    """Records of a manifest file, read on access.

    Args:
        path: JSON Lines or a JSON list, UTF-8.
        root: folder of the audio. Without it relative paths are relative to the manifest's folder.
            With it they are relative to `root`, and an absolute path is replaced by its longest suffix
            that exists under `root`, so that a corpus can be moved.

    Raises:
        ManifestError: with the file, the line (or item of a list) and the fault. Raised here for files
            that cannot be divided into records, and on access for a faulty record.
    """

    def __init__(self, path: str | Path, root: str | Path | None = None) -> None:
        self.path = Path(path)
        self.folder = _absolute(self.path.parent)
        self.root = None if root is None else _absolute(Path(root).expanduser())
        if self.root is not None and not self.root.is_dir():
            raise ManifestError(f"{self.path}: the audio root '{root}' is not a folder")
        try:
            self._state = _state(self.path.stat())
            self._is_list = _starts_with_list(self.path)
            self._starts, self._sizes = _index_list(self.path) if self._is_list else _index_lines(self.path)
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
        with self._open() as file:
            return self._parse(file, at)

    def __iter__(self) -> Iterator[Record]:
        with self._open() as file:
            for at in range(len(self)):
                yield self._parse(file, at)

    @property
    def is_list(self) -> bool:
        """Whether the file is a JSON list, not JSON Lines."""
        return self._is_list

    def raw(self) -> Iterator[bytes]:
        """Bytes of each record in the file, without separators."""
        with self._open() as file:
            for start, size in zip(self._starts, self._sizes, strict=True):
                file.seek(start)
                yield file.read(size).rstrip(b"\r\n")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file's bytes, in hexadecimal."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def where(self, index: int) -> str:
        """Position of a record in words: "line 3", or "item 3" of a JSON list, counted from 1."""
        if self._is_list:
            return f"item {index + 1}"
        with self.path.open("rb") as file:
            before = sum(chunk.count(b"\n") for chunk in _chunks(file, self._starts[index]))
        return f"line {before + 1}"

    def validate(self, files: bool = False) -> None:
        """Parse every record.

        Args:
            files: also require each audio file to exist. `pal.data.check` reads them, too.

        Raises:
            ManifestError: at the first faulty record, missing file, or duplicate id.
        """
        first: dict[str, int] = {}
        for at, record in enumerate(self):
            if record.id in first:
                raise ManifestError(
                    f"{self.path}, {self.where(at)}: id '{record.id}' is taken by {self.where(first[record.id])}"
                )
            first[record.id] = at
            for clip in record.clips if files else ():
                if not Path(clip).is_file():
                    raise ManifestError(f"{self.path}, {self.where(at)}: no audio file '{clip}'; is the root right?")

    def locate(self, audio_id: str) -> str:
        """The path of a clip, by the rules of `root`."""
        path = Path(audio_id)
        if self.root is None or not path.is_absolute():
            return os.path.normpath((self.root or self.folder) / path)
        parts = path.parts[1:]
        for first in range(len(parts)):
            candidate = self.root.joinpath(*parts[first:])
            if candidate.is_file():
                return os.path.normpath(candidate)
        raise _FaultError(f"no part of the path '{audio_id}' exists under the root '{self.root}'")

    def _open(self) -> BinaryIO:
        try:
            file = self.path.open("rb")
        except OSError as error:
            raise ManifestError(f"{self.path}: can no longer be read: {error.strerror}") from error
        if _state(os.fstat(file.fileno())) != self._state:
            file.close()
            raise ManifestError(f"{self.path}: changed since it was opened; open it again")
        return file

    def _parse(self, file: BinaryIO, at: int) -> Record:
        file.seek(self._starts[at])
        try:
            return _record(json.loads(file.read(self._sizes[at]), object_pairs_hook=_unique), self, at)
        except (ValueError, RecursionError) as error:
            fault = str(error) if isinstance(error, _FaultError) else f"not valid JSON: {error}"
            raise ManifestError(f"{self.path}, {self.where(at)}: {fault}") from None


def write_manifest(path: str | Path, records: Iterable[Record]) -> int:
    """Write records as JSON Lines, atomically.

    Audio below the manifest's folder is written relative to it, so that the folder can be moved.
    Returns the number of records.
    """
    path = Path(path)
    count = 0
    with writing(path) as file:
        for record in records:
            text = json.dumps(_raw(record, path.parent), ensure_ascii=False, allow_nan=False) + "\n"
            try:
                file.write(text.encode())
            except UnicodeEncodeError:
                raise ManifestError(
                    f"{path}: record '{record.id}' has a clip whose name is not UTF-8; rename the file"
                ) from None
            count += 1
    return count


class _FaultError(ValueError):
    """Fault of one record; `Manifest` adds the file and the line."""


def _record(raw: Any, manifest: Manifest, at: int) -> Record:
    if not isinstance(raw, dict):
        raise _FaultError("a record must be a JSON object")
    unknown = [key for key in raw if key not in _KEYS]
    if unknown:
        raise _FaultError(f"unknown key '{unknown[0]}'; known: {', '.join(_KEYS)}")
    clips = tuple(manifest.locate(clip) for clip in _audio_ids(raw))
    turns = _turns(raw)
    placed = sum(turn.question.count(PLACEHOLDER) for turn in turns)
    if placed not in (0, len(clips)):
        raise _FaultError(
            f"{placed} '{PLACEHOLDER}' in the questions but {len(clips)} clips; write one for each, or none"
        )
    choices = _choices(raw)
    if choices is not None and turns[-1].answer not in choices:
        raise _FaultError(f"the answer '{turns[-1].answer}' is not among the choices")
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
        raise _FaultError(f"missing key '{key}'")
    if not isinstance(value, str):
        raise _FaultError(f"'{key}' must be a string, not {json.dumps(value)[:40]}")
    if _SURROGATE.search(value):
        raise _FaultError(f"'{key}' holds half a surrogate pair, which is no character; write it as UTF-8")
    return value


def _audio_ids(raw: dict[str, Any]) -> list[str]:
    if "audio_id" not in raw:
        raise _FaultError("missing key 'audio_id' (a path, a list of paths, or [] for text alone)")
    value = raw["audio_id"]
    clips = [value] if isinstance(value, str) else value
    if not isinstance(clips, list) or not all(isinstance(clip, str) and clip for clip in clips):
        raise _FaultError("'audio_id' must be a path or a list of paths")
    return clips


def _turns(raw: dict[str, Any]) -> tuple[Turn, ...]:
    if "turns" not in raw:
        question = _text(raw, "instruction")
        # As in LTU, the optional input (in LTU-AS the transcript) is a line of its own.
        given = _text(raw, "input", "")
        turns = [Turn(f"{question}\n{given}" if given else question, _text(raw, "output"))]
    else:
        twice = [key for key in ("instruction", "input", "output") if raw.get(key)]
        if twice:
            raise _FaultError(f"'turns' stands instead of '{twice[0]}'; give one of them")
        items = raw["turns"]
        if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
            raise _FaultError("'turns' must be a list of {question, answer}")
        for item in items:
            _known(item, ("question", "answer"), "turns")
        turns = [Turn(_text(item, "question"), _text(item, "answer")) for item in items]
    for turn in turns:
        if not turn.question.strip():
            raise _FaultError("a question is empty")
        if PLACEHOLDER in turn.answer:
            raise _FaultError(f"an answer holds '{PLACEHOLDER}'; clips may stand in questions only")
    return tuple(turns)


def _choices(raw: dict[str, Any]) -> tuple[str, ...] | None:
    choices = raw.get("choices")
    if choices is None:
        return None
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise _FaultError("'choices' must be a list of strings")
    if len(set(choices)) != len(choices):
        raise _FaultError("'choices' has an answer twice")
    return tuple(choices)


def _tags(raw: dict[str, Any]) -> tuple[TagSpan, ...] | None:
    tags = raw.get("tags")
    if tags is None:
        return None
    if not isinstance(tags, list) or not all(isinstance(tag, dict) for tag in tags):
        raise _FaultError("'tags' must be a list of {label, start, end}")
    spans = []
    for tag in tags:
        _known(tag, ("label", "start", "end"), "tags")
        start, end = _seconds(tag, "start"), _seconds(tag, "end")
        if start is not None and end is not None and end < start:
            raise _FaultError(f"a tag ends at {end} s, before it starts at {start} s")
        spans.append(TagSpan(_text(tag, "label"), start, end))
    return tuple(spans)


def _seconds(tag: dict[str, Any], key: str) -> float | None:
    value = tag.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise _FaultError(f"'{key}' of a tag must be seconds from 0, not {json.dumps(value)}")
    return float(value)


def _known(item: dict[str, Any], keys: Sequence[str], where: str) -> None:
    for key in item:
        if key not in keys:
            raise _FaultError(f"unknown key '{key}' in '{where}'; known: {', '.join(keys)}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _FaultError(f"key '{twice}' comes twice")
    return result


def _raw(record: Record, folder: Path) -> dict[str, Any]:
    """JSON values of a record for a manifest in `folder`."""
    clips = [portable(clip, folder) for clip in record.clips]
    raw: dict[str, Any] = {"id": record.id, "audio_id": clips[0] if len(clips) == 1 else clips}
    if len(record.turns) == 1:
        raw |= {"instruction": record.turns[0].question, "input": "", "output": record.turns[0].answer}
    else:
        raw["turns"] = [{"question": turn.question, "answer": turn.answer} for turn in record.turns]
    raw |= {"dataset": record.dataset, "task": record.task}
    if record.choices is not None:
        raw["choices"] = list(record.choices)
    if record.tags is not None:
        raw["tags"] = [{key: value for key, value in vars(tag).items() if value is not None} for tag in record.tags]
    return raw


def portable(clip: str, folder: Path) -> str:
    """A clip's path for a manifest in `folder`: relative to it where the clip lies below, else absolute."""
    path, folder = _absolute(Path(clip)), _absolute(folder)
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def _absolute(path: Path) -> Path:
    # Not resolve(): symbolic links are kept as they are.
    return Path(os.path.normpath(path.absolute()))


def _state(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _chunks(file: BinaryIO, limit: int, size: int = 1 << 20) -> Iterator[bytes]:
    while limit > 0 and (chunk := file.read(min(size, limit))):
        limit -= len(chunk)
        yield chunk


def _starts_with_list(path: Path) -> bool:
    with path.open("rb") as file:
        # Not by lines: a list of several GB may be a single line.
        for number, chunk in enumerate(_chunks(file, path.stat().st_size)):
            if number == 0 and (fault := not_utf_8(chunk)):
                raise ManifestError(f"{path}: {fault}")
            if text := (chunk if number else chunk.removeprefix(_BOM)).strip():
                return text.startswith(b"[")
    raise ManifestError(f"{path}: is empty")


def _index_lines(path: Path) -> tuple[array, array]:
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


def _index_list(path: Path) -> tuple[array, array]:
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
