"""The contract of a benchmark, and the prompts that several share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any, ClassVar

from pal.config import StrictConfig
from pal.errors import ConfigError
from pal.evaluate.items import Item

DESCRIBE = "Close-ended question: Write an audio caption describing the sound."
"""LTU's prompt for classification from free text."""

CAPTION = "Describe the audio in one sentence."

CHOOSE = "{question}\nChoose the right option and answer with its text:\n{choices}"
"""For rules that read the option's text; `{choices}` is one a line."""


class Task(ABC):
    """A benchmark. A concrete one has a nested `Config` and is registered as a "task"."""

    rule: ClassVar[Mapping[str, Any]]
    """The official rule with its options, as `registry.build` takes it."""
    max_new_tokens: ClassVar[int] = 32
    """Of an answer."""

    @abstractmethod
    def items(self, root: Path) -> Iterable[Item]:
        """The questions, in the data set's own order, from the folder that it was unpacked to.

        Raises:
            ManifestError: the folder is not laid out as expected; names the file and the fault.
        """


class Prompted(StrictConfig):
    """Options of a task that asks the same of every clip."""

    prompt: str
    """What is asked."""


class Choosing(StrictConfig):
    """Options of a task whose questions have options of their own."""

    prompt: str = CHOOSE
    """What is asked; {question} and {choices} stand for the item's."""


def ask(template: str, question: str, choices: Sequence[str]) -> str:
    """A prompt out of its template, one choice a line with a hyphen."""
    return _filled(template, question, "\n".join(f"- {choice}" for choice in choices))


def ask_by_letter(template: str, question: str, choices: Sequence[str]) -> str:
    """The same with a letter before each choice, `A. ` for the first; ValueError where the alphabet ends."""
    lines = (f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase[: len(choices)], choices, strict=True))
    return _filled(template, question, "\n".join(lines))


def _filled(template: str, question: str, choices: str) -> str:
    # not str.format: questions may hold braces
    if "{question}" not in template:
        raise ConfigError("the option 'prompt' needs {question} in it, and {choices} where the options should stand")
    before, _, after = template.partition("{question}")
    return before.replace("{choices}", choices) + question + after.replace("{choices}", choices)
