"""MMAR: deep reasoning over sound, music, speech and their mixes, 1000 questions (Ma et al., 2025)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pal.data.tables import json_file, records
from pal.evaluate.items import Item
from pal.evaluate.tasks.base import Choosing, Task
from pal.evaluate.tasks.mmau import item_of
from pal.registry import register


@register("task", "mmar")
class Mmar(Task):
    """MMAR by MMAU's token-set rule, on whose script MMAR's is based."""

    Config = Choosing
    rule = {"name": "token_sets"}

    def __init__(self, config: Choosing) -> None:
        self.config = config

    def items(self, root: Path) -> Iterator[Item]:
        """One item a question, with modality, category, sub-category and language."""
        path = json_file(root, ("MMAR-meta.json",), "the folder of MMAR as it was unpacked")
        for number, one in enumerate(records(path, ("audio_path", "question", "choices", "answer"), "MMAR"), 1):
            name = str(one.get("id") or f"mmar/{number}")
            yield item_of(one, name, one["audio_path"], f"{path}, item {number}", path, self.config.prompt)
