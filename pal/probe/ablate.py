"""`pal ablate`: trains a grid of recipes with shared seeds and evaluates all runs on the same questions.

    OUT/
      data/                         generated and prepared data; the `data` of every run is a link to it
      scenes-250/                   synthetic scenes with the questions, if no manifest is given
      integration-lal/seed-1/       a run folder of `pal train`
          on/NAME.json              answers to the questions of a manifest
      integration-lal/cost.json     costs of a training step of the cell
      probe.json, *.png, table.md   the result

Finished runs are kept, so an interrupted ablation resumes, and a larger grid reuses the runs of a smaller one.
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
from pal.probe.ablated import AblationResult, CellAnswers, CellCost, Curve
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
    """Questions of one manifest."""

    name: str
    digest: str
    records: Sequence[Record]
    limit: int

    def options(self, bundle: str) -> dict[str, Any]:
        """Settings that determine the answers, apart from the code; `bundle` is the digest of the model."""
        return {"manifest": self.name, "data_digest": self.digest, "records_at_most": self.limit, "bundle": bundle}


@dataclass(frozen=True)
class CellRun:
    """Training run of one cell with one seed."""

    cell: GridCell
    seed: int
    folder: Path

    @cached_property
    def recipe(self) -> Recipe:
        """Recipe of the run."""
        return self.cell.recipe(self.seed)

    @property
    def report(self) -> dict[str, Any] | None:
        """Content of `train.json`; None until training is finished."""
        path = self.folder / "train.json"
        return _json(path) if path.is_file() else None

    @property
    def bundle(self) -> str:
        """Digest of the model: SHA-256 of its manifest, which lists the digests of its files."""
        return sha256(self.folder / "model" / MANIFEST)

    @property
    def cost(self) -> Path:
        """File with the costs of the cell."""
        return self.folder.parent / "cost.json"

    def answers(self, asked: QuestionSet) -> Path:
        """File with the answers to some questions."""
        return self.folder / "on" / f"{asked.name}.json"

    def score(self, asked: QuestionSet) -> Result | None:
        """Stored answers of this model to some questions; None if they are missing, damaged or include errors."""
        path = self.answers(asked)
        if not path.is_file():
            return None
        try:
            score = Result.load(path)
            same = score.settings["options"] == asked.options(self.bundle)
        except (BundleError, KeyError):
            return None  # damaged or of an earlier version
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
        recipe: recipe that the cells modify.
        axes: see `pal.probe.axes.grid`; the first value of each gives the baseline cell.
        out: folder of the runs; finished runs in it are kept.
        settings: overrides of the recipe for all cells.
        seeds: number of runs of a cell, with the seeds 1, 2, ...
        on: manifests with the questions; none: synthetic scenes.
        limit: maximum number of records of a manifest, spread evenly over it.
        batch: rows of a forward pass of the evaluation.
        progress: show progress bars while evaluating.

    Raises:
        ConfigError: the recipe of a cell is invalid (checked before any training), or `out` holds other runs.
        ManifestError: a manifest without questions.
    """
    began = time.perf_counter()
    cells = grid(recipe, axes, settings)
    for cell in cells:
        cell.check()
    # seeds in the outer loop, so that an unfinished ablation has runs of all cells
    runs = [CellRun(cell, seed, out / cell.name / f"seed-{seed}") for seed in range(1, seeds + 1) for cell in cells]
    _check(runs, out)
    asked = [_question_set(path, limit) for path in _manifests(on, limit, out)]
    names = [one.name for one in asked]
    duplicate = next((name for name in names if names.count(name) > 1), None)
    if duplicate is not None:
        raise ConfigError(f"two manifests are named '{duplicate}'; rename one, since answers are stored by this name")
    scores: dict[tuple[str, int], list[Result]] = {}
    for number, run in enumerate(runs, 1):
        left = _time_left(runs[number - 1 :], out)
        logger.info("run %d of %d: %s, seed %d%s", number, len(runs), run.cell.label, run.seed, left)
        scores[run.cell.name, run.seed] = _train_and_evaluate(run, asked, out, batch, progress)
    of_cell = {cell.name: [run for run in runs if run.cell is cell] for cell in cells}
    results = AblationResult(
        cells=cells,
        answers=[
            CellAnswers(
                one.name,
                [[scores[cell.name, run.seed][place] for run in of_cell[cell.name]] for cell in cells],
                _parts(one.records),
            )
            for place, one in enumerate(asked)
        ],
        costs=[_cell_cost(of_cell[cell.name]) for cell in cells],
        curves=[[_curve(run) for run in of_cell[cell.name]] for cell in cells],
    )
    write_text(out / "table.md", results.markdown())
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
        reading=results.reading(),
        tables=results.tables(),
        details=results.details(),
        pictures=results.pictures(),
        seconds=time.perf_counter() - began,
    )


