"""Training runs side by side: which there are, how they ended, where their recipes differ (`pal runs`)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pal.errors import ConfigError, PalError, first_sentence
from pal.evaluate.result import Result
from pal.files import write_bytes
from pal.lab.names import distinct_names
from pal.plots import MISSING, render
from pal.report import training
from pal.report.training import TrainingRun, setting_at
from pal.train import provenance
from pal.train.curves import draw_losses, log_fault, loss_size, read_log
from pal.train.recipe import differences

DEPTH = 4
"""Number of folder levels searched below a given folder."""
_MARKS = ("recipe.json", "train.json", "log.jsonl")
"""Files of which a run folder has at least one."""
_INSIDE = ("checkpoints", "data", "tokenizer", "model", "llm")
"""Folders of a run that hold no scores."""
_SCORE_DEPTH = 2
"""Number of folder levels of a run that are searched for scores."""
_SCORE = {"benchmark", "metric", "score", "intervals"}
"""Keys of every file of scores."""


@dataclass(frozen=True)
class RunSummary:
    """One run folder in a few numbers."""

    path: str
    name: str
    """End of the path by which it differs from the others."""
    finished: bool = False
    steps: int = 0
    """Steps done, over all stages."""
    loss: float | None = None
    """Of the last line of the log."""
    seconds: float | None = None
    """Training time."""
    validation_accuracy: float | None = None
    """Best of the log; None if the log has none."""
    device: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    """Benchmark and metric -> score, of each evaluation in the folder."""
    reasons: tuple[str, ...] = ()
    """Why the folder, or a file in it, could not be used."""


@dataclass(frozen=True)
class Runs:
    """Runs that were found."""

    summaries: tuple[RunSummary, ...]
    """All folders, by path; those that are no run have reasons and no numbers."""
    read: Mapping[str, TrainingRun]
    """Name of each run that could be read -> its content."""

    def differences(self) -> dict[str, dict[str, str]]:
        """Setting at which the recipes differ -> name of each run -> value as text."""
        if not self.read:
            return {}
        first = next(iter(self.read.values())).recipe
        keys = dict.fromkeys(key for run in self.read.values() for key in differences(first, run.recipe))
        return {key: {name: setting_at(run.recipe, key) for name, run in self.read.items()} for key in keys}

    def scores(self) -> dict[str, dict[str, float]]:
        """Benchmark and metric -> name of each run that has the score -> score."""
        names = dict.fromkeys(score for one in self.summaries for score in one.scores)
        return {
            score: {one.name: one.scores[score] for one in self.summaries if score in one.scores} for score in names
        }

    def draw(self, picture: Path) -> None:
        """Write the loss curves of all runs as one PNG.

        Raises:
            ConfigError: no run has a curve, or matplotlib is missing.
        """
        curves = {name: run.curve for name, run in self.read.items() if run.curve}
        if not curves:
            raise ConfigError(f"{picture}: no run has a line in its log.jsonl, so there is no curve to draw")
        borders = {name: run.borders for name, run in self.read.items()}
        rendered = render(partial(draw_losses, curves=curves, borders=borders), loss_size(len(curves)))
        if rendered is None:
            raise ConfigError(MISSING)
        write_bytes(picture, rendered.png)

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible values."""
        return {
            "runs": [asdict(one) for one in self.summaries],
            "differences": self.differences(),
            "scores": self.scores(),
        }


