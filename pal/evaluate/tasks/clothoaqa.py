"""ClothoAQA: one-word answers by exact match."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from pal.config import StrictConfig
from pal.data.prepare import read
from pal.evaluate.items import Item, one_reference
from pal.evaluate.tasks.base import Task
from pal.registry import register


@register("task", "clothoaqa")
class ClothoAqa(Task):
    """Exact match over the questions that all three annotators answered alike."""

    class Config(StrictConfig):
        """Options: questions and prompt."""

        prompt: str = "{question} Answer with one word."
        split: Literal["train", "val", "test"] = "test"
        agreement: int = Field(default=3, ge=1, le=3)
        """Minimum number of the three annotators who gave the answer."""

    rule = {"name": "exact"}

    def __init__(self, config: Config) -> None:
        self.config = config

    def items(self, root: Path) -> Iterator[Item]:
        """One item a question, with yes/no and other words as categories."""
        for record in read("clothoaqa", root, split=self.config.split, agreement=self.config.agreement):
            prompt = self.config.prompt.replace("{question}", record.turns[0].question)
            yield one_reference(record, prompt, {"answers": (record.task,)})