def _check(runs: Sequence[CellRun], out: Path) -> None:
    """Raise ConfigError if a folder holds a run of another recipe, or `out` holds runs on other data."""
    for run in runs:
        marker = run.folder / "recipe.json"
        if marker.is_file():
            before = _json(marker)
            check_recipe(run.folder, before["digest"], before["recipe"], run.recipe)
    wanted = runs[0].recipe.settings()["data"]
    for marker in sorted(out.glob("*/seed-*/recipe.json")):
        if _json(marker)["recipe"]["data"] != wanted:
            raise ConfigError(
                f"{marker.parent} was trained on other data, which are in {out / 'data'}; give another --out"
            )


def _manifests(on: Sequence[Path], limit: int, out: Path) -> list[Path]:
    if on:
        return list(on)
    scenes = -(-limit // 4)
    path = out / f"scenes-{scenes}" / "manifest.jsonl"
    if not path.is_file():
        synthesise(path.parent, scenes=scenes, seed=SCENES_SEED, questions_per_scene=4)
    return [path]


def _question_set(path: Path, limit: int) -> QuestionSet:
    with records_to_ask([path], limit) as records:
        name = path.parent.name if path.stem == "manifest" else path.stem
        return QuestionSet(name, Manifest(path).digest, records, limit)


def _parts(records: Sequence[Record]) -> dict[str, list[int]]:
    """Name of a domain or task -> indices of its questions, without those that all questions share."""
    parts: dict[str, list[int]] = {}
    # each turn of a record is a question
    of_each = [
        (f"domain {domain_of(record)}", f"task {record.task or 'all'}") for record in records for _ in record.turns
    ]
    for kind in (0, 1):
        for name in sorted({words[kind] for words in of_each}):
            parts[name] = [number for number, words in enumerate(of_each) if words[kind] == name]
    return {name: some for name, some in parts.items() if len(some) < len(of_each)}


def _cell_cost(runs: Sequence[CellRun]) -> CellCost:
    """Costs of a cell: counted in its first run, times from all runs."""
    kept = _stored_cost(runs[0]) or {}
    steps = [run.report["stages"][-1]["median_step_seconds"] for run in runs if run.report is not None]
    return CellCost(
        **{name: number for name, number in kept.items() if name != "recipe_digest"},
        step_seconds=statistics.median(steps),
    )


def _curve(run: CellRun) -> Curve:
    lines = read_log(run.folder / "log.jsonl")
    return [line["step"] for line in lines], [line["loss"] for line in lines]


def _time_left(runs: Sequence[CellRun], out: Path) -> str:
    """Text with an estimate of the time left, from the finished runs in `out`."""
    to_train = sum(run.report is None for run in runs)
    took = [_json(path)["seconds"] for path in out.glob("*/seed-*/train.json")]
    if not to_train or not took:
        return ""
    return f" ({to_train} to train, about {to_train * statistics.mean(took) / 60:.0f} minutes)"


def _json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


# One run


def _train_and_evaluate(
    run: CellRun, asked: Sequence[QuestionSet], out: Path, batch: int, progress: bool
) -> list[Result]:
    """Train and evaluate a run and count the costs of its cell; finished parts are skipped."""
    finished = run.report is not None
    scores = [run.score(one) if finished else None for one in asked]
    counted = run.seed != 1 or (finished and _stored_cost(run) is not None)
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
            benchmark = from_records(one.records, one.name, options=one.options(run.bundle))
            score = evaluate(model, benchmark, batch=batch, progress=progress)
            score.save(run.answers(one))
        done.append(score)
    if not counted:  # last, since a step changes batch statistics
        write_json(run.cost, {"recipe_digest": run.recipe.digest, **_count_cost(run, model)})
    return done


def _stored_cost(run: CellRun) -> dict[str, Any] | None:
    """Stored costs of the cell; None if they have not been counted."""
    if not run.cost.is_file():
        return None
    kept = _json(run.cost)
    return kept if kept["recipe_digest"] == run.recipe.digest else None


def _count_cost(run: CellRun, model: PalModel) -> dict[str, int]:
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

    def loss(micro_batch: Any) -> Tensor:
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=stage.precision == "bf16"):
            total: Tensor = objective(micro_batch).sum
        return total

    parts = [
        counts(partial(loss, micro_batch), backward=Tensor.backward, weights=weights, device=model.device)
        for micro_batch in data.micro_batches(0, 0, 1)
    ]
    return {
        "trained_parameters": sum(p.numel() for part in trained.values() for p in part.values()),
        "flops": sum(part.flops for part in parts),
        "saved_bytes": max(part.saved_bytes for part in parts),
        "peak_bytes": max(part.peak_bytes for part in parts),
    }
