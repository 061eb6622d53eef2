"""Data sources of a recipe: where records come from, and which of them are taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from pal.config import StrictConfig
from pal.data.tabular import TableSource


class SynthSource(StrictConfig):
    """Synthetic scenes, generated into the run's folder before training, the same for the same seed."""

    scenes: int = Field(gt=0)
    seed: int = 0
    seconds: float = 4.0
    """Length of a scene."""
    questions_per_scene: int = Field(default=6, gt=0)


class PrepareSource(StrictConfig):
    """Public data set, prepared as a manifest in the run's folder as by `pal data prepare`."""

    name: str
    root: Path
    """Folder of the data set."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the data set's reader, such as `folds` or `speakers`."""


class Source(StrictConfig):
    """Data source: a manifest, a table, or options to generate or prepare a manifest."""

    manifest: Path | None = None
    table: TableSource | None = None
    synth: SynthSource | None = None
    prepare: PrepareSource | None = None
    root: Path | None = None
    """Base folder of relative audio paths; default: the manifest's folder."""
    weight: float | None = Field(default=None, gt=0)
    """Relative share of the clips of a stage; set it for all sources of the stage or for none."""
    repeat: float = Field(default=1.0, gt=0)
    """Passes over the source in an epoch; 0.5 takes every second clip. Not used with weights."""
    tasks: list[str] | None = None
    """Only records of these tasks."""
    datasets: list[str] | None = None
    """Only records of these datasets."""
    augment: dict[str, Any] | None = None
    """Options of `pal.data.augment.Augment`. Options that cut (`crop_seconds`, and `time_shift` without `wrap`) are
    allowed only with objective 'tags' and records of one clip whose tags have start and end, since other answers may be
    about the part that is cut off."""
    optional: bool = False
    """Leave the source out, with a line in the log, if its files are missing."""
    skip_clips: Path | None = None
    """File that lists unusable clips, one path a line without comments, as from `pal data check --write-bad FILE`.
    Records with these clips are skipped, and their number is logged."""
    read_to_end: bool = False
    """Read clips of unknown length (such as a streamed WAV) to the end of the file, with a warning for each."""

    def takes(self, task: str, dataset: str) -> bool:
        """True if `tasks` and `datasets` select records of this task and dataset."""
        return (self.tasks is None or task in self.tasks) and (self.datasets is None or dataset in self.datasets)

    @model_validator(mode="after")
    def _one_origin(self) -> Source:
        if sum(origin is not None for origin in (self.manifest, self.table, self.synth, self.prepare)) != 1:
            raise ValueError("give one of 'manifest', 'table', 'synth' and 'prepare'")
        if self.table is not None and self.root is not None:
            raise ValueError("'root' is for manifests; paths in a table are relative to its folder")
        return self
