"""Paired comparison of two or more runs on the same questions, with significance tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pal.errors import ConfigError
from pal.evaluate.bootstrap import Groups, draw
from pal.evaluate.folder import load_result
from pal.evaluate.rules.base import Rule
from pal.registry import build


@dataclass
class ComparedRun:
    """One run compared with the first run."""

    folder: str
    model: str
    score: float
    ci95: tuple[float, float]
    difference: float | None = None
    """score minus the score of the first run; None for the first run."""
    difference_ci95: tuple[float, float] | None = None
    """Paired bootstrap interval: the answers of both runs about a clip are drawn together."""
    p_bootstrap: float | None = None
    """Two-sided bootstrap p-value; never below 1 / number of draws."""
    only_first: int | None = None
    """Number of items correct only in the first run; None if the rule has no right and wrong."""
    only_this: int | None = None
    """Number of items correct only in this run."""
    p_mcnemar: float | None = None
    """p-value of McNemar's exact test on these two counts. The test assumes independent items; with several questions
    per clip use `p_bootstrap` instead."""


@dataclass
class Comparison:
    """Paired comparison of runs, the result of `pal compare`."""

    benchmark: str
    metric: str
    n: int
    rows: list[ComparedRun]

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible values."""
        return asdict(self)


def compare(folders: Sequence[str | Path], seed: int = 0) -> Comparison:
    """Compare complete runs of one benchmark with the first of them.

    Args:
        folders: run folders, or files of `pal eval --json`.
        seed: seed of the bootstrap.

    Raises:
        BundleError: a folder holds no complete run.
        ConfigError: fewer than two folders, or different questions or rules.
    """
    if len(folders) < 2:
        raise ConfigError("give at least two folders to compare")
    runs = [load_result(folder) for folder in folders]
    settings = [run.settings for run in runs]
    for key, what in (("benchmark", "benchmark"), ("rule", "rule"), ("data_digest", "data")):
        for folder, its in zip(folders, settings, strict=True):
            if its.get(key) != settings[0].get(key):
                raise ConfigError(f"{folder} and {folders[0]} cannot be compared: the {what} differs")
    if not all(run.items for run in runs):
        raise ConfigError("a score.json alone has no answers to compare; give the folders of the runs")
    if any([item.id for item in run.items] != [item.id for item in runs[0].items] for run in runs):
        raise ConfigError(f"{folders[0]} and the others have different questions; evaluate with the same --limit")
    labels = settings[0]["labels"]
    items = [one.item(labels) for one in runs[0].items]
    rule: Rule = build("rule", settings[0]["rule"])
    verdicts = [rule.judge(items, [one.output for one in run.items]) for run in runs]
    metric = next(iter(verdicts[0].metrics))
    drawn = draw(
        [verdict.metrics[metric] for verdict in verdicts], Groups(["\n".join(item.clips) for item in items]), seed
    )
    rows = []
    for place, (folder, its, value, verdict) in enumerate(zip(folders, settings, drawn, verdicts, strict=True)):
        row = ComparedRun(str(folder), str(its["model"]), value.value, value.interval())
        if place:
            apart = value - drawn[0]
            row.difference, row.difference_ci95, row.p_bootstrap = apart.value, apart.interval(), apart.chance()
            if None not in verdict.correct:
                pairs = list(zip(verdicts[0].correct, verdict.correct, strict=True))
                row.only_first = sum(bool(a) and not b for a, b in pairs)
                row.only_this = sum(bool(b) and not a for a, b in pairs)
                row.p_mcnemar = _mcnemar(row.only_first, row.only_this)
        rows.append(row)
    return Comparison(settings[0]["benchmark"], metric, len(items), rows)


def _mcnemar(only_first: int, only_this: int) -> float:
    """Two-sided p-value of McNemar's exact test: a binomial test on the items that only one run got right."""
    if only_first + only_this == 0:
        return 1.0
    try:
        from scipy.stats import binomtest
    except ImportError:
        raise ConfigError("McNemar's test needs scipy: pip install 'pal-audio[scores]'") from None
    return float(binomtest(min(only_first, only_this), only_first + only_this).pvalue)
