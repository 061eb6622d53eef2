"""Manifests: questions and answers about clips, in OpenAQA's format.

A manifest is a file of records, either JSON Lines or one JSON list (as LTU distributes OpenAQA). A
record has OpenAQA's keys

    {"instruction": "...", "input": "", "audio_id": "x.flac", "dataset": "...", "task": "...", "output": "..."}

and may have ours: `id`; `turns`, a list of `{"question", "answer"}` instead of instruction and output;
`choices`, the allowed answers; `tags`, a list of `{"label", "start", "end"}` of the sound events in
the first clip. `audio_id` may be a list of clips; `<audio>` in a question is the position of each.

A record is read, parsed and validated on access. Files of any size are fine: the offsets of the records of a file of
more than some MB are in an index on disk (`pal.data.record_index`), which is made when the file is first opened.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, overload

from pal.audio import clip_exists
from pal.data.json_offsets import chunks, find_records
from pal.data.record_index import LARGE, Columns, RecordIndex, columns_of, open_index
from pal.data.record_source import RecordSource
from pal.errors import ManifestError
from pal.files import sha256, writing
from pal.types import TagSpan

PLACEHOLDER = "<audio>"
"""Position of a clip in a question."""

_KEYS = ("instruction", "input", "audio_id", "dataset", "task", "output", "id", "turns", "choices", "tags")
_PLAIN_KEYS = frozenset(("instruction", "input", "audio_id", "dataset", "task", "output", "id"))
"""Keys whose values are strings in OpenAQA."""
_DECODER = json.JSONDecoder()
_SURROGATE = re.compile(r"[\ud800-\udfff]")


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


class Manifest(RecordSource):
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
            if self._state[0] < LARGE:
                self._index = RecordIndex(*find_records(self.path))
            else:
                self._index = open_index(self.path, self._state, self._summaries)
        except OSError as error:
            remedy = "give the path of a manifest, a file of JSON Lines"
            raise ManifestError(f"{self.path}: cannot be read: {error.strerror}; {remedy}") from error

    def __reduce__(self) -> tuple[Callable[..., Manifest], tuple[object, ...]]:
        # Opened again, not copied: the arrays of an index are shared by all processes.
        return _reopened, (self.path.absolute(), self.root, self._state)

    def __len__(self) -> int:
        return len(self._index.starts_R)

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
    def base(self) -> Path:
        """See `RecordSource.base`."""
        return self.root or self.folder

    @property
    def is_list(self) -> bool:
        """Whether the file is a JSON list, not JSON Lines."""
        return self._index.is_list

    def raw(self) -> Iterator[bytes]:
        """Bytes of each record in the file, without separators."""
        with self._open() as file:
            for at in range(len(self)):
                yield self._read(file, self._index, at).rstrip(b"\r\n")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file's bytes, in hexadecimal."""
        return self._index.digest or sha256(self.path)

    @cached_property
    def columns(self) -> Columns:
        """Task, dataset and group of every record, for selecting and grouping records without parsing them.

        Raises:
            ManifestError: at the first faulty record. (Only for `root`, clips are not searched here.)
        """
        found = self._index.columns
        if found is None:
            found = columns_of(self._summaries(self._index), len(self))
        if found.faulty is not None:
            self[found.faulty]  # raises the error
        return found

    def where(self, index: int) -> str:
        """Position of a record in words: "line 3", or "item 3" of a JSON list, counted from 1."""
        if self.is_list:
            return f"item {index + 1}"
        with self.path.open("rb") as file:
            before = sum(chunk.count(b"\n") for chunk in chunks(file, int(self._index.starts_R[index])))
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
                if not clip_exists(clip):
                    raise ManifestError(f"{self.path}, {self.where(at)}: no audio file '{clip}'; is the root right?")

    def locate(self, audio_id: str) -> str:
        """The path of a clip, by the rules of `root`."""
        path = Path(audio_id)
        if self.root is None or not path.is_absolute():
            return os.path.normpath((self.root or self.folder) / path)
        parts = path.parts[1:]
        for first in range(len(parts)):
            candidate = self.root.joinpath(*parts[first:])
            if clip_exists(candidate):
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
        try:
            return self._record(self._read(file, self._index, at), at, self.locate)
        except (ValueError, RecursionError) as error:
            fault = str(error) if isinstance(error, _FaultError) else f"not valid JSON: {error}"
            if isinstance(error, UnicodeDecodeError):
                fault = f"not UTF-8 ({error.reason} at byte {error.start} of it); save the file as UTF-8"
            raise ManifestError(f"{self.path}, {self.where(at)}: {fault}") from None

    def _read(self, file: BinaryIO, index: RecordIndex, at: int) -> bytes:
        file.seek(int(index.starts_R[at]))
        return file.read(int(index.sizes_R[at]))

    def _record(self, text: bytes, at: int, locate: Callable[[str], str]) -> Record:
        return _record(json.loads(text, object_pairs_hook=_unique), self.path.stem, at, locate)

    def _summaries(self, index: RecordIndex) -> Iterator[tuple[tuple[str, ...], str, str] | None]:
        """(clips as they are named, task, dataset) of every record; None for a faulty one."""
        with self._open() as file:
            for at in range(len(index.starts_R)):
                quick = _quick_summary(self._read(file, index, at), self.path.stem)
                if quick is not None:
                    yield quick
                    continue
                try:
                    record = self._record(self._read(file, index, at), at, os.path.normpath)
                except (ValueError, RecursionError):
                    yield None
                else:
                    yield record.clips, record.task, record.dataset


def _reopened(path: Path, root: Path | None, state: tuple[int, int]) -> Manifest:
    manifest = Manifest(path, root)
    if _state(path.stat()) != state:
        raise ManifestError(f"{path}: changed since it was opened; open it again")
    return manifest


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


def _record(raw: Any, stem: str, at: int, locate: Callable[[str], str]) -> Record:
    if not isinstance(raw, dict):
        raise _FaultError("a record must be a JSON object")
    unknown = [key for key in raw if key not in _KEYS]
    if unknown:
        raise _FaultError(f"unknown key '{unknown[0]}'; known: {', '.join(_KEYS)}")
    clips = tuple(locate(clip) for clip in _audio_ids(raw))
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
        id=_text(raw, "id", f"{stem}:{at + 1}"),
        clips=clips,
        turns=turns,
        task=_text(raw, "task", "question"),
        dataset=_text(raw, "dataset", stem),
        choices=choices,
        tags=_tags(raw),
    )


def _quick_summary(text: bytes, stem: str) -> tuple[tuple[str, ...], str, str] | None:
    """Clips, task and dataset of a faultless record of OpenAQA's form, faster than by `_record`; None for others."""
    if b"\\u" in text or b"\\\\" in text or b"<" in text:
        return None
    try:
        raw = _DECODER.decode(text.decode())
    except (ValueError, RecursionError):
        return None
    if type(raw) is not dict or not raw.keys() <= _PLAIN_KEYS:
        return None
    # A pair has four quotes, so more of them are a key that comes twice.
    if text.count(b'"') - text.count(b'\\"') != 4 * len(raw) or not all(type(value) is str for value in raw.values()):
        return None
    clip, question = raw.get("audio_id"), raw.get("instruction")
    if not clip or not question or not question.strip() or "output" not in raw:
        return None
    return (os.path.normpath(clip),), raw.get("task", "question"), raw.get("dataset", stem)


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
