"""Checkpoints: folders written atomically, verified on load, without pickle.

checkpoints/step0000200/
    weights.safetensors     weights trained so far, in all stages, and buffers
    optimizer.safetensors   AdamW's state with float32 master weights (not between two stages)
    state.json              training progress and the recipe
    manifest.json           SHA-256 of the files
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pal.errors import BundleError, ConfigError
from pal.files import atomic_folder, recover, verify
from pal.train.recipe import Recipe, differences
from pal.train.validation import ValidationScore

logger = logging.getLogger(__name__)


@dataclass
class State:
    """Training progress."""

    step: int = 0
    """Completed steps of all stages."""
    stage: int = 0
    """Index of the current stage."""
    stage_step: int = 0
    """Completed steps of the current stage."""
    totals: list[dict[str, float]] = field(default_factory=list)
    """For each started stage: steps, seconds, rows, clips, audio_seconds, tokens."""
    data: dict[str, str] = field(default_factory=dict)
    """Digest of each source's manifest."""
    nonfinite: int = 0
    """Number of steps skipped for a NaN or infinite loss or gradient."""
    validations: list[ValidationScore] = field(default_factory=list)
    """Results of the validations so far."""


@dataclass(frozen=True)
class Checkpoint:
    """Loaded training checkpoint."""

    path: Path
    state: State
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def save(
    folder: Path,
    state: State,
    recipe: Recipe,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    keep: int,
) -> Path:
    """Write a checkpoint below `folder` and remove the oldest beyond `keep`."""
    path = folder / f"step{state.step:07d}"
    with atomic_folder(path) as temporary:
        save_file(_plain(weights), temporary / "weights.safetensors")
        if optimizer:
            save_file(_plain(optimizer), temporary / "optimizer.safetensors")
        content = {"state": asdict(state), "digest": recipe.digest, "recipe": recipe.settings()}
        (temporary / "state.json").write_text(json.dumps(content, indent=1) + "\n")
    remove_old(folder, keep)
    return path


def remove_old(folder: Path, keep: int) -> None:
    """Remove all checkpoints below `folder` but the newest `keep`."""
    for old in _folders(folder)[:-keep]:
        shutil.rmtree(old)


def remove_later(folder: Path, step: int) -> None:
    """Remove the checkpoints below `folder` of steps after `step`, which a resumed run repeats."""
    for path in _folders(folder):
        if int(path.name[4:]) > step:
            shutil.rmtree(path)


def load_newest(folder: Path, recipe: Recipe) -> Checkpoint | None:
    """Load the newest intact checkpoint; None if there is none.

    Damaged checkpoints are renamed to `*.damaged`, with a warning.

    Raises:
        ConfigError: the checkpoint belongs to another recipe; the message has the keys that differ.
    """
    if folder.is_dir():
        for left in folder.glob("step*.old"):
            recover(left.with_name(left.name.removesuffix(".old")))
        for left in folder.glob(".step*.tmp"):
            shutil.rmtree(left)
    damaged = False
    for path in reversed(_folders(folder)):
        try:
            return _load(path, recipe)
        except BundleError as error:
            logger.warning("checkpoint %s is damaged (%s); using the one before", path.name, error)
            aside = path.with_name(path.name + ".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            damaged = True
    if damaged:
        logger.warning("%s holds no intact checkpoint", folder)
    return None


def _load(path: Path, recipe: Recipe) -> Checkpoint:
    files = verify(path)
    try:
        content = json.loads((path / "state.json").read_text())
        weights = load_file(path / "weights.safetensors")
        optimizer = load_file(path / "optimizer.safetensors") if "optimizer.safetensors" in files else {}
        state = State(**content["state"])
        digest, settings = content["digest"], content["recipe"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise BundleError(f"{path}: cannot be read: {error}") from None
    check_recipe(path, digest, settings, recipe)
    return Checkpoint(path, state, weights, optimizer)


def check_recipe(path: Path, digest: str, settings: dict[str, Any], recipe: Recipe) -> None:
    """Raise ConfigError if the checkpoint's settings differ from those of `recipe`."""
    if digest != recipe.digest:
        keys = ", ".join(differences(settings, recipe.settings())) or "the version of pal"
        raise ConfigError(
            f"{path} belongs to another recipe; it differs in: {keys}. "
            "Resume with the original recipe, or train into another folder"
        )


def _folders(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step*") if path.is_dir() and path.name[4:].isdigit())


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
