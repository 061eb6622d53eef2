"""What is asked: the clips of a manifest or of a folder, with the questions about them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pal.data.manifest import PLACEHOLDER, Manifest, Record, portable
from pal.errors import ManifestError, PromptError
from pal.folder_index import audio_files


@dataclass(frozen=True)
class ClipQuestion:
    """A question about a task's clips."""

    text: str
    before: tuple[tuple[str, str], ...] = ()
    """Question and expected answer of each turn before it."""
    id: str | None = None
    """Of the manifest's record."""
    expected: str | None = None
    """Answer of the manifest."""


@dataclass(frozen=True)
class ClipTask:
    """One clip, or the clips of one conversation, with all questions about them."""

    clips: tuple[str, ...]
    """Paths of the audio files."""
    questions: tuple[ClipQuestion, ...]
    fault: str | None = None
    """Why it cannot be asked about, where that is known before."""

    @cached_property
    def key(self) -> str:
        """SHA-256 of all of it."""
        return hashlib.sha256(self.line().encode()).hexdigest()

    def line(self) -> str:
        """The task as JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def read(cls, line: str) -> ClipTask:
        """Inverse of `line`."""
        raw = json.loads(line)
        questions = [
            ClipQuestion(**{**one, "before": tuple((asked, answer) for asked, answer in one["before"])})
            for one in raw["questions"]
        ]
        return cls(tuple(raw["clips"]), tuple(questions), raw["fault"])


@dataclass(frozen=True)
class BatchInput:
    """What is asked.

    Args:
        tasks: each clip once, in the order of the input.
        folder: to which clips are named relative in the output, where they lie below it.
        from_manifest: the questions are the manifest's own, so rows have `id` and `expected`.
        path: of the manifest or folder.
    """

    tasks: tuple[ClipTask, ...]
    folder: Path
    from_manifest: bool
    path: Path

    @cached_property
    def single(self) -> bool:
        """Whether each task has one clip: rows then have `clip`, else the list `clips`."""
        return all(len(task.clips) == 1 for task in self.tasks)

    def columns(self) -> list[str]:
        """Keys of a row."""
        own = ["expected"] if self.from_manifest else []
        head = ["id"] if self.from_manifest else []
        return [*head, "clip" if self.single else "clips", "question", "answer", *own, "audio_seconds", "error"]

    def names(self, task: ClipTask) -> list[str]:
        """Clips of a task as rows name them; bytes that are not UTF-8 as escapes."""
        names = [portable(clip, self.folder) for clip in task.clips]
        return [name.encode("utf-8", "backslashreplace").decode() for name in names]

    def rows(self, task: ClipTask, outcome: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Rows of a task: one for each question, with the reason in `error` where the clip is bad."""
        names, failed = self.names(task), outcome["failed"]
        answers = outcome["answers"] or [None] * len(task.questions)
        for question, answer in zip(task.questions, answers, strict=True):
            row = {
                "id": question.id,
                "clip": names[0] if names else None,
                "clips": names,
                "question": question.text,
                "answer": answer,
                "expected": question.expected,
                "audio_seconds": outcome["audio_seconds"],
                "error": failed,
            }
            yield {key: row[key] for key in self.columns()}


def read_input(path: Path, questions: Sequence[str] = (), root: Path | None = None) -> BatchInput:
    """Clips and questions of a manifest or of a folder.

    Args:
        path: manifest, or folder whose audio files, also those of folders below it, are asked about.
        questions: asked about each clip; without any, those of the manifest.
        root: folder of a manifest's audio, as `Manifest` takes it.

    Raises:
        ManifestError: a manifest or a record that cannot be used.
        PromptError: a question that is empty, there twice, or has `<audio>` more than once; none for a folder.
    """
    for question in questions:
        if not question.strip():
            raise PromptError("a question is empty; leave it out")
        if not question.isprintable() and any("\ud800" <= c <= "\udfff" for c in question):
            raise PromptError(f"the question '{question}' is not UTF-8; write it as UTF-8")
        if questions.count(question) > 1:
            raise PromptError(f"the question '{question}' is given twice; leave one out")
    asked = tuple(ClipQuestion(question) for question in questions)
    if path.is_dir():
        if not asked:
            raise PromptError(f"{path}: is a folder, so give questions: --ask QUESTION or --questions FILE")
        return BatchInput(tuple(_checked(task) for task in _of_folder(path, asked)), path, False, path)
    if not path.exists():
        raise ManifestError(f"{path}: no such file or folder; give a manifest, or a folder of audio files")
    manifest = Manifest(path, root)
    if not len(manifest):
        raise ManifestError(f"{path}: holds no record; give a manifest with some")
    grouped: dict[tuple[str, ...], list[ClipQuestion]] = {}
    for record in manifest:
        grouped.setdefault(record.clips, []).extend(() if asked else _of_record(record))
    tasks = tuple(_checked(ClipTask(clips, asked or tuple(own))) for clips, own in grouped.items())
    return BatchInput(tasks, manifest.root or manifest.folder, not asked, path)


def _of_folder(folder: Path, questions: tuple[ClipQuestion, ...]) -> Iterator[ClipTask]:
    paths, report = audio_files(folder)
    found = {str(path): None for path in paths} | {
        str(folder / name): f"{folder / name}: {why}" for name, why in report.failed.items()
    }
    if not found:
        raise ManifestError(f"{folder}: holds no audio file; give a folder with some")
    for path, fault in sorted(found.items()):
        yield ClipTask((path,), questions, fault)


def _of_record(record: Record) -> Iterator[ClipQuestion]:
    turns = [(turn.question, turn.answer) for turn in record.turns]
    for number, (question, answer) in enumerate(turns):
        yield ClipQuestion(question, tuple(turns[:number]), record.id, answer)


def _checked(task: ClipTask) -> ClipTask:
    """The task; raises PromptError where the placeholders of its own questions do not fit."""
    for question in task.questions:
        if not question.before and question.text.count(PLACEHOLDER) not in (0, len(task.clips)):
            raise PromptError(
                f"the question '{question.text}' has {question.text.count(PLACEHOLDER)} {PLACEHOLDER}, and is about "
                f"{len(task.clips)} clips; write one for each, or none"
            )
    return task
