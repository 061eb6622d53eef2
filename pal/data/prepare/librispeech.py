"""LibriSpeech: read English with its transcripts (Panayotov et al., 2015)."""

from collections.abc import Iterator
from pathlib import Path

from pal.config import StrictConfig
from pal.data.manifest import Record, Turn
from pal.data.prepare import dataset, question_for
from pal.data.tables import files_in, find_clip, lines_of
from pal.errors import ManifestError

QUESTIONS = (
    "Transcribe the speech.",
    "What does the speaker say?",
    "Write down what is said.",
)


class LibriSpeechOptions(StrictConfig):
    """Options: utterances and questions."""

    split: str = "train-clean-100"
    """Comma-separated folders, such as "train-clean-100,train-clean-360"."""
    paraphrase: bool = False
    """Vary the question from utterance to utterance, for training."""


@dataset("librispeech", LibriSpeechOptions)
def librispeech(root: Path, options: LibriSpeechOptions) -> Iterator[Record]:
    """One record an utterance, by the `*.trans.txt` of `SPLIT/SPEAKER/CHAPTER/`; answers in lower case."""
    base = root / "LibriSpeech" if (root / "LibriSpeech").is_dir() else root
    for split in (part.strip() for part in options.split.split(",")):
        tables = files_in(base / split, "*/*/*.trans.txt")
        if not tables:
            raise ManifestError(f"{base / split}: no *.trans.txt two folders down; give LibriSpeech's folder")
        for table in tables:
            lines = lines_of(table)
            for number, line in enumerate(lines, start=1):
                if number == len(lines) and not line:
                    break  # what follows the last line feed
                name, _, text = line.partition(" ")
                if not text.strip():
                    raise ManifestError(f"{table}, line {number}: not an utterance's name and its words")
                record_id = f"librispeech/{name}"
                yield Record(
                    id=record_id,
                    clips=(str(find_clip([table.parent], [f"{name}.flac"], table)),),
                    turns=(Turn(question_for(record_id, QUESTIONS, options.paraphrase), text.strip().lower()),),
                    task=f"transcript {split}",
                    dataset="librispeech",
                )
