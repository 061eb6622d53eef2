"""Output folder of a training run: its recipe, and the report of a finished run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pal.errors import ConfigError
from pal.files import write_text
from pal.train import checkpoint
from pal.train.recipe import Recipe


def is_finished(out: Path) -> bool:
    """True if the folder holds a finished run."""
    return (out / "train.json").exists()


def claim(out: Path, recipe: Recipe, resume: bool, overwrite: bool) -> None:
    """Make `out` the output folder of a recipe's run.

    Raises:
        ConfigError: it holds a run and neither `resume` nor `overwrite` is set, or a run of another recipe.
    """
    marker = out / "recipe.json"
    if marker.exists() and overwrite and not resume:
        for name in ("checkpoints", "best", "data", "tokenizer", "model", "tensorboard"):
            shutil.rmtree(out / name, ignore_errors=True)
        lists = ("log.jsonl", "quarantine.jsonl", "skipped_steps.jsonl")
        for name in ("train.json", *lists, "loss.png", "provenance.json", "recipe.json"):
            (out / name).unlink(missing_ok=True)
    if marker.exists():
        if not resume:
            finished = "a finished run" if is_finished(out) else "an unfinished run"
            raise ConfigError(f"{out} holds {finished}; give --resume to continue it, --overwrite, or another --out")
        settings = json.loads(marker.read_text())
        checkpoint.check_recipe(out, settings["digest"], settings["recipe"], recipe)
        return
    write_text(marker, json.dumps({"digest": recipe.digest, "recipe": recipe.settings()}, indent=1) + "\n")


def write_report(
    out: Path, recipe: Recipe, state: checkpoint.State, seconds: float, parameters: dict[str, int], **machine: Any
) -> None:
    """Write `train.json`; its presence means that the run is finished.

    Args:
        out: folder of the run.
        recipe: recipe of the run.
        state: final state, with the totals of the stages.
        seconds: training time of all stages.
        parameters: part of the model -> number of its parameters.
        machine: number of bad clips and of processes, engine and device.
    """
    import torch
    import transformers

    import pal

    report = {
        "recipe": recipe.settings(),
        "notes": recipe.notes,
        "recipe_digest": recipe.digest,
        "data": state.data,
        "skipped_steps": state.nonfinite,
        "validations": state.validations,
        "seconds": seconds,
        "stages": [
            {"name": stage.name, "objective": stage.objective, **total}
            for stage, total in zip(recipe.stages, state.totals, strict=True)
        ],
        "parameters": parameters,
        **machine,
        "versions": {"pal": pal.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
    write_text(out / "train.json", json.dumps(report, indent=1) + "\n")
