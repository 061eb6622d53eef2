"""Letter rules of AIR-Bench Foundation, MMSU and MuChoMusic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pal.config import StrictConfig
from pal.evaluate.items import Item
from pal.evaluate.metrics import Ratio
from pal.evaluate.rules.base import Rule, Verdict, share
from pal.evaluate.rules.options import REPAIR, chosen_option
from pal.registry import register

LETTERS = "ABCD"


def first_or_second_last(answer: str) -> str | None:
    """AIR-Bench's letter: the first character if it is A to D, else the second-last ("The answer is A.")."""
    text = answer.strip().replace("\n", "")
    if text in ("", "None"):
        return None
    if text[0] in LETTERS:
        return text[0]
    return text[-2] if len(text) > 1 and text[-2] in LETTERS else None


def only_letter(answer: str, choices: Sequence[str]) -> str | None:
    """MuChoMusic's letter: the one capital A to D in the answer, else the first option whose text is in it."""
    text = answer.split("The correct answer is:")[-1].strip()
    found = set(LETTERS) & set(text)
    if len(found) == 1:
        return found.pop()
    lowered = text.lower()
    inside = (index for index, choice in enumerate(choices) if choice.lower().strip() in lowered)
    index = next(inside, None)
    return None if index is None else LETTERS[index]


_CHARACTERS = "official: first character A to D, else the second-last; unread answers do not count in the denominator"
_SAYS = {
    "air_bench": _CHARACTERS,
    "mmsu": f"{_CHARACTERS}, but empty ones do",
    "muchomusic": "official: the only capital letter A to D in the answer, else the first option whose text is in it",
}
_FIRST = (
    "an answer that starts with a word in A to D, such as 'A dog' or 'Both', is read as that letter",
    "'(B) text' is not read, since neither its first nor its second-last character is the letter",
)
_QUIRKS = {
    "air_bench": _FIRST,
    "mmsu": (*_FIRST, "the official script reads an empty answer as the one before it; here it is wrong"),
    "muchomusic": (
        "any capital A to D counts, so 'Bossa nova' is read as B",
        "the official script shuffles the options in each run; here their order depends on the item only",
    ),
}


@register("rule", "letters")
class Letters(Rule):
    """Multiple-choice accuracy by option letter."""

    class Config(StrictConfig):
        """Options of the rule: the benchmark whose script is followed."""

        of: Literal["air_bench", "mmsu", "muchomusic"]
        """`air_bench` and `mmsu` read the first or second-last character, `muchomusic` any capital letter."""

    def __init__(self, config: Config) -> None:
        self.of = config.of
        self.description = f"{_SAYS[config.of]}; {REPAIR}"
        self.quirks = _QUIRKS[config.of]

    def judge(self, items: Sequence[Item], texts: Sequence[str | None]) -> Verdict:
        """Official accuracy, the same over all items, and the accuracy by `chosen_option`."""
        pairs = list(zip(items, texts, strict=True))
        letters = [None if text is None else self._letter(text, item) for item, text in pairs]
        correct = [self._right(letter, item) for letter, item in zip(letters, items, strict=True)]
        counted = [self._counts(letter, text) for letter, text in zip(letters, texts, strict=True)]
        chosen = [None if text is None else chosen_option(text, item.choices or ()) for item, text in pairs]
        repaired = [
            index is not None and (item.choices or ())[index] in item.references
            for index, item in zip(chosen, items, strict=True)
        ]
        values = [float(right) for right in correct]
        metrics = {"accuracy": share(values, counted), "repaired_accuracy": Ratio.right(repaired)}
        if self.of != "muchomusic":
            metrics["accuracy_over_all"] = Ratio.right(correct)
        unread = sum(letter is None and text is not None for letter, text in zip(letters, texts, strict=True))
        return Verdict(list(letters), list(correct), values, dict(metrics), facts={"unread": unread})

    def _letter(self, text: str, item: Item) -> str | None:
        return only_letter(text, item.choices or ()) if self.of == "muchomusic" else first_or_second_last(text)

    @staticmethod
    def _right(letter: str | None, item: Item) -> bool:
        choices = item.choices or ()
        index = LETTERS.index(letter) if letter is not None else len(choices)
        return index < len(choices) and choices[index] in item.references

    def _counts(self, letter: str | None, text: str | None) -> float:
        """1 if the item counts in the official denominator, as an item that raised always does, else 0."""
        empty = text is not None and text.strip().replace("\n", "") in ("", "None")
        kept = self.of == "muchomusic" or text is None or letter is not None or (self.of == "mmsu" and empty)
        return float(kept)
