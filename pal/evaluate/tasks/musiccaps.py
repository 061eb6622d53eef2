"""MusicCaps: descriptions of music."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pal.data.prepare import read
from pal.evaluate.items import Item, all_captions
from pal.evaluate.tasks.base import Prompted, Task
from pal.registry import register


@register("task", "musiccaps")
class MusicCaps(Task):
    """Caption metrics over the clips of AudioSet's evaluation set."""

    class Config(Prompted):
        """Options: clips and prompt."""

        prompt: str = "Describe this music in detail."
        split: Literal["train", "eval"] = "eval"
        missing: Literal["error", "skip"] = "error"
        """Handling of listed clips whose files are missing; with "skip" the score is of a smaller set."""

    rule = {"name": "captions"}
    max_new_tokens = 128

    def __init__(self, config: Config) -> None:
        self.config = config

    def items(self, root: Path) -> list[Item]:
        """One item a clip."""
        records = read("musiccaps", root, split=self.config.split, missing=self.config.missing)
        return all_captions(records, self.config.prompt)
