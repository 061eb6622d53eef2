"""MuChoMusic: knowledge of and reasoning about music, 1187 questions with four options (Weck et al., 2024)."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path

from pal.config import StrictConfig
from pal.data import tables
from pal.data.tables import find_clip
from pal.errors import ManifestError
from pal.evaluate.items import Item
from pal.evaluate.tasks.base import Task
from pal.registry import register

_OPTIONS = ("correct_answer", "distractor_1_answer", "distractor_2_answer", "distractor_3_answer")
_COLUMNS = ("question", "dataset", "dataset_identifier", *_OPTIONS)


@register("task", "muchomusic")
class MuChoMusic(Task):
    """MuChoMusic by its script's letter rule."""

    class Config(StrictConfig):
        """Options: prompt."""

        example: str = ""
        """In-context example, a question with its answer, before each question; the official default has one, ours
        none."""

    rule = {"name": "letters", "of": "muchomusic"}

    def __init__(self, config: Config) -> None:
        self.config = config

    def items(self, root: Path) -> Iterator[Item]:
        """One item a question, with genre and with the knowledge and reasoning it needs.

        `muchomusic.csv`, with `sdd/` (song_describer.csv and audio/) and `musiccaps/`
        (musiccaps-public.csv and audio/) beside it.
        """
        path = root / "muchomusic.csv"
        # the tables of the two collections are read once, and only if a question needs them
        songs, videos = cache(partial(_songs, root / "sdd")), cache(partial(_videos, root / "musiccaps"))
        for number, row in enumerate(tables.rows(path, _COLUMNS, "MuChoMusic", optional=True), start=1):
            name = f"muchomusic/{number}"
            identifier = row["dataset_identifier"].removesuffix(".json")
            if row["dataset"] == "sdd":
                clip = find_clip([root / "sdd/audio"], _known(identifier, songs(), path, number), path)
            elif row["dataset"] == "musiccaps":
                # an identifier ends in a number
                video = identifier.rpartition("_")[0]
                clip = find_clip([root / "musiccaps/audio"], _known(video, videos(), path, number), path)
            else:
                raise ManifestError(
                    f"{path}, item {number}: unknown data set '{row['dataset']}'; known: sdd, musiccaps"
                )
            choices = shuffled([row[column] for column in _OPTIONS], name)
            category = {
                "genre": (row["genre"],) if row.get("genre") else (),
                "knowledge": _names(row.get("music_knowledge"), path, number),
                "reasoning": _names(row.get("music_reasoning"), path, number),
            }
            shown = " ".join(f"({letter}) {choice}" for letter, choice in zip("ABCD", choices, strict=True))
            prompt = f"Question: {row['question']}\n Options: {shown} \n The correct answer is: "
            if self.config.example:
                prompt = f"{self.config.example}\n {prompt}"
            axes = {axis: values for axis, values in category.items() if values}
            yield Item(name, (str(clip),), prompt, (row["correct_answer"],), choices, axes)


def shuffled(options: Sequence[str], name: str) -> tuple[str, ...]:
    """Options in an order determined by the item's name; the official script shuffles them in every run."""
    return tuple(
        sorted(options, key=lambda option: hashlib.sha256(f"{name}\n{options.index(option)}".encode()).digest())
    )


def _songs(folder: Path) -> dict[str, tuple[str, ...]]:
    """Track -> file names of its clip in the Song Describer data set; the official clips are the first two minutes."""
    rows = tables.rows(
        folder / "song_describer.csv", ("track_id", "path"), "the Song Describer data set", optional=True
    )
    return {row["track_id"]: (row["path"].replace(".mp3", ".2min.mp3"), row["path"]) for row in rows}


def _videos(folder: Path) -> dict[str, tuple[str, ...]]:
    """Video -> file names of its clip in MusicCaps."""
    columns = ("ytid", "start_s", "end_s")
    rows = tables.rows(folder / "musiccaps-public.csv", columns, "MusicCaps", optional=True)
    return {
        row["ytid"]: (f"[{row['ytid']}]-[{int(float(row['start_s']))}-{int(float(row['end_s']))}]", row["ytid"])
        for row in rows
    }


def _known(key: str, clips: dict[str, tuple[str, ...]], path: Path, number: int) -> tuple[str, ...]:
    if key not in clips:
        raise ManifestError(f"{path}, item {number}: '{key}' is not in its collection's own table")
    return clips[key]


def _names(cell: str | None, path: Path, number: int) -> tuple[str, ...]:
    """Parse a list in Python syntax, such as "['genre and style']"."""
    if not cell:
        return ()
    try:
        return tuple(str(name) for name in ast.literal_eval(cell))
    except (ValueError, SyntaxError):
        raise ManifestError(f"{path}, item {number}: '{cell}' is not a list of names") from None
