"""LibriSpeech: word error rate of transcripts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pal.data.prepare import read
from pal.evaluate.items import Item, one_reference
from pal.evaluate.tasks.base import Prompted, Task
from pal.registry import register


@register("task", "librispeech")
class LibriSpeech(Task):
    """WER over the folders of `split`, and of each folder."""

    class Config(Prompted):
        """Options: utterances and prompt."""

        prompt: str = "Transcribe the speech."
        split: str = "test-clean"
        """Comma-separated folders, such as "test-clean,test-other"."""

    rule = {"name": "word_errors"}
    max_new_tokens = 256

    def __init__(self, config: Config) -> None:
        self.config = config

    def items(self, root: Path) -> Iterator[Item]:
        """One item an utterance."""
        for record in read("librispeech", root, split=self.config.split):
            yield one_reference(record, self.config.prompt, {"split": (record.task.removeprefix("transcript "),)})
