"""Check of a manifest before training: reads every record and every clip."""

from __future__ import annotations

import json
import os
import statistics
import sys
from array import array
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import groupby, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

import pal.audio
from pal.data.manifest import PLACEHOLDER, Manifest, Record
from pal.data.prompts import conversation_of, encode
from pal.errors import AudioError, ManifestError, PromptError, shortened
from pal.types import AUDIO, IGNORE, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RATE = 16_000
"""Sampling rate in Hz to which clips are decoded; any rate shows the same faults."""

_CLIPS_AT_ONCE = 256
"""Clips submitted to the threads at once, so that Ctrl-C never waits for a whole corpus."""

_ANSWERS_HELD = 10_000
"""Most distinct answers counted for a task; open-ended tasks have millions."""

_SHOWN = 12
"""Most answers, tags and faults in a list of the text report; the JSON has all that were counted."""

_WIDEST = 1000
"""Most characters of a line about a fault."""


@dataclass
class UnusableItem:
    """A record or clip that cannot be used."""

    where: str
    """Line or item of the record, or path of the clip."""
    reason: str


@dataclass
class Durations:
    """Statistics of the lengths of readable clips, in seconds."""

    min: float
    median: float
    max: float
    total: float


@dataclass
class ManifestReport:
    """Report of `check`."""

    manifest: str
    digest: str
    records: int
    clips: int
    """Distinct audio files."""
    clips_read: int
    complete: bool
    """False when the check was interrupted."""
    seconds: Durations | None
    """None when no clip could be read."""
    datasets: dict[str, int]
    answers: dict[str, dict[str, int]]
    """Task -> answer -> count, most frequent first."""
    tags: dict[str, int]
    bad: list[UnusableItem] = field(default_factory=list)
    bad_records: list[int] = field(default_factory=list)
    """Indices of unusable records, from 0."""
    bad_clips: list[str] = field(default_factory=list)
    """Paths of unreadable clips."""
    notes: list[UnusableItem] = field(default_factory=list)
    """With `read_to_end`: clips read to the end of the file, and why their length could not be checked."""
    example: str | None = None
    """Rendered example record with its trained tokens between ⟦ and ⟧; None without a tokenizer."""

    @property
    def ok(self) -> bool:
        """Whether the check is complete and found no fault."""
        return self.complete and not self.bad and self.records > 0

    def to_dict(self) -> dict[str, Any]:
        """The whole report as JSON-compatible values."""
        return {"ok": self.ok, **asdict(self)}

    def to_json(self) -> str:
        """The whole report as JSON text."""
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=2)

    def to_text(self) -> str:
        """The report as text, with long lists shortened."""
        lines = [f"{self.manifest}: {self.records} records, {self.clips} clips, {len(self.bad)} bad"]
        if self.seconds is not None:
            times = self.seconds
            lines.append(
                f"seconds: min {times.min:.2f}, median {times.median:.2f}, max {times.max:.2f}, "
                f"total {times.total:.0f} ({times.total / 3600:.2f} h)"
            )
        lines.append(f"data sets: {_listed(self.datasets)}")
        lines += [f"answers of '{task}': {_listed(answers)}" for task, answers in self.answers.items()]
        if self.tags:
            lines.append(f"tags: {_listed(self.tags)}")
        if self.example is not None:
            lines += ["one record, the trained tokens between ⟦ and ⟧:", self.example]
        lines += [f"note: {fault.where}: {fault.reason}" for fault in self.notes[:_SHOWN]]
        if len(self.notes) > _SHOWN:
            lines.append(f"... and {len(self.notes) - _SHOWN} more notes; the JSON report lists them")
        lines += [shortened(f"bad: {fault.where}: {fault.reason}", _WIDEST) for fault in self.bad[:_SHOWN]]
        if len(self.bad) > _SHOWN:
            lines.append(f"... and {len(self.bad) - _SHOWN} more; the JSON report lists them")
        if not self.complete:
            lines.append(f"interrupted after {self.clips_read} clips; run it again for the rest")
        elif self.records == 0:
            lines.append("not usable: no records")
        else:
            lines.append("ok" if self.ok else "not usable as it is: mend or remove the items listed as bad")
        return "\n".join(lines)


