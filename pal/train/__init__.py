"""Staged training from a recipe: `run(load_recipe("recipes/tiny.yaml"), out="runs/tiny")`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pal.model import PalModel
    from pal.train.recipe import Recipe

__all__ = ["run"]


def run(recipe: Recipe, out: str | Path, resume: bool = False, overwrite: bool = False) -> PalModel:
    """Train what `recipe` describes into the folder `out`; see `pal.train.loop.run`."""
    # Imported here: reading a recipe must not cost an import of torch.
    from pal.train.loop import run as train

    return train(recipe, Path(out), resume=resume, overwrite=overwrite)
