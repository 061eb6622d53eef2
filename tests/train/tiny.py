"""A recipe that trains a very small model in a second or two."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pal.train import run
from pal.train.recipe import Recipe
from pal.train.step import StepResult, Update

LLM = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
}
MODEL = {
    "llm": {"fresh": LLM, "vocabulary": 280},
    "encoders": [{"name": "tiny", "width": 8, "channels": [2, 2, 4, 4], "blocks": 1}],
    "integration": "lal",
}
HEAR = {
    "name": "hear",
    "objective": "tags",
    "options": {"mixup": 0.5},
    "train": {"encoder": True},
    "lr": 1e-2,
    "steps": 3,
    "batch": {"clips": 3},
}
READ = {"name": "read", "objective": "text", "train": {"llm": "full"}, "lr": 1e-2, "steps": 3, "batch": {"rows": 4}}
JOIN = {
    "name": "join",
    "train": {"encoder": True, "connector": True, "projectors": True, "llm": "lora"},
    "lr": {"encoder": 1e-3, "connector": 1e-2, "projectors": 1e-2, "llm": 1e-2},
    "warmup": 1,
    "epochs": 1.5,
    "batch": {"seconds": 5, "rows_per_clip": 2},
}


def recipe(manifest: Path, stages: list[dict[str, Any]] | None = None, **fields: Any) -> Recipe:
    data = {"scenes": {"manifest": str(manifest), "augment": {"speed": [0.9, 1.1]}}}
    keep = {"checkpoint_every": 2, "log_every": 1}
    return Recipe(
        **{"seed": 1, "model": MODEL, "data": data, "stages": stages or [HEAR, READ, JOIN], "keep": keep} | fields
    )


def failing_after(steps: int) -> Callable[..., StepResult]:
    """In place of `Update.__call__`: raises KeyboardInterrupt after so many steps."""
    update, left = Update.__call__, iter(range(steps))

    def failing(self: Update, *args: Any) -> StepResult:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return update(self, *args)

    return failing


def run_elsewhere(settings: str, out: Path, environment: dict[str, str]) -> None:
    """What a process of its own does: train by a recipe given as JSON."""
    os.environ.update(environment)
    run(Recipe.model_validate_json(settings), out)