def check(
    manifest: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    root: str | Path | None = None,
    progress: bool = True,
    read_to_end: bool = False,
) -> ManifestReport:
    """Read every record and every clip of a manifest.

    Args:
        manifest: path of the file.
        tokenizer: if set, every record is tokenised and one is shown.
        root: folder of the audio, see `Manifest`.
        progress: show a progress bar on stderr, if that is a terminal.
        read_to_end: read clips of unknown length to the end of the file, as in `pal.audio.load`.

    Returns:
        The report. Ctrl-C ends the check early and returns the partial report.

    Raises:
        ManifestError: the file cannot be divided into records. Faulty records are listed instead.
    """
    records = Manifest(manifest, root)
    bad: list[UnusableItem] = []
    bad_records: list[int] = []
    bad_clips: list[str] = []
    notes: list[UnusableItem] = []
    example = None
    ids: dict[str, int] = {}
    # Answers are counted by task, in the order of first occurrence.
    answers: dict[str, Counter[str]] = {}
    datasets: Counter[str] = Counter()
    tagged: set[tuple[Any, str]] = set()
    """Clips with each tag, however many records ask about them."""
    clips: dict[str, None] = {}
    durations = array("d")
    read = 0
    try:
        for at in tqdm(range(len(records)), "records", delay=2, disable=None if progress else True, file=sys.stderr):
            try:
                record = records[at]
                tokens = None if tokenizer is None else _encoded(tokenizer, record)
            except (ManifestError, PromptError) as error:
                where = records.where(at)
                bad.append(UnusableItem(where, str(error).removeprefix(f"{records.path}, {where}: ")))
                bad_records.append(at)
                continue
            if record.id in ids:
                other = records.where(ids[record.id])
                bad.append(UnusableItem(records.where(at), f"id '{record.id}' is taken by {other}"))
                bad_records.append(at)
            ids.setdefault(record.id, at)
            if example is None and tokenizer is not None and tokens is not None:
                example = marked(tokenizer, tokens)
            datasets[record.dataset] += 1
            counted = answers.setdefault(record.task, Counter())
            for turn in record.turns:
                if turn.answer in counted or len(counted) < _ANSWERS_HELD:
                    counted[turn.answer] += 1
            tagged.update((tuple(record.clips), tag.label) for tag in record.tags or ())
            clips.update(dict.fromkeys(record.clips))
        for path, outcome in _read_all(list(clips), progress, read_to_end):
            read += 1
            if isinstance(outcome, str):
                bad.append(UnusableItem(path, outcome))
                bad_clips.append(path)
                continue
            durations.append(outcome.seconds)
            if outcome.note is not None:
                notes.append(UnusableItem(path, outcome.note))
        complete = True
    except KeyboardInterrupt:
        complete = False
    return ManifestReport(
        manifest=str(manifest),
        digest=records.digest,
        records=len(records),
        clips=len(clips),
        clips_read=read,
        complete=complete,
        seconds=_summary(durations),
        datasets=dict(datasets.most_common()),
        answers={task: dict(counted.most_common()) for task, counted in answers.items()},
        tags=dict(Counter(label for _, label in sorted(tagged, key=str)).most_common()),
        bad=bad,
        bad_records=bad_records,
        bad_clips=bad_clips,
        notes=notes,
        example=example,
    )


def marked(tokenizer: PreTrainedTokenizerBase, tokens: Tokens) -> str:
    """Text of the tokens, with the trained ones between ⟦ and ⟧."""
    labels = tokens.labels or [IGNORE] * len(tokens.ids)
    text = ""
    kinds = ((label != IGNORE, token == AUDIO, token) for token, label in zip(tokens.ids, labels, strict=True))
    for (trained, is_audio), run in groupby(kinds, key=lambda kind: kind[:2]):
        ids = [token for *_, token in run]
        part = PLACEHOLDER * len(ids) if is_audio else tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        text += f"⟦{part}⟧" if trained else str(part)
    return text


def _encoded(tokenizer: PreTrainedTokenizerBase, record: Record) -> Tokens:
    return encode(tokenizer, conversation_of(record), range(len(record.clips)), train=True)


def _read_all(paths: list[str], progress: bool, read_to_end: bool) -> Iterator[tuple[str, _Clip | str]]:
    """Each path with its clip, or with the reason why it cannot be read."""
    # decoding and resampling release the GIL
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        bar = tqdm(total=len(paths), desc="clips", delay=2, disable=None if progress else True, file=sys.stderr)
        with bar:
            for first in range(0, len(paths), _CLIPS_AT_ONCE):
                some = paths[first : first + _CLIPS_AT_ONCE]
                for path, outcome in zip(some, threads.map(_read, some, repeat(read_to_end)), strict=True):
                    bar.update()
                    yield path, outcome


class _Clip(NamedTuple):
    seconds: float
    note: str | None


def _read(path: str, read_to_end: bool) -> _Clip | str:
    try:
        wave = pal.audio.load(path, RATE, name="clip", read_to_end=read_to_end)
        return _Clip(wave.seconds, wave.note)
    except (AudioError, OSError) as error:
        return str(error).removeprefix("clip: ")


def _summary(durations: array[float]) -> Durations | None:
    if not durations:
        return None
    return Durations(min(durations), statistics.median(durations), max(durations), sum(durations))


def _listed(counts: dict[str, Any]) -> str:
    shown = [f"{name if len(name) <= 60 else name[:59] + '…'} {count}" for name, count in counts.items()][:_SHOWN]
    more = len(counts) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
