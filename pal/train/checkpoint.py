"""Checkpoints: folders written atomically, verified on load, without pickle.

checkpoints/step0000200/
    weights.safetensors     weights trained so far, in all stages, and buffers
    optimizer.safetensors   AdamW's state with float32 master weights (not between two stages)
    state.json              training progress and the recipe
    manifest.json           SHA-256 of the files

Where processes hold shards of the tensors, each writes its own: `weights-00001-of-00002.safetensors` and so on. Any
number of processes, with or without shards, can read either.
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
from torch import Tensor

from pal.errors import BundleError, ConfigError
from pal.files import publish, recover, sha256, verify
from pal.train.distributed import ALONE, Writers
from pal.train.recipe import Recipe, differences
from pal.train.shards import Shard, StoredTensors, write
from pal.train.validation import ValidationScore

logger = logging.getLogger(__name__)

_SUFFIX = ".safetensors"


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
    """Training checkpoint; its tensors are read when they are asked for."""

    path: Path
    state: State
    weights: StoredTensors
    optimizer: StoredTensors

    def close(self) -> None:
        """Close the files, whose space on the disk is only then free after they are deleted."""
        self.weights.close()
        self.optimizer.close()


def path_of(folder: Path, state: State) -> Path:
    """Folder of the checkpoint of a state."""
    return folder / f"step{state.step:07d}"


def save(
    folder: Path,
    state: State,
    recipe: Recipe,
    weights: Mapping[str, Tensor | Shard],
    optimizer: Mapping[str, Tensor | Shard],
    keep: int,
    writers: Writers = ALONE,
) -> Path:
    """Write a checkpoint below `folder` and remove the oldest beyond `keep`.

    Args:
        folder: folder of all checkpoints.
        state: training progress.
        recipe: recipe of the run.
        weights: trained weights, or this process's shards of them.
        optimizer: state of the optimizer, in the same way; empty between two stages.
        keep: number of newest checkpoints to keep.
        writers: processes that write the checkpoint together; each calls this.

    Raises:
        PalError: another of the writers failed.
    """
    path = path_of(folder, state)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with writers.together():
            if writers.is_first:
                folder.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
        own: dict[str, str] = {}
        with writers.together():
            for kind, tensors in (("weights", weights), ("optimizer", optimizer)):
                mine = tensors if writers.is_first else {n: t for n, t in tensors.items() if isinstance(t, Shard)}
                if tensors:
                    file = temporary / writers.file(kind)
                    write(mine, file)
                    own[kind] = sha256(file)
        digests = {
            writers.file(kind, writer): digest
            for kind in ("weights", "optimizer")
            for writer, digest in enumerate(writers.gather(own.get(kind)))
            if digest is not None
        }
        with writers.together():
            if writers.is_first:
                content = {"state": asdict(state), "digest": recipe.digest, "recipe": recipe.settings()}
                (temporary / "state.json").write_text(json.dumps(content, indent=1) + "\n")
                publish(temporary, path, digests | {"state.json": sha256(temporary / "state.json")})
                remove_old(folder, keep)
    finally:
        if writers.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
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
    found = _folders(folder)
    for path in reversed(found):
        try:
            return _load(path, recipe)
        except BundleError as error:
            instead = "using the one before" if path != found[0] else "there is none before it"
            logger.warning("checkpoint %s is damaged (%s); %s", path.name, error, instead)
            aside = path.with_name(path.name + ".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            damaged = True
    if damaged:
        logger.warning("%s holds no intact checkpoint; training begins at step 0", folder)
    return None


def _load(path: Path, recipe: Recipe) -> Checkpoint:
    files = verify(path)
    try:
        content = json.loads((path / "state.json").read_text())
        weights, optimizer = (
            StoredTensors(path / name for name in sorted(files) if name.startswith(kind) and name.endswith(_SUFFIX))
            for kind in ("weights", "optimizer")
        )
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
