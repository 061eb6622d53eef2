"""Staged training from a recipe: `run(load_recipe("recipes/tiny.yaml"), out="runs/tiny")`.

`Trainer` runs a recipe step by step: `for step in Trainer(recipe, out).steps(): ...`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pal.model import PalModel
    from pal.train.recipe import Recipe
    from pal.train.trainer import Trainer

__all__ = ["Trainer", "run"]


def __getattr__(name: str) -> Any:
    # lazy, so that reading a recipe does not import torch
    if name == "Trainer":
        from pal.train.trainer import Trainer

        return Trainer
    raise AttributeError(f"module 'pal.train' has no attribute '{name}'")


def run(recipe: Recipe, out: str | Path, resume: bool = False, overwrite: bool = False) -> PalModel:
    """Train a recipe, with `out` as the folder of the run; see `pal.train.trainer.run`."""
    from pal.train.trainer import run as train

    return train(recipe, Path(out), resume=resume, overwrite=overwrite)
