"""GTZAN: music of ten genres, 30 s a clip (Tzanetakis & Cook, 2002). It has no official split."""

from collections.abc import Iterator
from pathlib import Path

from pal.config import StrictConfig
from pal.data.manifest import Record, Turn
from pal.data.prepare import dataset, question_for
from pal.data.tables import SUFFIXES, files_in
from pal.errors import ManifestError
from pal.types import TagSpan

GENRES = ("blues", "classical", "country", "disco", "hiphop", "jazz", "metal", "pop", "reggae", "rock")

QUESTIONS = (
    "Which genre of music is this?",
    "What is the genre of this music?",
    "Name the genre of the music.",
)


class GTZANOptions(StrictConfig):
    """Options: questions."""

    paraphrase: bool = False
    """Vary the question from clip to clip, for training."""


@dataset("gtzan", GTZANOptions)
def gtzan(root: Path, options: GTZANOptions) -> Iterator[Record]:
    """One record per clip: the genre whose folder it lies in, below `genres/`, `genres_original/` or `root` itself."""
    places = [root / "genres", root / "genres_original", root]
    folder = next((place for place in places if all((place / genre).is_dir() for genre in GENRES)), None)
    if folder is None:
        raise ManifestError(f"{root}: the ten folders blues to rock are not there, nor in genres/; give GTZAN's folder")
    for genre in GENRES:
        for clip in files_in(folder / genre, "*", SUFFIXES):
            record_id = f"gtzan/{clip.stem}"
            yield Record(
                id=record_id,
                clips=(str(clip),),
                turns=(Turn(question_for(record_id, QUESTIONS, options.paraphrase), genre),),
                task="genre",
                dataset="gtzan",
                choices=GENRES,
                tags=(TagSpan(genre),),
            )
