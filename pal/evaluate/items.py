"""Evaluation question with its references: the interface between benchmarks, models and scoring rules."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pal.audio import clip_size
from pal.data.manifest import PLACEHOLDER, Record, Turn


@dataclass(frozen=True)
class Item:
    """Question of a benchmark."""

    id: str
    """Unique in the benchmark, and the same in every run."""
    clips: tuple[str, ...]
    """Paths of the audio; the bootstrap draws all questions about the same clips together."""
    prompt: str
    """The question, with its choices if the benchmark shows them."""
    references: tuple[str, ...]
    """Correct answers: the one option, all labels of the clip, every caption, or the transcript."""
    choices: tuple[str, ...] | None = None
    """Options in the order shown, or all labels of the data set; None for free text."""
    category: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Axis -> the item's values, such as {"difficulty": ("hard",)}; results have a score for each value."""
    before: tuple[Turn, ...] = ()
    """Earlier turns of the conversation, part of the prompt with their reference answers."""


def one_reference(record: Record, prompt: str, category: Mapping[str, tuple[str, ...]] | None = None) -> Item:
    """Item of a record with one turn, whose answer is the reference."""
    return Item(record.id, record.clips, prompt, (record.turns[0].answer,), record.choices, category or {})


def each_turn(record: Record, last: bool = False) -> Iterator[Item]:
    """Items of a record's turns, or of its last turn, with earlier turns as history and the id `record#turn`.

    The choices belong to the last turn.
    """
    placed = [turn.question.count(PLACEHOLDER) for turn in record.turns]
    end = len(record.turns) - 1
    for number, turn in enumerate(record.turns):
        if last and number != end:
            continue
        yield Item(
            id=f"{record.id}#{number}" if end else record.id,
            clips=record.clips[: sum(placed[: number + 1])] if any(placed) else record.clips,
            prompt=turn.question,
            references=(turn.answer,),
            choices=record.choices if number == end else None,
            category={"task": (record.task,)},
            before=record.turns[:number],
        )


def all_captions(records: Iterable[Record], prompt: str) -> list[Item]:
    """Items of caption records, one for each clip, with all its captions as references."""
    of_clip: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        of_clip.setdefault(record.clips, []).append(record)
    return [
        Item(first.id.split("#")[0], clips, prompt, tuple(one.turns[0].answer for one in (first, *others)))
        for clips, (first, *others) in of_clip.items()
    ]


def digest(items: Sequence[Item], root: Path) -> str:
    """SHA-256 of questions, references, and names and sizes of the clips.

    The content of clips is not read, so a change that keeps the size of a file is not noticed.
    """
    sha = hashlib.sha256()
    sizes: dict[str, int] = {}
    for item in items:
        clips = []
        for clip in item.clips:
            path = Path(clip)
            if clip not in sizes:
                sizes[clip] = clip_size(clip)
            name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
            clips.append([name, sizes[clip]])
        category, before = sorted(item.category.items()), [(turn.question, turn.answer) for turn in item.before]
        content = [item.id, clips, item.prompt, item.references, item.choices, category, *before]
        sha.update(json.dumps(content, ensure_ascii=False).encode())
    return sha.hexdigest()
