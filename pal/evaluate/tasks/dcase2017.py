"""DCASE 2017 task 4: 17 warning and vehicle sounds, micro and macro F1."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pal.data.prepare import read
from pal.data.prepare.dcase2017 import LABELS
from pal.evaluate.items import Item
from pal.evaluate.tasks.base import DESCRIBE, Prompted, Task
from pal.registry import register


@register("task", "dcase2017")
class Dcase2017(Task):
    """Micro F1 over labels, the challenge's metric; free text gives one label a clip, as in LTU."""

    class Config(Prompted):
        """Options: clips and prompt."""

        prompt: str = DESCRIBE
        split: Literal["training", "testing", "evaluation"] = "evaluation"
        """LTU used the evaluation set."""

    rule = {"name": "labels", "metric": "f1"}
    max_new_tokens = 64

    def __init__(self, config: Config) -> None:
        self.config = config

    def items(self, root: Path) -> Iterator[Item]:
        """One item a clip, with all its labels."""
        for record in read("dcase2017", root, split=self.config.split):
            held = {tag.label for tag in record.tags or ()}
            references = tuple(label for label in LABELS if label in held)
            yield Item(record.id, record.clips, self.config.prompt, references, LABELS)
