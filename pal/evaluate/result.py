"""The result of an evaluation: metrics with intervals, every item with its raw answer, and the settings."""

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
    """One item and what became of it: a line of `items.jsonl`."""

    id: str
    clips: list[str]
    category: dict[str, list[str]]
    seconds: float | None
    """Length of the clips; None where no header states it."""
    prompt: str
    references: list[str]
    choices: list[str] | None
    """None, too, where all items have the same; the settings hold them then, as `labels`."""
    output: str | None = None
    """The raw answer, never a normalised one; None where the item raised, which counts as wrong."""
    parsed: Any = None
    correct: bool | None = None
    """None where the rule knows no right and wrong, as for captions."""
    value: float | None = None
    error: str | None = None
    no_audio_output: str | None = None
    """The same model's answer without the audio; None where that was not asked for, or raised."""
    no_audio_parsed: Any = None
    no_audio_correct: bool | None = None
    no_audio_value: float | None = None
    no_audio_error: str | None = None
    before: list[dict[str, str]] = field(default_factory=list)
    """Earlier turns with their reference answers; left out of the line where there are none."""

    @property
    def group(self) -> str:
        """The clips that the item is about; the bootstrap draws all items of one group together."""
        return "\n".join(self.clips)

    def item(self, labels: Sequence[str] | None) -> Item:
        """The question again; `labels` are the choices of items that have none of their own."""
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
        """As JSON has it."""
        content = asdict(self)
        if not self.before:
            del content["before"]
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ItemResult:
        """What `to_dict` made. Raises KeyError and TypeError for other content."""
        names = {one.name for one in fields(cls)} - {"before"}
        return cls(**{name: content[name] for name in names}, before=content.get("before", []))


@dataclass
class MetricValue:
    """A metric over some items with its interval, and beside it the same model's without audio."""

    n: int
    """Items that it is over."""
    score: float
    ci95: tuple[float, float] | None = None
    """None for a part of the items whose redrawing would take long."""
    no_audio_score: float | None = None
    no_audio_ci95: tuple[float, float] | None = None
    gain: float | None = None
    """score - no_audio_score"""
    gain_ci95: tuple[float, float] | None = None
    """Paired: both answers of an item are drawn together."""

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> MetricValue:
        """Out of JSON, whose other keys are left alone. Raises KeyError where one is missing."""
        values: dict[str, Any] = {one.name: content[one.name] for one in fields(cls)}
        for name in ("ci95", "no_audio_ci95", "gain_ci95"):
            values[name] = None if values[name] is None else tuple(values[name])
        return cls(**values)


@dataclass
class Result:
    """What an evaluation found, in memory as in a run's folder."""

    benchmark: str
    metric: str
    """Name of the benchmark's own metric, the first of `metrics`."""
    overall: MetricValue
    """That metric over all items."""
    metrics: dict[str, MetricValue]
    """All metrics that the rule gives, the benchmark's own first."""
    single: dict[str, dict[str, float | None]]
    """Metrics without interval: {"score", "no_audio_score"}."""
    categories: dict[str, dict[str, MetricValue]]
    """Axis -> value -> the benchmark's own metric over the items of that value."""
    durations: dict[str, MetricValue]
    """The same by the length of the clips."""
    errors: list[dict[str, str]]
    """Items that raised, with or without their audio: {"id", "error"}."""
    facts: dict[str, Any]
    rule: dict[str, Any]
    """What the rule says of itself."""
    intervals: str
    settings: dict[str, Any] = field(default_factory=dict)
    """What decides the answers, such as the digests of model and data, and what a reader of the score wants to know."""
    items: list[ItemResult] = field(default_factory=list)

    @property
    def n(self) -> int:
        """Number of items."""
        return self.overall.n

    @property
    def score(self) -> float:
        """The benchmark's own metric over all items."""
        return self.overall.score

    def summary(self) -> dict[str, Any]:
        """All but settings and items, as `score.json` has it."""
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
        """All of it, as `pal eval --json` writes it."""
        settings, items = jsonable(self.settings), [jsonable(one.to_dict()) for one in self.items]
        return {**self.summary(), "settings": settings, "items": items}

    @classmethod
    def from_dict(cls, summary: Mapping[str, Any], settings: Mapping[str, Any], items: Sequence[ItemResult]) -> Result:
        """Out of what `summary` made, now or in an earlier version. Raises KeyError and the like for other content."""
        # runs of earlier versions say "figures", whose n is the whole's
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
        """Write `to_dict` as JSON in one step, so that a reader never sees half of it."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Read what `save` wrote, or the `score.json` of a run, which has no settings and no items.

        Raises:
            BundleError: no such file, or something else in it.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            items = [ItemResult.from_dict(one) for one in found.get("items", [])]  # none in a run's score.json
            return cls.from_dict(found, found.get("settings", {}), items)
        except OSError as error:
            raise BundleError(f"{path}: {error.strerror or error}; give a file that pal eval --json wrote") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BundleError(
                f"{path}: damaged, or no score of this version; give a file that pal eval --json wrote"
            ) from None


def _parts(content: Mapping[str, Any]) -> dict[str, MetricValue]:
    return {name: MetricValue.from_dict(part) for name, part in content.items()}
