"""The contract of a rule, and what several of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pal.config import StrictConfig
from pal.evaluate.items import Item
from pal.evaluate.metrics import Metric, Ratio


@dataclass
class Verdict:
    """What a rule makes of the answers to some items."""

    parsed: list[Any]
    """What was read out of each answer, as JSON can hold it; None where nothing could be."""
    correct: list[bool | None]
    """Whether the item is right; None where the rule knows no such thing, as for captions."""
    value: list[float]
    """What each item is worth, for comparing two models item by item: 1 or 0, or the item's own score."""
    metrics: dict[str, Metric]
    """Name -> metric; the first one is the benchmark's own."""
    single: dict[str, float] = field(default_factory=dict)
    """Metrics of the whole set that have no interval, such as corpus BLEU."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Counts worth knowing, such as how many answers could not be read, and what was not computed and why."""


class Rule(ABC):
    """Scores answers. A concrete rule has a nested `Config` and is registered as a "rule"."""

    says: str
    """The rule in words, for score files."""
    quirks: tuple[str, ...] = ()
    """Where the official script does what one would not expect; kept."""
    lower_is_better: bool = False

    @abstractmethod
    def judge(self, items: Sequence[Item], texts: Sequence[str | None]) -> Verdict:
        """Score raw answers; None is an item that raised, which counts as wrong."""

    def describe(self) -> dict[str, Any]:
        """What a score file says of the rule."""
        return {"says": self.says, "quirks": list(self.quirks), "lower_is_better": self.lower_is_better}


class NoOptions(StrictConfig):
    """Options of a rule that has none."""


def right_or_wrong(name: str, parsed: list[Any], correct: Sequence[bool], **facts: Any) -> Verdict:
    """The verdict of a rule that says right or wrong of each item."""
    values = [float(right) for right in correct]
    return Verdict(parsed, list(correct), values, {name: Ratio.right(correct)}, facts=facts)


def share(over: Sequence[float], under: Sequence[float]) -> Ratio:
    """A share from lists: what is right by what there is."""
    return Ratio(np.asarray(over, dtype=float), np.asarray(under, dtype=float), share=True)
