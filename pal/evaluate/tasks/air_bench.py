"""AIR-Bench Foundation: 19 audio tasks as questions with two to four options (Yang et al., 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pal.data.tables import find_clip, json_file, records
from pal.errors import ManifestError
from pal.evaluate.items import Item
from pal.evaluate.tasks.base import Task, ask_by_letter
from pal.evaluate.tasks.mmsu import ByLetter
from pal.registry import register


@register("task", "air_bench")
class AirBench(Task):
    """AIR-Bench Foundation by its script's letter rule, without the step in which GPT-3.5 maps answers to letters."""

    Config = ByLetter
    rule = {"name": "letters", "of": "air_bench"}

    def __init__(self, config: ByLetter) -> None:
        self.config = config

    def items(self, root: Path) -> Iterator[Item]:
        """One item a question, by task and by data set of the task. The clips lie in `TASK_DATASET/`.

        Missing options are not shown; the official script writes "C. None".
        """
        path = json_file(root, ("Foundation_meta.json",), "AIR-Bench Foundation's folder as it was unpacked")
        keys = ("uniq_id", "path", "question", "choice_a", "choice_b", "answer_gt", "task_name", "dataset_name")
        for number, one in enumerate(records(path, keys, "AIR-Bench Foundation"), 1):
            choices = tuple(str(one[f"choice_{letter}"]) for letter in "abcd" if one.get(f"choice_{letter}"))
            if str(one["answer_gt"]) not in choices:
                raise ManifestError(f"{path}, item {number}: the answer '{one['answer_gt']}' is not among the choices")
            task = f"{one['task_name']}_{one['dataset_name']}"
            # the clips of Audio_Grounding are FLAC but listed as .wav, which find_clip handles
            clip = find_clip([root / task], [one["path"]], path)
            prompt = ask_by_letter(self.config.prompt, str(one["question"]), choices)
            category = {"task": (str(one["task_name"]),), "task and data set": (task,)}
            yield Item(f"air_bench/{one['uniq_id']}", (str(clip),), prompt, (str(one["answer_gt"]),), choices, category)
