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
    """The nearest of the 309 labels."""

    class Config(Prompted):
        """Which clips, and what is asked."""

        prompt: str = DESCRIBE
        split: Literal["train", "test"] = "test"
        missing: Literal["error", "skip"] = "error"
        """What to do about listed clips that are not there; with "skip" the score is of a smaller set."""

    rule = {"name": "labels"}
    max_new_tokens = 64

    def __init__(self, config: Config) -> None:
        self.config = config

    def items(self, root: Path) -> Iterator[Item]:
        """One a clip."""
        for record in read("vggsound", root, split=self.config.split, missing=self.config.missing, choices=True):
            yield one_reference(record, self.config.prompt)
