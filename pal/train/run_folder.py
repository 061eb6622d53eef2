"""Output folder of a training run: its recipe, and the report of a finished run."""

from __future__ import annotations

import json
import logging
import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from pal import files
from pal.errors import ConfigError
from pal.files import write_text
from pal.train import checkpoint
from pal.train.recipe import Recipe

logger = logging.getLogger(__name__)


def is_finished(out: Path) -> bool:
    """True if the folder holds a finished run."""
    return (out / "train.json").exists()


def locked(out: Path, needed: bool = True) -> AbstractContextManager[None]:
    """Keep other processes from training into the folder; where `needed` is False, do nothing.

    Raises:
        ConfigError: another process trains into it.
    """
    if not needed:
        return nullcontext()
    refusal = f"{out}: another pal train is writing into it; wait for its end, or give another --out"
    return files.locked(out / ".lock", refusal)


def claim(out: Path, recipe: Recipe, resume: bool, overwrite: bool) -> None:
    """Make `out` the output folder of a recipe's run.

    Raises:
        ConfigError: it is a file; it holds a run and neither `resume` nor `overwrite` is set, or a run of another
            recipe; another process trains into it.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file; give a folder as --out")
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        _claim(out, recipe, resume, overwrite)


def _claim(out: Path, recipe: Recipe, resume: bool, overwrite: bool) -> None:
    marker = out / "recipe.json"
    if resume and not marker.exists():
        logger.warning("%s holds no run to resume; a new one begins", out)
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
