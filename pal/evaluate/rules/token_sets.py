"""Token-set rule of MMAU, also used by MMAR: words of the right option against words of the others."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pal.evaluate.items import Item
from pal.evaluate.metrics import Ratio
from pal.evaluate.rules.base import NoOptions, Rule, Verdict, right_or_wrong
from pal.evaluate.rules.options import REPAIR, chosen_option
from pal.registry import register

_WORD = re.compile(r"\b\w+\b")


def words(text: str) -> set[str]:
    """Set of the words of a text, in lower case."""
    return set(_WORD.findall(text.lower()))


def matches(answer: str, reference: str, choices: Sequence[str]) -> bool:
    """True if the answer has all words of the reference, and no word that only other choices have."""
    found, right = words(answer), words(reference)
    others = {word for choice in choices for word in words(choice)} - right
    return bool(found) and right <= found and not found & others


@register("rule", "token_sets")
class TokenSets(Rule):
    """Accuracy by `matches`, as in MMAU's and MMAR's evaluation scripts."""

    Config = NoOptions
    description = f"official: all words of the right option are in the answer, and none that only others have; {REPAIR}"
    quirks = (
        "an answer such as '(B) text' fails where a wrong option has the word 'b', and '(A) text' where one has 'a'",
        "an answer that names a wrong option to rule it out is wrong",
        "the official script skips items without an answer; here they count as wrong",
    )

    def __init__(self, config: NoOptions) -> None:
        del config

    def judge(self, items: Sequence[Item], texts: Sequence[str | None]) -> Verdict:
        """Official accuracy, and the repaired accuracy by `chosen_option`."""
        pairs = list(zip(items, texts, strict=True))
        correct = [text is not None and matches(text, item.references[0], item.choices or ()) for item, text in pairs]
        chosen = [None if text is None else chosen_option(text, item.choices or ()) for item, text in pairs]
        parsed = [
            None if index is None else (item.choices or ())[index] for index, item in zip(chosen, items, strict=True)
        ]
        verdict = right_or_wrong("accuracy", parsed, correct)
        repaired = [name is not None and name in item.references for name, item in zip(parsed, items, strict=True)]
        verdict.metrics["repaired_accuracy"] = Ratio.right(repaired)
        return verdict
