"""AudioCaps: captions against all references of a clip."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pal.data.prepare import read
from pal.evaluate.items import Item, all_captions
from pal.evaluate.tasks.base import CAPTION, Prompted, Task
from pal.registry import register


@register("task", "audiocaps")
class AudioCaps(Task):
    """CIDEr-D, SPICE and SPIDEr over the test split's clips."""

    class Config(Prompted):
        """Options: clips and prompt."""

        prompt: str = CAPTION
        split: Literal["train", "val", "test"] = "test"
        missing: Literal["error", "skip"] = "error"
        """Handling of listed clips whose files are missing; with "skip" the score is of a smaller set."""

    rule = {"name": "captions"}
    max_new_tokens = 64

    def __init__(self, config: Config) -> None:
        self.config = config

    def items(self, root: Path) -> list[Item]:
        """One item a clip."""
        records = read("audiocaps", root, split=self.config.split, missing=self.config.missing)
        return all_captions(records, self.config.prompt)
