"""Trains the grid of an ablation with shared seeds, asks every run the same questions, and sums up.

    OUT/
      data/                         what the recipe makes; every run's own `data` is a link to it
      scenes-250/                   the questions, where no manifest is given
      integration-lal/seed-1/       a run folder of `pal train`
          on/NAME.json              its answers to a manifest's questions
      integration-lal/cost.json     what a training step of the cell takes
      probe.json, *.png, table.md   the result

Finished runs are kept: a killed ablation goes on, and a larger one includes the runs of a smaller one.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pal import train
from pal.bench.measure import counts
from pal.data.collate import WaveformCache
from pal.data.manifest import Manifest, Record
from pal.data.synth import synthesise
from pal.errors import BundleError, ConfigError
from pal.evaluate import Result, evaluate, from_records
from pal.files import MANIFEST, sha256, write_json, write_text
from pal.lab.records import SCENES_SEED, domain_of, records_to_ask
from pal.probe.ablated import Ablated, CellAnswers, CellCost, Curve
from pal.probe.axes import GridCell, grid
from pal.probe.probe_result import ProbeResult
from pal.train.checkpoint import check_recipe
from pal.train.curves import read_log
from pal.train.objectives import build_objective
from pal.train.sources import StageData, open_sources
from pal.train.stages import freeze, set_modes

if TYPE_CHECKING:
    from pal.model import PalModel
    from pal.train.recipe import Recipe

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuestionSet:
    """The questions of one manifest."""

    name: str
    digest: str
    records: Sequence[Record]
    limit: int

    def options(self, bundle: str) -> dict[str, Any]:
        """Settings on which the answers depend, beside the code; `bundle` is the digest of the model's folder."""
        return {"manifest": self.name, "data_digest": self.digest, "records_at_most": self.limit, "bundle": bundle}


@dataclass(frozen=True)
class CellRun:
    """One cell with one seed."""

    cell: GridCell
    seed: int
    folder: Path

    @cached_property
    def recipe(self) -> Recipe:
        """Recipe of the run."""
        return self.cell.recipe(self.seed)

    @property
    def report(self) -> dict[str, Any] | None:
        """Content of `train.json`; None before the end of the training."""
        path = self.folder / "train.json"
        return _json(path) if path.is_file() else None

    @property
    def bundle(self) -> str:
        """Digest of its model: of the list of its files' digests."""
        return sha256(self.folder / "model" / MANIFEST)

    @property
    def cost(self) -> Path:
        """File of its cell's costs."""
        return self.folder.parent / "cost.json"

    def answers(self, asked: QuestionSet) -> Path:
        """File of its answers."""
        return self.folder / "on" / f"{asked.name}.json"

    def score(self, asked: QuestionSet) -> Result | None:
        """Stored answers of this model to these questions; None where there are none or one raised."""
        path = self.answers(asked)
        if not path.is_file():
            return None
        try:
            score = Result.load(path)
            same = score.settings["options"] == asked.options(self.bundle)
        except (BundleError, KeyError):
            return None  # damaged
        return score if same and not score.errors else None


