"""Sections on training runs: losses of all runs in one plot, their stages, and differences of their recipes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pal.errors import BundleError
from pal.lab.numbers import format_milliseconds, format_value, three_digits
from pal.report.embed import MediaEmbedder
from pal.report.page import Part, Prose, Section, Table
from pal.train.curves import Borders, Curve, draw_losses, loss_curve, loss_size, read_log, stage_borders
from pal.train.recipe import differences

TITLE = "Training"
DESCRIPTION = "training runs (train.json, log.jsonl)"

_DIFFERENCES = 40
"""Maximum number of settings in the table of differences."""


@dataclass(frozen=True)
class TrainingRun:
    """One training run, finished or unfinished."""

    recipe: Mapping[str, Any]
    curve: Curve
    borders: Borders
    stages: Sequence[Mapping[str, Any]]
    """Report of each stage; empty for an unfinished run."""
    seconds: float | None
    """Training time; None for an unfinished run."""
    device: str
    fault: str | None = None
    """Message about an unfinished run."""


def find(path: Path) -> list[Path]:
    """The folder, if it holds a training run."""
    return [path] if any((path / name).is_file() for name in ("train.json", "log.jsonl")) else []


def read(path: Path) -> TrainingRun:
    """Read a training run; an unfinished run has its curve so far, and a `fault`.

    Raises:
        BundleError: a file is damaged or missing.
    """
    log = read_log(path / "log.jsonl")
    curve, borders = loss_curve(log), stage_borders(log)
    if (path / "train.json").is_file():
        report = _json(path / "train.json")
        stages = [{key: stage[key] for key in _STAGE} for stage in report["stages"]]
        return TrainingRun(report["recipe"], curve, borders, stages, report["seconds"], report["device"])
    recipe = _json(path / "recipe.json")["recipe"]
    fault = f"{path}: unfinished, at step {int(curve[-1][0]) if curve else 0}; resume it with pal train --resume"
    return TrainingRun(recipe, curve, borders, [], None, "", fault)


_STAGE = ("name", "objective", "steps", "seconds", "loss", "trained_parameters", "median_step_seconds")


def chapter(
    found: Sequence[tuple[str, TrainingRun]], embed: MediaEmbedder
) -> tuple[list[Section], list[dict[str, Any]]]:
    """Sections on losses, stages, and differences of the recipes."""
    runs = dict(found)
    sections = []
    if any(run.curve for run in runs.values()):
        caption = (
            "Logged values (pale) and their running mean (bold). Vertical lines are stage borders of all runs, marks "
            "those of single runs. Losses of different objectives cannot be compared."
        )
        curves = {name: run.curve for name, run in runs.items()}
        borders = {name: run.borders for name, run in runs.items()}
        alt = "Training loss over the steps; the losses at the end are in the table"
        draw = partial(draw_losses, curves=curves, borders=borders)
        sections.append(Section("Losses", [embed.plot(alt, draw, loss_size(len(curves)), caption)]))
    sections.append(Section("Stages", [_stages(runs)]))
    if len(runs) > 1:
        sections.append(Section("Differences of the recipes", _recipe_differences(runs)))
    facts = [
        {
            "finished": run.seconds is not None,
            "steps": int(run.curve[-1][0]) if run.curve else 0,
            "loss": run.curve[-1][1] if run.curve else None,
            "seconds": run.seconds,
        }
        for run in runs.values()
    ]
    return sections, facts


def _stages(runs: Mapping[str, TrainingRun]) -> Table:
    headings = ("run, stage", "objective", "steps", "last loss", "median step", "seconds", "trained", "device")
    rows = []
    for name, run in runs.items():
        for stage in run.stages:
            cells = [f"{name}, {stage['name']}", stage["objective"], f"{stage['steps']:,}", format_value(stage["loss"])]
            cells += [format_milliseconds(stage["median_step_seconds"]), three_digits(stage["seconds"])]
            rows.append([*cells, f"{stage['trained_parameters']:,}", run.device])
        if run.seconds is None:
            step, loss = run.curve[-1] if run.curve else (0, None)
            rows.append([name, "unfinished", f"{step:,.0f}", format_value(loss), "", "", "", ""])
    return Table.of("Stages of each run", headings, rows)


def _recipe_differences(runs: Mapping[str, TrainingRun]) -> list[Part]:
    first = next(iter(runs.values())).recipe
    keys = list(dict.fromkeys(key for run in runs.values() for key in differences(first, run.recipe)))
    if not keys:
        return [Prose("None: all runs have the same recipe.")]
    shown = keys[:_DIFFERENCES]
    rows = [[name, *(setting_at(run.recipe, key) for key in shown)] for name, run in runs.items()]
    parts: list[Part] = [Table.of("Settings that differ between runs", ["run", *shown], rows, words=True)]
    if len(keys) > len(shown):
        parts.append(Prose(f"{len(keys) - len(shown)} more settings differ and are not shown."))
    return parts


def setting_at(recipe: Any, key: str) -> str:
    """Text of the value at a dotted key, as in `differences`; a dash if there is none."""
    at = recipe
    for name in key.split("."):
        try:
            at = at[int(name)] if isinstance(at, list) else at[name]
        except (KeyError, IndexError, ValueError, TypeError):
            return "–"
    return at if isinstance(at, str) else json.dumps(_without_null(at), ensure_ascii=False)


def _without_null(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_null(one) for key, one in value.items() if one is not None}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(f"{path.parent}: no {path.name}; copy the folder again") from None
    except ValueError:
        raise BundleError(f"{path}: damaged; copy the folder again") from None
