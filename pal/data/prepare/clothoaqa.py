"""ClothoAQA: questions about Clotho's clips, each answered by three people in one word (Lipping et al., 2022)."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from pal.config import StrictConfig
from pal.data import tables
from pal.data.manifest import Record, Turn
from pal.data.prepare import dataset
from pal.data.tables import find_clip


class ClothoAQAOptions(StrictConfig):
    """Options: questions."""

    split: Literal["train", "val", "test"] = "train"
    """The table `clotho_aqa_SPLIT.csv`."""
    agreement: int = Field(default=3, ge=1, le=3)
    """Fewest of the three annotators who gave the answer; other questions are left out."""


@dataset("clothoaqa", ClothoAQAOptions)
def clothoaqa(root: Path, options: ClothoAQAOptions) -> Iterator[Record]:
    """One record per question with enough agreement of the annotators; the audio is in `audio_files/`."""
    table = root / f"clotho_aqa_{options.split}.csv"
    columns = ("file_name", "QuestionText", "answer", "confidence")
    asked: dict[tuple[str, str], list[str]] = {}
    for row in tables.rows(table, columns, "ClothoAQA", optional=True):
        key = (row["file_name"], row["QuestionText"].strip())
        asked.setdefault(key, []).append(row["answer"].strip().lower())
    numbers: Counter[str] = Counter()
    for (file, question), answers in asked.items():
        numbers[file] += 1
        answer, votes = Counter(answers).most_common(1)[0]
        # a tie of one vote each has no correct answer
        if votes < options.agreement or (votes == 1 and len(set(answers)) > 1) or not answer:
            continue
        yield Record(
            id=f"clothoaqa/{file.removesuffix('.wav')}#{numbers[file]}",
            clips=(str(find_clip([root / "audio_files", root / "audio", root], [file], table)),),
            turns=(Turn(question, answer),),
            task="yes or no" if answer in ("yes", "no") else "one word",
            dataset="clothoaqa",
        )
