"""Folders of `pal train`: losses of all runs in one plot, and what distinguishes the runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pal.errors import BundleError
from pal.lab.numbers import milliseconds, shown, three_digits
from pal.report.embed import MediaEmbedder
from pal.report.page import Part, Prose, Section, Table
from pal.train.curves import Borders, Curve, draw_losses, loss_curve, loss_size, read_log, stage_borders
from pal.train.recipe import differences

TITLE = "Training"
UNDERSTANDS = "training runs (train.json, log.jsonl)"

_DIFFERENCES = 40
"""Most settings in the table of what distinguishes the runs."""


@dataclass(frozen=True)
class TrainingRun:
    """One run, finished or not."""

    recipe: Mapping[str, Any]
    curve: Curve
    borders: Borders
    stages: Sequence[Mapping[str, Any]]
    seconds: float | None
    """None while it is not finished, as are the others."""
    device: str
    fault: str | None = None


def find(path: Path) -> list[Path]:
    """The folder, if a run was begun in it."""
    return [path] if any((path / name).is_file() for name in ("train.json", "log.jsonl")) else []


def read(path: Path) -> TrainingRun:
    """What `pal train` wrote; of a run that is not finished its curve so far, and a fault that says so.

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
    fault = f"{path}: not finished, at step {int(curve[-1][0]) if curve else 0}; go on with pal train --resume"
    return TrainingRun(recipe, curve, borders, [], None, "", fault)


_STAGE = ("name", "objective", "steps", "seconds", "loss", "trained_parameters", "median_step_seconds")


def chapter(
    found: Sequence[tuple[str, TrainingRun]], embed: MediaEmbedder
) -> tuple[list[Section], list[dict[str, Any]]]:
    """The curves, what each run did, and where the recipes differ."""
    runs = dict(found)
    sections = []
    if any(run.curve for run in runs.values()):
        caption = (
            "Pale is every logged value, bold the running mean. Upright lines are the borders of stages that all runs "
            "have, marks those of one run. Stages with another objective have losses that cannot be compared."
        )
        curves = {name: run.curve for name, run in runs.items()}
        borders = {name: run.borders for name, run in runs.items()}
        alt = "Training loss over the steps; the losses at the end are in the table"
        draw = partial(draw_losses, curves=curves, borders=borders)
        sections.append(Section("Losses", [embed.plot(alt, draw, loss_size(len(curves)), caption)]))
    sections.append(Section("What was done", [_done(runs)]))
    if len(runs) > 1:
        sections.append(Section("What distinguishes the runs", _distinguished(runs)))
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


def _done(runs: Mapping[str, TrainingRun]) -> Table:
    headings = ("run, stage", "objective", "steps", "last loss", "median step", "seconds", "trained", "device")
    rows = []
    for name, run in runs.items():
        for stage in run.stages:
            cells = [f"{name}, {stage['name']}", stage["objective"], f"{stage['steps']:,}", shown(stage["loss"])]
            cells += [milliseconds(stage["median_step_seconds"]), three_digits(stage["seconds"])]
            rows.append([*cells, f"{stage['trained_parameters']:,}", run.device])
        if run.seconds is None:
            step, loss = run.curve[-1] if run.curve else (0, None)
            rows.append([name, "not finished", f"{step:,.0f}", shown(loss), "", "", "", ""])
    return Table.of("Stages of each run", headings, rows)


def _distinguished(runs: Mapping[str, TrainingRun]) -> list[Part]:
    first = next(iter(runs.values())).recipe
    keys = list(dict.fromkeys(key for run in runs.values() for key in differences(first, run.recipe)))
    if not keys:
        return [Prose("Nothing: all runs have the same recipe.")]
    shown = keys[:_DIFFERENCES]
    rows = [[name, *(_setting(run.recipe, key) for key in shown)] for name, run in runs.items()]
    parts: list[Part] = [Table.of("Settings that are not the same in all runs", ["run", *shown], rows, words=True)]
    if len(keys) > len(shown):
        parts.append(Prose(f"{len(keys) - len(shown)} more settings differ and are not shown."))
    return parts


def _setting(recipe: Any, key: str) -> str:
    """The value at a dotted key, as `differences` names it; a dash where there is none."""
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
