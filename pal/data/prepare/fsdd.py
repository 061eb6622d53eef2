"""Free Spoken Digit Dataset: English digits, 8 kHz, by a handful of speakers."""

import re
from collections.abc import Iterator
from pathlib import Path

from pal.config import StrictConfig
from pal.data.manifest import Record, Turn
from pal.data.prepare import choose, dataset, question_for
from pal.data.tables import files_in
from pal.errors import ConfigError, ManifestError
from pal.types import TagSpan

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

QUESTIONS = (
    "Which digit is spoken?",
    "What digit do you hear?",
    "Which number is said?",
    "What number does the speaker say?",
    "Name the spoken digit.",
)

_NAME = re.compile(r"(\d)_([^_]+)_(\d+)")


class FSDDOptions(StrictConfig):
    """Options: clips and questions."""

    speakers: str | None = None
    """Comma-separated speakers to take; all by default."""
    exclude: str | None = None
    """Comma-separated speakers to leave out."""
    paraphrase: bool = False
    """Vary the question from clip to clip, for training."""


@dataset("fsdd", FSDDOptions)
def fsdd(root: Path, options: FSDDOptions) -> Iterator[Record]:
    """One record per clip: which digit is spoken."""
    folder = root / "recordings" if (root / "recordings").is_dir() else root
    clips = {path: _NAME.fullmatch(path.stem) for path in files_in(folder, "*.wav")}
    if not clips:
        raise ManifestError(f"{folder}: no .wav files; give the folder that holds FSDD's 'recordings'")
    speakers = set()
    for path, name in clips.items():
        if name is None:
            raise ManifestError(f"{path}: the name is not <digit>_<speaker>_<take>.wav; move the file away")
        speakers.add(name[2])
    wanted = set(choose(options.speakers, sorted(speakers), "speaker"))
    if options.exclude is not None:
        wanted -= set(choose(options.exclude, sorted(speakers), "speaker"))
    if not wanted:
        raise ConfigError(f"data set 'fsdd': no speaker is left; known: {', '.join(sorted(speakers))}")
    for path, name in clips.items():
        assert name is not None
        if name[2] not in wanted:
            continue
        record_id = f"fsdd/{path.stem}"
        word = DIGITS[int(name[1])]
        yield Record(
            id=record_id,
            clips=(str(path),),
            turns=(Turn(question_for(record_id, QUESTIONS, options.paraphrase), word),),
            task="spoken digit",
            dataset="fsdd",
            choices=DIGITS,
            tags=(TagSpan(f"digit {word}"),),
        )
