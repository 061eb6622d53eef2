"""Clotho: captions against five references a clip."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pal.data.prepare import read
from pal.evaluate.items import Item, all_captions
from pal.evaluate.tasks.base import CAPTION, Prompted, Task
from pal.registry import register


@register("task", "clotho")
class Clotho(Task):
    """CIDEr-D, SPICE and SPIDEr over the evaluation split."""

    class Config(Prompted):
        """Options: clips and prompt."""

        prompt: str = CAPTION
        split: Literal["development", "validation", "evaluation"] = "evaluation"

    rule = {"name": "captions"}
    max_new_tokens = 64

    def __init__(self, config: Config) -> None:
        self.config = config

    def items(self, root: Path) -> list[Item]:
        """One item a clip."""
        return all_captions(read("clotho", root, split=self.config.split), self.config.prompt)
