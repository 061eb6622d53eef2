"""Result of an evaluation: metrics with intervals, every item with its raw answer, and the settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pal.data.manifest import Turn
from pal.errors import BundleError
from pal.evaluate.items import Item
from pal.files import jsonable, write_json


@dataclass
class ItemResult:
    """Scored item: a line of `items.jsonl`."""

    id: str
    clips: list[str]
    category: dict[str, list[str]]
    seconds: float | None
    """Length of the clips in seconds; None if their headers do not state it."""
    prompt: str
    references: list[str]
    choices: list[str] | None
    """Also None if all items have the same choices, which are then in the settings as `labels`."""
    output: str | None = None
    """Raw answer, never normalised; None if the item raised, which counts as wrong."""
    parsed: Any = None
    correct: bool | None = None
    """None if the rule has no right and wrong, as for captions."""
    value: float | None = None
    error: str | None = None
    no_audio_output: str | None = None
    """Answer of the same model without audio; None if not evaluated, or if it raised."""
    no_audio_parsed: Any = None
    no_audio_correct: bool | None = None
    no_audio_value: float | None = None
    no_audio_error: str | None = None
    before: list[dict[str, str]] = field(default_factory=list)
    """Earlier turns with their reference answers; not in the line if there are none."""

    @property
    def group(self) -> str:
        """Cluster of the bootstrap: the item's clips."""
        return "\n".join(self.clips)

    def item(self, labels: Sequence[str] | None) -> Item:
        """The question; `labels` are the choices of items without their own."""
        choices = self.choices if self.choices is not None else labels
        category = {axis: tuple(values) for axis, values in self.category.items()}
        return Item(
            self.id,
            tuple(self.clips),
            self.prompt,
            tuple(self.references),
            None if choices is None else tuple(choices),
            category,
            tuple(Turn(**turn) for turn in self.before),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible values."""
        content = asdict(self)
        if not self.before:
            del content["before"]
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ItemResult:
        """Inverse of `to_dict`. Raises KeyError and TypeError for other content."""
        names = {one.name for one in fields(cls)} - {"before"}
        return cls(**{name: content[name] for name in names}, before=content.get("before", []))


@dataclass
class MetricValue:
    """Metric over some items with its interval, with and without audio."""

    n: int
    """Number of items."""
    score: float
    ci95: tuple[float, float] | None = None
    """None for a subset of the items if resampling would take long."""
    no_audio_score: float | None = None
    no_audio_ci95: tuple[float, float] | None = None
    gain: float | None = None
    """score - no_audio_score"""
    gain_ci95: tuple[float, float] | None = None
    """Paired bootstrap interval: both answers of an item are drawn together."""

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> MetricValue:
        """From JSON values, ignoring other keys. Raises KeyError if a key is missing."""
        values: dict[str, Any] = {one.name: content[one.name] for one in fields(cls)}
        for name in ("ci95", "no_audio_ci95", "gain_ci95"):
            values[name] = None if values[name] is None else tuple(values[name])
        return cls(**values)


@dataclass
class Result:
    """Result of an evaluation, in memory or in a run folder."""

    benchmark: str
    metric: str
    """Name of the benchmark's own metric, the first of `metrics`."""
    overall: MetricValue
    """Value of `metric` over all items."""
    metrics: dict[str, MetricValue]
    """All metrics of the rule, the benchmark's own first."""
    single: dict[str, dict[str, float | None]]
    """Metrics without interval: {"score", "no_audio_score"}."""
    categories: dict[str, dict[str, MetricValue]]
    """Axis -> value -> the benchmark's own metric over the items of that value."""
    durations: dict[str, MetricValue]
    """Range of clip lengths -> the benchmark's own metric over items with such clips."""
    errors: list[dict[str, str]]
    """Items that raised, with or without audio: {"id", "error"}."""
    facts: dict[str, Any]
    rule: dict[str, Any]
    """Description of the scoring rule."""
    intervals: str
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings that determine the answers, such as digests of model and data, and facts for readers of a score."""
    items: list[ItemResult] = field(default_factory=list)

    @property
    def n(self) -> int:
        """Number of items."""
        return self.overall.n

    @property
    def score(self) -> float:
        """Value of the benchmark's own metric over all items."""
        return self.overall.score

    def summary(self) -> dict[str, Any]:
        """Content of `score.json`: all but settings and items."""
        content: dict[str, Any] = jsonable(
            {
                "benchmark": self.benchmark,
                "metric": self.metric,
                **asdict(self.overall),
                "metrics": {name: asdict(metric) for name, metric in self.metrics.items()},
                "single": self.single,
                "categories": {
                    axis: {name: asdict(part) for name, part in parts.items()}
                    for axis, parts in self.categories.items()
                },
                "durations": {name: asdict(part) for name, part in self.durations.items()},
                "errors": {"count": len(self.errors), "items": self.errors},
                "facts": self.facts,
                "rule": self.rule,
                "intervals": self.intervals,
            }
        )
        return content

    def to_dict(self) -> dict[str, Any]:
        """Content of `pal eval --json`: summary, settings and items."""
        settings, items = jsonable(self.settings), [jsonable(one.to_dict()) for one in self.items]
        return {**self.summary(), "settings": settings, "items": items}

    @classmethod
    def from_dict(cls, summary: Mapping[str, Any], settings: Mapping[str, Any], items: Sequence[ItemResult]) -> Result:
        """From a `summary` of this or an earlier version. Raises KeyError and the like for other content."""
        # runs of earlier versions have "figures" instead of "metrics", without n
        metrics = summary["metrics"] if "metrics" in summary else summary["figures"]
        return cls(
            benchmark=summary["benchmark"],
            metric=summary["metric"],
            overall=MetricValue.from_dict(summary),
            metrics={name: MetricValue.from_dict({"n": summary["n"], **one}) for name, one in metrics.items()},
            single=summary["single"],
            categories={axis: _parts(parts) for axis, parts in summary["categories"].items()},
            durations=_parts(summary["durations"]),
            errors=summary["errors"]["items"],
            facts=summary["facts"],
            rule=summary["rule"],
            intervals=summary["intervals"],
            settings=dict(settings),
            items=list(items),
        )

    def save(self, path: str | Path) -> None:
        """Write `to_dict` as JSON, atomically."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Load a file of `save`, or the `score.json` of a run, which has no settings and no items.

        Raises:
            BundleError: no such file, or other content.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            items = [ItemResult.from_dict(one) for one in found.get("items", [])]  # none in a run's score.json
            return cls.from_dict(found, found.get("settings", {}), items)
        except OSError as error:
            raise BundleError(f"{path}: {error.strerror or error}; give a file of pal eval --json") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BundleError(f"{path}: damaged, or of an unknown version; give a file of pal eval --json") from None


def _parts(content: Mapping[str, Any]) -> dict[str, MetricValue]:
    return {name: MetricValue.from_dict(part) for name, part in content.items()}
