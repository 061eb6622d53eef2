"""`ClipWorker`: asks about clips as `pal ask` does, and writes the outcomes into its part."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pal import bundle, long_clips
from pal.audio import Waveform
from pal.batch.parts import AnswerParts, PartWriter, stamp
from pal.batch.tasks import ClipQuestion, ClipTask
from pal.data.manifest import Record, Turn
from pal.data.prompts import conversation_of
from pal.errors import ConfigError, PalError, WeightsWarning, first_sentence, shortened

if TYPE_CHECKING:
    from pal.model import PalModel

TOGETHER = 32
"""Most questions about a clip that are answered at once."""
_LONGEST = 290
"""Most characters of a reason."""
_TRIES = 2
"""Workers that a clip may end before it counts as bad."""


@dataclass(frozen=True)
class WorkerOptions:
    """How a worker asks."""

    model: str
    """Folder of a bundle, or Hub id."""
    parts: Path
    """Folder of the parts."""
    other_weights: bool = False
    max_new_tokens: int = 64
    read_to_end: bool = False
    gpus: float = 0.0
    """GPUs of a worker; 0 asks on the CPU."""
    digest: str | None = None
    """Of the model that gave the answers so far."""


@dataclass(frozen=True)
class TaskReport:
    """What a worker reports of a task; answers are in its part."""

    key: str
    failed: str | None = None
    notes: tuple[str, ...] = ()
    fatal: str | None = None
    """Why no task can be done, such as a model that cannot be loaded."""


class ClipWorker:
    """Asks tasks, with one model, which is loaded at the first of them.

    Args:
        options: of the run.
        model: loaded already; None loads `options.model`.
    """

    def __init__(self, options: WorkerOptions, model: PalModel | None = None) -> None:
        self.options = options
        self._model = model
        self._writer: PartWriter | None = None
        self._done: set[str] = set()
        self._begun: Mapping[str, int] = {}
        """How often each other clip was begun in this run."""

    def __call__(self, task: ClipTask) -> TaskReport:
        """Ask a task and write its outcome."""
        notes: tuple[str, ...] = ()
        try:
            if self._writer is None:
                notes = self._start()
        except PalError as error:
            return TaskReport(task.key, fatal=str(error))
        assert self._writer is not None and self._model is not None
        if task.key in self._done:  # by a worker that ended before it could report
            return TaskReport(task.key, notes=notes)
        self._writer.begin(task.key)
        outcome: dict[str, Any] = {"answers": None, "audio_seconds": None, "failed": task.fault, "notes": []}
        outcome["files"] = stamp(task.clips)
        if self._begun.get(task.key, 0) >= _TRIES:
            what = f"ended {self._begun[task.key]} workers that asked about it, maybe for want of memory"
            clips = shortened(", ".join(task.clips), 100)
            outcome["failed"] = f"{clips}: {what}; give fewer --workers, or leave it out"
        if outcome["failed"] is None:
            try:
                outcome |= self._ask(self._model, task)
            except PalError as error:
                outcome["failed"] = str(error)
            except Exception as error:  # one clip's error is listed and does not end the run
                what = f"{', '.join(task.clips)}: {type(error).__name__}: {first_sentence(error)}"
                outcome["failed"] = shortened(what, _LONGEST)
        self._writer.add(task.key, outcome)
        return TaskReport(task.key, outcome["failed"], (*notes, *outcome["notes"]))

    def close(self) -> None:
        """Close the part."""
        if self._writer is not None:
            self._writer.close()

    def _start(self) -> tuple[str, ...]:
        """Load the model and open the part; notes on the model."""
        notes = []
        if self._model is None:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", WeightsWarning)
                self._model = bundle.load(self.options.model, other_weights=self.options.other_weights)
            notes = [str(one.message) for one in caught if issubclass(one.category, WeightsWarning)]
            if self.options.gpus:
                self._model.to("cuda")
        if self._model.config.notice:
            notes.append(self._model.config.notice)
        digest = self._model.digest
        if self.options.digest not in (None, digest):
            raise ConfigError(
                f"{self.options.parts}: holds an unfinished run of another model; give another --out, or --overwrite"
            )
        parts = AnswerParts(self.options.parts.with_suffix(""))
        self._begun = parts.reload()
        self._done = set(parts.kept)
        self._writer = PartWriter(self.options.parts, digest)
        return tuple(notes)

    def _ask(self, model: PalModel, task: ClipTask) -> dict[str, Any]:
        """Answers to a task's questions, which share the encoded clips."""
        options: dict[str, Any] = {"max_new_tokens": self.options.max_new_tokens}
        audio: list[Any] = list(task.clips)
        alone = [question for question in task.questions if not question.before and len(audio) == 1]
        chats = [question for question in task.questions if question.before or len(audio) != 1]
        found: dict[ClipQuestion, str] = {}
        if chats or len(alone) > TOGETHER:  # several calls, so read and encoded before
            read = [long_clips.read(model, clip, False, self.options.read_to_end) for clip in audio]
            notes = [line for _, lines in read for line in lines]
            audio = [model.encode_clip(clip) if isinstance(clip, Waveform) else clip for clip, _ in read]
            seconds = float(sum(clip.seconds for clip, _ in read))
        else:
            texts = [question.text for question in alone]
            made = model.ask_detailed(audio, texts, read_to_end=self.options.read_to_end, **options)
            found = dict(zip(alone, (answer.text for answer in made), strict=True))
            notes, seconds, alone = list(made[0].notes), made[0].audio_seconds, []
        for start in range(0, len(alone), TOGETHER):
            some = alone[start : start + TOGETHER]
            made = model.ask_detailed(audio, [question.text for question in some], **options)
            found |= {question: answer.text for question, answer in zip(some, made, strict=True)}
        for question in chats:
            turns = tuple(Turn(*turn) for turn in (*question.before, (question.text, "")))
            record = Record("", task.clips, turns, "", "")
            chat = conversation_of(record, with_answers=False, style=model.config.style)
            found[question] = model.ask_detailed(audio, chat, **options)[0].text
        return {"answers": [found[one] for one in task.questions], "audio_seconds": seconds, "notes": notes}
