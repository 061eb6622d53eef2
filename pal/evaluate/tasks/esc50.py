"""ESC-50: all 2000 clips zero-shot by free text, or the folds that a model was not trained on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pal.data import tables
from pal.data.prepare import read
from pal.evaluate.items import Item, one_reference
from pal.evaluate.tasks.base import DESCRIBE, Prompted, Task
from pal.registry import register


@register("task", "esc50")
class Esc50(Task):
    """Accuracy over 50 classes. Five-fold: one run for each fold with its own model, joined by `pal eval --join`."""

    class Config(Prompted):
        """Options: clips and prompt."""

        prompt: str = DESCRIBE
        folds: str | None = None
        """Comma-separated folds; all by default, which is the zero-shot protocol."""
        esc10: bool = False
        """Only the ten classes under the freer licence."""

    rule = {"name": "labels"}
    max_new_tokens = 64

    def __init__(self, config: Config) -> None:
        self.config = config

    def items(self, root: Path) -> Iterator[Item]:
        """One item a clip, with its fold."""
        options = {"folds": self.config.folds, "esc10": self.config.esc10}
        table = tables.first_file(root, ("esc50.csv", "meta/esc50.csv"), "ESC-50's main folder")
        folds = {Path(row["filename"]).stem: row["fold"] for row in tables.rows(table, ("filename", "fold"), "ESC-50")}
        for record in read("esc50", root, **options):
            fold = folds[record.id.removeprefix("esc50/")]
            yield one_reference(record, self.config.prompt, {"fold": (fold,)})