def ablate(
    recipe: Path,
    axes: Sequence[str],
    out: Path,
    settings: Sequence[str] = (),
    seeds: int = 3,
    on: Sequence[Path] = (),
    limit: int = 1000,
    batch: int = 32,
    progress: bool = False,
) -> ProbeResult:
    """Train and evaluate every cell of a grid with each seed.

    Args:
        recipe: the recipe that the cells change.
        axes: see `pal.probe.axes.grid`; the first value of each makes the cell that others are compared with.
        out: folder of the runs; what is finished there is not done again.
        settings: overrides of the recipe for all cells.
        seeds: the runs of a cell have the seeds 1 to this.
        on: manifests to ask from; made-up scenes where there are none.
        limit: most records of a manifest, taken evenly from all of it.
        batch: rows in a forward pass of the evaluation.
        progress: show a bar while it evaluates.

    Raises:
        ConfigError: a cell cannot be carried out, found before anything is trained; or `out` holds others' runs.
        ManifestError: a manifest without questions.
    """
    began = time.perf_counter()
    cells = grid(recipe, axes, settings)
    for cell in cells:
        cell.check()
    # seeds in the outer loop, so that the runs of an unfinished ablation can be compared
    runs = [CellRun(cell, seed, out / cell.name / f"seed-{seed}") for seed in range(1, seeds + 1) for cell in cells]
    _check(runs, out)
    asked = [_asked(path, limit) for path in _manifests(on, limit, out)]
    twice = next((one.name for one in asked if [other.name for other in asked].count(one.name) > 1), None)
    if twice is not None:
        raise ConfigError(f"two manifests are called '{twice}'; rename one, since answers are kept by this name")
    scores: dict[tuple[str, int], list[Result]] = {}
    for number, run in enumerate(runs, 1):
        left = _time_left(runs[number - 1 :], out)
        logger.info("run %d of %d: %s, seed %d%s", number, len(runs), run.cell.label, run.seed, left)
        scores[run.cell.name, run.seed] = _done(run, asked, out, batch, progress)
    of_cell = {cell.name: [run for run in runs if run.cell is cell] for cell in cells}
    found = Ablated(
        cells=cells,
        answers=[
            CellAnswers(
                one.name,
                [[scores[cell.name, run.seed][place] for run in of_cell[cell.name]] for cell in cells],
                _parts(one.records),
            )
            for place, one in enumerate(asked)
        ],
        spent=[_spent(of_cell[cell.name]) for cell in cells],
        curves=[[_curve(run) for run in of_cell[cell.name]] for cell in cells],
    )
    write_text(out / "table.md", found.markdown())
    return ProbeResult(
        probe="ablate",
        model={"source": str(recipe), "cells": [cell.label for cell in cells]},
        settings={
            "recipe": str(recipe),
            "set": list(settings),
            "axes": list(axes),
            "seeds": seeds,
            "asked": {one.name: {"data_digest": one.digest, "questions": len(one.records)} for one in asked},
            "records_at_most": limit,
            "runs": {str(run.folder.relative_to(out)): run.bundle for run in runs},
        },
        reading=found.reading(),
        tables=found.tables(),
        details=found.details(),
        pictures=found.pictures(),
        seconds=time.perf_counter() - began,
    )


def _check(runs: Sequence[CellRun], out: Path) -> None:
    """Raises ConfigError where a folder holds another run, or runs in `out` were made of other data."""
    for run in runs:
        marker = run.folder / "recipe.json"
        if marker.is_file():
            before = _json(marker)
            check_recipe(run.folder, before["digest"], before["recipe"], run.recipe)
    wanted = runs[0].recipe.settings()["data"]
    for marker in sorted(out.glob("*/seed-*/recipe.json")):
        if _json(marker)["recipe"]["data"] != wanted:
            raise ConfigError(f"{marker.parent} was made of other data, kept in {out / 'data'}; give another --out")


