"""Validation settings of a recipe, and what follows from the accuracies so far: the best step, and an early stop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypedDict

from pydantic import Field, model_validator

from pal.config import StrictConfig


class Validation(StrictConfig):
    """Validation: questions that the model answers every few steps; the answers are compared with the right ones."""

    manifest: Path | None = None
    """Manifest of the questions, with clips that are not trained on."""
    root: Path | None = None
    """Base folder of the manifest's relative audio paths; default: the manifest's folder."""
    share: float | None = Field(default=None, gt=0, lt=1)
    """Instead of a manifest: share of the clips of each source to hold out. No stage trains on these clips, which are
    chosen by a hash of their paths relative to the source's folder."""
    every: int = Field(gt=0)
    """Steps of a stage between two validations; there is also one after its last step."""
    questions: int = Field(default=200, gt=0)
    """Maximum number of questions, drawn once by the recipe's seed."""
    stages: list[str] | None = None
    """Names of the stages with validation; default: those with objective 'answers'."""
    patience: int | None = Field(default=None, gt=0)
    """End the stage after so many validations in a row without a higher accuracy."""
    model: Literal["best", "last"] = "best"
    """Weights with which a stage ends: those of its best validation (the first of equal ones), or the last."""
    samples: int = Field(default=3, ge=0)
    """Number of questions whose answers are in the log."""
    no_audio: bool = False
    """Also ask the same questions without audio, and log that accuracy."""
    batch: int = Field(default=32, gt=0)
    """Questions of a forward pass."""
    max_new_tokens: int = Field(default=32, gt=0)
    """Maximum length of an answer."""

    @model_validator(mode="after")
    def _one_origin(self) -> Validation:
        if (self.manifest is None) == (self.share is None):
            raise ValueError("give either 'manifest' or 'share'")
        if self.root is not None and self.manifest is None:
            raise ValueError("'root' belongs to a 'manifest'; remove it")
        return self


class ValidationScore(TypedDict):
    """Result of one validation, as checkpoints and `train.json` hold it."""

    stage: int
    """Index of the stage."""
    step: int
    """Completed steps of all stages."""
    accuracy: float
    questions: int


def best_score(scores: Sequence[ValidationScore], stage: int) -> ValidationScore | None:
    """The best validation of a stage, the first of equal ones; None if there was none."""
    return max(
        (score for score in scores if score["stage"] == stage), key=lambda score: score["accuracy"], default=None
    )


def ends_early(scores: Sequence[ValidationScore], stage: int, patience: int | None) -> bool:
    """True if the last `patience` validations of the stage were not better than an earlier one."""
    own = [score["accuracy"] for score in scores if score["stage"] == stage]
    return patience is not None and bool(own) and len(own) - 1 - own.index(max(own)) >= patience
