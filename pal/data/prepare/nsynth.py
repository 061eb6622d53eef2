"""NSynth: single notes of 4 s, with instrument family, source and pitch (Engel et al., 2017)."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pal.config import StrictConfig
from pal.data.manifest import Record, Turn
from pal.data.prepare import dataset, question_for
from pal.data.tables import find_clip, first_file, text_of
from pal.errors import ManifestError

FAMILIES = (
    *("bass", "brass", "flute", "guitar", "keyboard", "mallet"),
    *("organ", "reed", "string", "synth lead", "vocal"),
)
SOURCES = ("acoustic", "electronic", "synthetic")

QUESTIONS = {
    "family": (
        "Which family of instruments plays this note?",
        "What instrument family do you hear?",
        "Name the instrument family.",
    ),
    "source": (
        "Is this note acoustic, electronic or synthetic?",
        "Is the source of this sound acoustic, electronic or synthetic?",
    ),
}

_CHOICES = {"family": FAMILIES, "source": SOURCES}


class NSynthOptions(StrictConfig):
    """Options: notes and questions."""

    split: Literal["train", "valid", "test"] = "train"
    """The folder `nsynth-SPLIT`."""
    about: Literal["family", "source"] = "family"
    """Property that the question is about."""
    paraphrase: bool = False
    """Vary the question from note to note, for training."""


@dataset("nsynth", NSynthOptions)
def nsynth(root: Path, options: NSynthOptions) -> Iterator[Record]:
    """One record per note, in the order of the names; `root` holds `nsynth-SPLIT/` or is that folder."""
    table = first_file(
        root, (f"nsynth-{options.split}/examples.json", "examples.json"), f"the folder with nsynth-{options.split}"
    )
    try:
        notes: dict[str, dict[str, Any]] = json.loads(text_of(table))
    except ValueError as error:
        raise ManifestError(f"{table}: not valid JSON: {error}") from None
    key = f"instrument_{options.about}_str"
    for name, note in sorted(notes.items()):
        answer = str(note.get(key, "")).replace("_", " ")
        if answer not in _CHOICES[options.about]:
            raise ManifestError(f"{table}: '{name}' has no known {key}: {answer or 'missing'}")
        record_id = f"nsynth/{name}"
        yield Record(
            id=record_id,
            clips=(str(find_clip([table.parent / "audio"], [f"{name}.wav"], table)),),
            turns=(Turn(question_for(record_id, QUESTIONS[options.about], options.paraphrase), answer),),
            task=f"instrument {options.about}",
            dataset="nsynth",
            choices=_CHOICES[options.about],
        )
