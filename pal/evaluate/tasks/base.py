"""Interface of benchmarks, and shared prompts."""

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
"""Prompt for rules that parse the option's text; `{choices}` becomes one choice a line."""


class Task(ABC):
    """Benchmark definition. A concrete one has a nested `Config` and is registered as a "task"."""

    rule: ClassVar[Mapping[str, Any]]
    """The official rule with its options, as `registry.build` takes it."""
    max_new_tokens: ClassVar[int] = 32
    """Maximum length of an answer in tokens."""

    @abstractmethod
    def items(self, root: Path) -> Iterable[Item]:
        """Questions in the data set's order, read from its unpacked folder.

        Raises:
            ManifestError: the folder is not laid out as expected; names the file and the fault.
        """


class Prompted(StrictConfig):
    """Options of a benchmark with one prompt for all clips."""

    prompt: str
    """Prompt for every clip."""


class Choosing(StrictConfig):
    """Options of a multiple-choice benchmark."""

    prompt: str = CHOOSE
    """Prompt template with {question} and {choices}."""


def ask(template: str, question: str, choices: Sequence[str]) -> str:
    """Prompt from a template, with one choice a line after a hyphen."""
    return _filled(template, question, "\n".join(f"- {choice}" for choice in choices))


def ask_by_letter(template: str, question: str, choices: Sequence[str]) -> str:
    """Prompt from a template, with a letter before each choice, from `A. `; ValueError beyond the alphabet."""
    lines = (f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase[: len(choices)], choices, strict=True))
    return _filled(template, question, "\n".join(lines))


def _filled(template: str, question: str, choices: str) -> str:
    # not str.format: questions may hold braces
    if "{question}" not in template:
        raise ConfigError("the option 'prompt' needs {question} in it, and {choices} where the options should stand")
    before, _, after = template.partition("{question}")
    return before.replace("{choices}", choices) + question + after.replace("{choices}", choices)