def find_runs(paths: Sequence[Path]) -> Runs:
    """All run folders among some folders and below them, finished or not.

    A folder directly below a given one in which there is no run at all is listed with that reason.

    Raises:
        ConfigError: no such folder.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise ConfigError(f"{path}: is no folder; give a run folder, or a folder with some")
        if _is_run(path):
            found[path] = None
            continue
        for child in sorted(one for one in path.iterdir() if one.is_dir() and not one.name.startswith(".")):
            found |= dict.fromkeys(_runs_below(child, DEPTH - 1) or [child])
    names = distinct_names(list(found))
    summaries, read = [], {}
    for path, name in zip(found, names, strict=True):
        summary, run = _summary(path, name)
        summaries.append(summary)
        if run is not None:
            read[name] = run
    return Runs(tuple(summaries), read)


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in _MARKS)


def _runs_below(path: Path, depth: int) -> list[Path]:
    """The folder, or run folders in it; nothing inside of a run is one of its own."""
    if _is_run(path):
        return [path]
    if depth == 0:
        return []
    try:
        inside = sorted(one for one in path.iterdir() if one.is_dir() and not one.name.startswith("."))
    except OSError:
        return []
    return [run for one in inside if not one.is_symlink() for run in _runs_below(one, depth - 1)]


def _summary(path: Path, name: str) -> tuple[RunSummary, TrainingRun | None]:
    if not _is_run(path):
        return RunSummary(str(path), name, reasons=(f"no run of pal train: has none of {', '.join(_MARKS)}",)), None
    try:
        run = training.read(path)
        lines = read_log(path / "log.jsonl")
        accuracies = [value for line in lines for value in _validation_accuracies(line)]
        summary = RunSummary(
            str(path),
            name,
            finished=run.seconds is not None,
            steps=int(run.curve[-1][0]) if run.curve else 0,
            loss=run.curve[-1][1] if run.curve else None,
            seconds=run.seconds if run.seconds is not None else lines[-1].get("seconds") if lines else None,
            validation_accuracy=max(accuracies, default=None),
            device=run.device or next((one["device"] for one in provenance.read(path)[-1:]), ""),
        )
    except PalError as error:
        return RunSummary(str(path), name, reasons=(str(error),)), None
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, OSError) as error:
        what = f"its {' or '.join(one for one in _MARKS if (path / one).is_file())} is damaged, or not of pal train"
        return RunSummary(str(path), name, reasons=(f"{what} ({first_sentence(error)}); copy it again",)), None
    scores, reasons = _scores(path)
    reasons = [*_damage(path), *reasons]
    return RunSummary(**{**vars(summary), "scores": scores, "reasons": tuple(reasons)}), run


def _damage(path: Path) -> Iterator[str]:
    """What cannot be read of a run's files, though the run can be listed."""
    fault = log_fault(path / "log.jsonl")
    if fault is not None:
        yield f"{fault}; its steps from there on are not shown"
    for name in ("recipe.json", provenance.FILE):
        try:
            whole = isinstance(json.loads((path / name).read_bytes()), dict)
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            whole = False
        if not whole:
            yield f"{name} is damaged; copy it again"


def _validation_accuracies(line: Mapping[str, Any], inside: bool = False) -> Iterator[float]:
    """Accuracies of a line that are of validation: by a key's name, or that of the keys above it."""
    for key, value in line.items():
        validates = inside or key.startswith("val")
        if isinstance(value, Mapping):
            yield from _validation_accuracies(value, validates)
        elif validates and key.endswith("accuracy") and isinstance(value, int | float):
            yield float(value)


def _scores(path: Path) -> tuple[dict[str, float], list[str]]:
    """Scores of the evaluations in a run folder, and why a file of scores could not be read."""
    found: dict[str, float] = {}
    reasons = []
    for where, folders, files in os.walk(path):
        below = Path(where).relative_to(path)
        folders[:] = sorted(one for one in folders if one not in _INSIDE and len(below.parts) < _SCORE_DEPTH)
        for file in sorted(Path(where, one) for one in files if one.endswith(".json") and one not in _MARKS):
            try:
                if not _has_scores(file):
                    continue
                result = Result.load(file)
            except PalError as error:
                reasons.append(str(error))
                continue
            name = f"{result.benchmark}, {result.metric}"
            if name in found:
                name += f" ({file.relative_to(path).as_posix()})"
            found[name] = result.score
    return found, reasons


def _has_scores(file: Path) -> bool:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return file.name.startswith("score")  # which `Result.load` then refuses, with a reason
    return isinstance(content, dict) and set(content) >= _SCORE
