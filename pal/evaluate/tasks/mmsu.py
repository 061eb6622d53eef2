"""MMSU: understanding of and reasoning about speech, 5000 questions in 47 tasks (Wang et al., 2025)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pal.config import StrictConfig
from pal.data.tables import find_clip, json_file, records
from pal.errors import ManifestError
from pal.evaluate.items import Item
from pal.evaluate.tasks.base import Task, ask_by_letter
from pal.registry import register

PROMPT = (
    "Choose the most suitable answer from options A, B, C, and D to respond the question in next line, "
    "you may only choose A or B or C or D.\n{question}\n{choices}"
)
"""Prompt of AIR-Bench and MMSU."""


class ByLetter(StrictConfig):
    """Options of a benchmark answered by option letter."""

    prompt: str = PROMPT
    """Prompt template with {question} and {choices}."""


@register("task", "mmsu")
class Mmsu(Task):
    """MMSU by AIR-Bench's letter rule, in MMSU's version."""

    Config = ByLetter
    rule = {"name": "letters", "of": "mmsu"}

    def __init__(self, config: ByLetter) -> None:
        self.config = config

    def items(self, root: Path) -> Iterator[Item]:
        """One item a question, with category, sub-category and task."""
        path = json_file(root, ("question/mmsu.jsonl", "mmsu.jsonl"), "the folder of MMSU")
        keys = ("id", "audio_path", "question", "choice_a", "choice_b", "answer_gt")
        for number, one in enumerate(records(path, keys, "MMSU"), 1):
            choices = tuple(str(one[f"choice_{letter}"]) for letter in "abcd" if one.get(f"choice_{letter}"))
            if str(one["answer_gt"]) not in choices:
                raise ManifestError(f"{path}, item {number}: the answer '{one['answer_gt']}' is not among the choices")
            clip = find_clip([root, root / "audio"], [one["audio_path"], Path(one["audio_path"]).name], path)
            category = {
                axis: (str(one[key]),)
                for axis, key in (
                    *(("category", "category"), ("sub-category", "sub-category")),
                    *(("sub-sub-category", "sub-sub-category"), ("task", "task_name")),
                )
                if one.get(key)
            }
            prompt = ask_by_letter(self.config.prompt, str(one["question"]), choices)
            yield Item(str(one["id"]), (str(clip),), prompt, (str(one["answer_gt"]),), choices, category)
