"""Results from existing run folders: rescoring by another rule, and joining of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pal.errors import ConfigError
from pal.evaluate.benchmark import changed_rule
from pal.evaluate.engine import scoring_packages
from pal.evaluate.folder import RunFolder
from pal.evaluate.result import Result
from pal.evaluate.rules.base import Rule
from pal.evaluate.scoring import score
from pal.evaluate.tasks.base import Task
from pal.registry import build, lookup, names


def rescore(folder: str | Path, rule: Mapping[str, Any] | None = None) -> Result:
    """Score the answers of a complete run again, without the model.

    Args:
        folder: run folder; its items and score are rewritten.
        rule: another rule by its `name` ("official" is the benchmark's own), or options that override the run's.

    Raises:
        BundleError: not a complete run.
        ConfigError: the rule does not fit the answers.
    """
    kept = RunFolder(folder)
    settings = kept.settings()
    before, wanted = settings["rule"], dict(rule or {})
    if wanted.get("name") == "official":
        del wanted["name"]
        before = {"name": "exact"}
        if settings["benchmark"] in names("task"):
            task: type[Task] = lookup("task", settings["benchmark"])
            before = dict(task.rule)
    chosen = changed_rule(before, wanted)
    if (chosen["name"] == "rank") != (settings["asks"] == "rank"):
        raise ConfigError(
            f"{folder}: the answers are from '{settings['asks']}', which this rule cannot score; give another --scoring"
        )
    built: Rule = build("rule", chosen)
    settings = {**settings, "rule": chosen, "parser": built.describe(), "scored_with": scoring_packages()}
    result = score(kept.items(), built, settings)
    kept.open(settings)
    kept.finish(result)
    return result


def join(folders: Sequence[str | Path], out: str | Path, overwrite: bool = False) -> Result:
    """Join runs on different questions of one benchmark, such as five folds with a model each.

    Raises:
        ConfigError: the runs differ in more than model and selection of questions, or share a question.
    """
    runs = [RunFolder(folder) for folder in folders]
    settings = [one.settings() for one in runs]
    first = settings[0]
    for key in ("benchmark", "asks", "system", "after_clip", "decoding", "rule", "labels", "no_audio", "versions"):
        other = [str(run.path) for run, its in zip(runs, settings, strict=True) if its[key] != first[key]]
        if other:
            raise ConfigError(f"{other[0]} and {runs[0].path} cannot be joined: '{key}' differs")
    items = [item for run in runs for item in run.items()]
    if len({item.id for item in items}) != len(items):
        raise ConfigError(f"{runs[0].path} and the others share questions; join runs on different questions")
    rule: Rule = build("rule", first["rule"])
    per_run = ("options", "limit", "data_digest", "root", "model", "model_digest", "prompt")
    lists = {key: [its.get(key) for its in settings] for key in per_run}
    result = score(items, rule, {**first, **lists, "joined": [str(folder) for folder in folders]})
    kept = RunFolder(out)
    kept.open(result.settings, overwrite)
    kept.finish(result)
    return result
