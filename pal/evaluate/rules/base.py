"""Interface of scoring rules, and shared helpers."""

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
    """Output of a scoring rule for the answers to some items."""

    parsed: list[Any]
    """Parsed answer of each item, JSON-compatible; None if it could not be parsed."""
    correct: list[bool | None]
    """True for a correct item; None if the rule has no right and wrong, as for captions."""
    value: list[float]
    """Score of each item, for paired comparisons of two models: 1 or 0, or the item's own score."""
    metrics: dict[str, Metric]
    """Name -> metric; the first is the benchmark's own."""
    single: dict[str, float] = field(default_factory=dict)
    """Metrics of the whole set without interval, such as corpus BLEU."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Further counts, such as unparsed answers, and metrics that were not computed with the reason."""


class Rule(ABC):
    """Scoring rule. A concrete rule has a nested `Config` and is registered as a "rule"."""

    description: str
    """Description of the rule, for score files."""
    quirks: tuple[str, ...] = ()
    """Unexpected behaviour of the official script that the rule reproduces or deviates from."""
    lower_is_better: bool = False

    @abstractmethod
    def judge(self, items: Sequence[Item], texts: Sequence[str | None]) -> Verdict:
        """Score raw answers; None stands for an item that raised, which counts as wrong."""

    def describe(self) -> dict[str, Any]:
        """Description of the rule in a score file."""
        return {"says": self.description, "quirks": list(self.quirks), "lower_is_better": self.lower_is_better}


class NoOptions(StrictConfig):
    """Options of a rule without options."""


def right_or_wrong(name: str, parsed: list[Any], correct: Sequence[bool], **facts: Any) -> Verdict:
    """Verdict of a rule that judges each item as right or wrong."""
    values = [float(right) for right in correct]
    return Verdict(parsed, list(correct), values, {name: Ratio.right(correct)}, facts=facts)


def share(over: Sequence[float], under: Sequence[float]) -> Ratio:
    """Ratio metric that is a share, from lists of numerators and denominators."""
    return Ratio(np.asarray(over, dtype=float), np.asarray(under, dtype=float), share=True)
