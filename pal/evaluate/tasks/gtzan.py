"""GTZAN: accuracy over ten genres of music."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pal.data.prepare import read
from pal.evaluate.items import Item, one_reference
from pal.evaluate.tasks.base import Prompted, Task
from pal.registry import register


@register("task", "gtzan")
class Gtzan(Task):
    """Accuracy of the nearest genre, with GAMA's template for the label."""

    class Config(Prompted):
        """Options: prompt."""

        prompt: str = "What is the music genre of this audio?"

    rule = {"name": "labels", "answer": "Music Genre: {}", "label": "Music Genre: {}"}

    def __init__(self, config: Config) -> None:
        self.config = config

    def items(self, root: Path) -> Iterator[Item]:
        """One item a clip."""
        for record in read("gtzan", root):
            yield one_reference(record, self.config.prompt)
