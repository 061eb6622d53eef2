"""Exact match after normalisation."""

from __future__ import annotations

from collections.abc import Sequence

from pal.evaluate.items import Item
from pal.evaluate.rules.base import NoOptions, Rule, Verdict, right_or_wrong
from pal.evaluate.text import NORMALISATION, exact_match, normalise
from pal.registry import register


@register("rule", "exact")
class Exact(Rule):
    """Exact match with one of the references after `text.normalise`."""

    Config = NoOptions
    description = f"the answer equals a reference after: {NORMALISATION}"

    def __init__(self, config: NoOptions) -> None:
        del config

    def judge(self, items: Sequence[Item], texts: Sequence[str | None]) -> Verdict:
        """Accuracy."""
        correct = [
            text is not None and any(exact_match(text, reference) for reference in item.references)
            for item, text in zip(items, texts, strict=True)
        ]
        return right_or_wrong("exact_match", [None if text is None else normalise(text) for text in texts], correct)
