"""What an evaluation says: one record an item, and the numbers made from them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pal.evaluate.figures import Groups, Ratio, draw
from pal.files import write_text


@dataclass
class ItemResult:
    """One question and what became of it. `prediction` is the raw answer, never a normalised one."""

    id: str
    question: str
    reference: str
    prediction: str = ""
    correct: bool = False
    task: str = ""
    group: str = ""
    """The clips the question is about; the bootstrap draws them whole."""
    no_audio_prediction: str | None = None
    """The same model's answer without the audio; None where that was not asked for."""
    no_audio_correct: bool | None = None
    error: str | None = None
    """Why there is no answer; such an item counts as wrong."""
    no_audio_error: str | None = None
    """The same for the question without its audio."""


@dataclass
class Accuracy:
    """Accuracy over some items, with the baseline without audio beside it."""

    n: int
    score: float
    ci95: tuple[float, float]
    no_audio_score: float | None
    no_audio_ci95: tuple[float, float] | None
    gain: float | None
    """score - no_audio_score"""
    gain_ci95: tuple[float, float] | None
    """Paired: both answers of an item are drawn together."""

    @classmethod
    def of(cls, items: Sequence[ItemResult], seed: int = 0) -> Accuracy:
        """Accuracy of at least one item; the intervals are those of `figures`, over the items' clips."""
        deaf = [item.no_audio_correct for item in items]
        asked = [Ratio.right([item.correct for item in items])]
        if None not in deaf:
            asked.append(Ratio.right([bool(right) for right in deaf]))
        heard, *guessed = draw(asked, Groups([item.group for item in items]), seed)
        if not guessed:
            return cls(len(items), heard.value, heard.interval(), None, None, None, None)
        gain = heard - guessed[0]
        return cls(
            n=len(items),
            score=heard.value,
            ci95=heard.interval(),
            no_audio_score=guessed[0].value,
            no_audio_ci95=guessed[0].interval(),
            gain=gain.value,
            gain_ci95=gain.interval(),
        )


@dataclass
class Score:
    """The result of `evaluate`; `to_dict` is the JSON that `pal eval` writes."""

    benchmark: str
    metric: str
    overall: Accuracy
    per_task: dict[str, Accuracy]
    settings: dict[str, Any]
    items: list[ItemResult] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def score(self) -> float:
        """Accuracy over all items."""
        return self.overall.score

    @property
    def errors(self) -> list[ItemResult]:
        """The items that raised."""
        return [item for item in self.items if item.error is not None or item.no_audio_error is not None]

    def to_dict(self) -> dict[str, Any]:
        """What `pal eval` writes."""
        overall = asdict(self.overall)
        return jsonable(
            {
                "benchmark": self.benchmark,
                "n": overall["n"],
                "metric": self.metric,
                "score": overall["score"],
                "ci95": overall["ci95"],
                "no_audio_score": overall["no_audio_score"],
                "per_task": {task: asdict(accuracy) for task, accuracy in self.per_task.items()},
                "settings": self.settings,
                "items": [asdict(item) for item in self.items],
                "no_audio_ci95": overall["no_audio_ci95"],
                "gain": overall["gain"],
                "gain_ci95": overall["gain_ci95"],
                "errors": [{"id": item.id, "error": item.error or item.no_audio_error} for item in self.errors],
                "seconds": self.seconds,
            }
        )

    def save(self, path: str | Path) -> None:
        """Write the JSON in one step, so that a reader never sees half of it."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Score:
        """Read what `save` wrote. The accuracies are those of the file."""
        data = json.loads(Path(path).read_text(encoding="utf-8"))

        def accuracy(values: dict[str, Any]) -> Accuracy:
            pairs: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
            return Accuracy(**pairs)

        names = [one.name for one in fields(Accuracy)]
        return cls(
            benchmark=data["benchmark"],
            metric=data["metric"],
            overall=accuracy({name: data[name] for name in names}),
            per_task={task: accuracy(one) for task, one in data["per_task"].items()},
            settings=data["settings"],
            items=[ItemResult(**item) for item in data["items"]],
            seconds=data["seconds"],
        )


def jsonable(value: Any) -> Any:
    """`value` with tuples as lists and NaN or infinity as null, which JSON has no words for."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all."""
    write_text(Path(path), json.dumps(jsonable(value), indent=1, ensure_ascii=False) + "\n")
