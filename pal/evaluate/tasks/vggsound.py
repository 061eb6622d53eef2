"""VGGSound: accuracy over 309 classes of the test split."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pal.data.prepare import read
from pal.evaluate.items import Item, one_reference
from pal.evaluate.tasks.base import DESCRIBE, Prompted, Task
from pal.registry import register


@register("task", "vggsound")
class VggSound(Task):
    """Accuracy of the nearest of 309 labels."""

    class Config(Prompted):
        """Options: clips and prompt."""

        prompt: str = DESCRIBE
        split: Literal["train", "test"] = "test"
        missing: Literal["error", "skip"] = "error"
        """Handling of listed clips whose files are missing; with "skip" the score is of a smaller set."""

    rule = {"name": "labels"}
    max_new_tokens = 64

    def __init__(self, config: Config) -> None:
        self.config = config

    def items(self, root: Path) -> Iterator[Item]:
        """One item a clip."""
        for record in read("vggsound", root, split=self.config.split, missing=self.config.missing, choices=True):
            yield one_reference(record, self.config.prompt)
