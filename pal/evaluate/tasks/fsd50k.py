"""FSD50K: mean average precision over 200 labels of the evaluation set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pal.data.prepare import read
from pal.data.prepare.fsd50k import vocabulary
from pal.evaluate.items import Item
from pal.evaluate.tasks.base import DESCRIBE, Prompted, Task
from pal.registry import register


@register("task", "fsd50k")
class Fsd50k(Task):
    """Mean average precision of the labels, ranked by their similarity to the answer."""

    class Config(Prompted):
        """Options: clips and prompt."""

        prompt: str = DESCRIBE
        split: Literal["train", "val", "eval"] = "eval"

    rule = {"name": "labels", "metric": "map"}
    max_new_tokens = 64

    def __init__(self, config: Config) -> None:
        self.config = config

    def items(self, root: Path) -> Iterator[Item]:
        """One item a clip, with all its labels."""
        labels = vocabulary(root)
        for record in read("fsd50k", root, split=self.config.split):
            references = tuple(tag.label for tag in record.tags or ())
            yield Item(record.id, record.clips, self.config.prompt, references, labels)
