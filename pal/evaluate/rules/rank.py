"""Multiple choice by log-likelihood of the choices."""

from __future__ import annotations

from collections.abc import Sequence

from pal.evaluate.items import Item
from pal.evaluate.rules.base import NoOptions, Rule, Verdict, right_or_wrong
from pal.registry import register


@register("rule", "rank")
class Rank(Rule):
    """Correct if the choice of highest log-likelihood is among the references. The model does not generate."""

    Config = NoOptions
    description = "argmax over the choices of the answer's summed log-likelihood, end of turn included"

    def __init__(self, config: NoOptions) -> None:
        del config

    def judge(self, items: Sequence[Item], texts: Sequence[str | None]) -> Verdict:
        """Accuracy; each answer is one of the item's choices."""
        correct = [text in item.references for item, text in zip(items, texts, strict=True)]
        return right_or_wrong("rank_accuracy", list(texts), correct)
