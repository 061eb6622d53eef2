"""NSynth: accuracy of the instrument's family or source over single notes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pal.data.prepare import read
from pal.evaluate.items import Item, one_reference
from pal.evaluate.tasks.base import Prompted, Task
from pal.registry import register

_PROMPTS = {
    "family": "What is the instrument family of this note?",
    "source": "Is the instrument of this note acoustic, electronic or synthetic?",
}


@register("task", "nsynth")
class NSynth(Task):
    """Accuracy of the nearest of 11 families or 3 sources."""

    class Config(Prompted):
        """Options: notes and prompt."""

        prompt: str = ""
        """Prompt for every clip; default: one that fits `about`."""
        about: Literal["family", "source"] = "family"
        split: Literal["train", "valid", "test"] = "test"

    rule = {"name": "labels", "answer": "{}", "label": "{}"}

    def __init__(self, config: Config) -> None:
        self.config = config

    def items(self, root: Path) -> Iterator[Item]:
        """One item a note."""
        prompt = self.config.prompt or _PROMPTS[self.config.about]
        for record in read("nsynth", root, split=self.config.split, about=self.config.about):
            yield one_reference(record, prompt)
