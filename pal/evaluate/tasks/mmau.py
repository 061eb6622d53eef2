"""MMAU: questions with options about sound, music and speech, in 27 skills (Sakshi et al., 2025)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pal.data.tables import find_clip, json_file, records
from pal.errors import ManifestError
from pal.evaluate.items import Item
from pal.evaluate.tasks.base import Choosing, Task, ask
from pal.registry import register


@register("task", "mmau")
class Mmau(Task):
    """MMAU by the token-set rule, on the 1000 questions of test-mini."""

    class Config(Choosing):
        """Options: questions and prompt."""

        file: str = "mmau-test-mini.json"
        """File of the questions; the large test set has no answers and cannot be scored here."""

    rule = {"name": "token_sets"}

    def __init__(self, config: Config) -> None:
        self.config = config

    def items(self, root: Path) -> Iterator[Item]:
        """One item a question, with its task, category, sub-category and difficulty."""
        path = json_file(root, (self.config.file,), "the folder of MMAU as it was unpacked")
        for number, one in enumerate(records(path, ("id", "audio_id", "question", "choices", "answer"), "MMAU"), 1):
            yield item_of(one, one["id"], one["audio_id"], f"{path}, item {number}", path, self.config.prompt)


def item_of(one: dict[str, Any], name: str, audio: str, where: str, listed_in: Path, prompt: str) -> Item:
    """Item from an entry in MMAU's format, also used by MMAR; `category` may be a list."""
    choices = tuple(str(choice) for choice in one["choices"])
    answer = str(one["answer"])
    if answer not in choices:
        raise ManifestError(f"{where}: the answer '{answer}' is not among the choices")
    root = listed_in.parent
    axes = ("task", "modality", "category", "sub-category", "difficulty", "language")
    category = {}
    for axis in axes:
        value = one.get(axis)
        if value:
            category[axis] = tuple(str(v) for v in value) if isinstance(value, list) else (str(value),)
    clip = find_clip([root, root / "audio"], [audio, Path(audio).name], listed_in)
    return Item(str(name), (str(clip),), ask(prompt, str(one["question"]), choices), (answer,), choices, category)