def _manifests(on: Sequence[Path], limit: int, out: Path) -> list[Path]:
    if on:
        return list(on)
    scenes = -(-limit // 4)
    path = out / f"scenes-{scenes}" / "manifest.jsonl"
    if not path.is_file():
        synthesise(path.parent, scenes=scenes, seed=SCENES_SEED, questions_per_scene=4)
    return [path]


def _asked(path: Path, limit: int) -> QuestionSet:
    with records_to_ask([path], limit) as records:
        name = path.parent.name if path.stem == "manifest" else path.stem
        return QuestionSet(name, Manifest(path).digest, records, limit)


def _parts(records: Sequence[Record]) -> dict[str, list[int]]:
    """Name of a domain or task -> indices of its questions; one that all questions share is left out."""
    parts: dict[str, list[int]] = {}
    # each turn of a record is a question
    of_each = [
        (f"domain {domain_of(record)}", f"task {record.task or 'all'}") for record in records for _ in record.turns
    ]
    for kind in (0, 1):
        for name in sorted({words[kind] for words in of_each}):
            parts[name] = [number for number, words in enumerate(of_each) if words[kind] == name]
    return {name: some for name, some in parts.items() if len(some) < len(of_each)}


def _spent(runs: Sequence[CellRun]) -> CellCost:
    """Costs of a cell's runs; the first run has counted them."""
    kept = _counted(runs[0]) or {}
    steps = [run.report["stages"][-1]["median_step_seconds"] for run in runs if run.report is not None]
    return CellCost(
        **{name: number for name, number in kept.items() if name != "recipe_digest"},
        step_seconds=statistics.median(steps),
    )


def _curve(run: CellRun) -> Curve:
    lines = read_log(run.folder / "log.jsonl")
    return [line["step"] for line in lines], [line["loss"] for line in lines]


def _time_left(runs: Sequence[CellRun], out: Path) -> str:
    """Estimate of the time left, in words, from the finished trainings in `out`."""
    to_train = sum(run.report is None for run in runs)
    took = [_json(path)["seconds"] for path in out.glob("*/seed-*/train.json")]
    if not to_train or not took:
        return ""
    return f" ({to_train} to train, about {to_train * statistics.mean(took) / 60:.0f} minutes)"


def _json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


# One run


def _done(run: CellRun, asked: Sequence[QuestionSet], out: Path, batch: int, progress: bool) -> list[Result]:
    """Train and evaluate a run and count its cell's costs, except for what is finished."""
    finished = run.report is not None
    scores = [run.score(one) if finished else None for one in asked]
    counted = run.seed != 1 or (finished and _counted(run) is not None)
    if finished and counted and None not in scores:
        return [score for score in scores if score is not None]
    (out / "data").mkdir(parents=True, exist_ok=True)
    run.folder.mkdir(parents=True, exist_ok=True)
    if not (run.folder / "data").exists():
        (run.folder / "data").symlink_to(Path("..", "..", "data"), target_is_directory=True)
    model = train.run(run.recipe, run.folder, resume=True)
    done = []
    for one, kept in zip(asked, scores, strict=True):
        score = kept
        if score is None:
            asked_of = from_records(one.records, one.name, options=one.options(run.bundle))
            score = evaluate(model, asked_of, batch=batch, progress=progress)
            score.save(run.answers(one))
        done.append(score)
    if not counted:  # last, since a step changes batch statistics of the trained parts
        write_json(run.cost, {"recipe_digest": run.recipe.digest, **_count(run, model)})
    return done


def _counted(run: CellRun) -> dict[str, Any] | None:
    """Stored costs of the cell's training step; None where they have not been counted."""
    if not run.cost.is_file():
        return None
    kept = _json(run.cost)
    return kept if kept["recipe_digest"] == run.recipe.digest else None


def _count(run: CellRun, model: PalModel) -> dict[str, int]:
    """Count the costs of the first step of the last stage: the same clips and questions in every cell."""
    recipe = run.recipe
    stage = recipe.stages[-1]
    data = StageData(recipe, len(recipe.stages) - 1, open_sources(recipe, run.folder / "data"))
    objective = build_objective(model, stage, data.records())
    trained = freeze(model, stage.train)
    model.llm.checkpoint_gradients(stage.gradient_checkpointing, recompute_audio=stage.recompute_audio)
    objective.train()
    set_modes(model, stage)
    data.start(model, objective, WaveformCache(1 << 28))
    weights = [*objective.parameters(), *objective.buffers()]

    def loss(work: Any) -> Tensor:
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=stage.precision == "bf16"):
            total: Tensor = objective(work).sum
        return total

    parts = [
        counts(partial(loss, work), backward=Tensor.backward, weights=weights, device=model.device)
        for work in data.work(0, 0, 1)
    ]
    return {
        "trained_parameters": sum(p.numel() for part in trained.values() for p in part.values()),
        "flops": sum(part.flops for part in parts),
        "saved_bytes": max(part.saved_bytes for part in parts),
        "peak_bytes": max(part.peak_bytes for part in parts),
    }
