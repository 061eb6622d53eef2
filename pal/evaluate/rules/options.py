"""Lenient parsing of the chosen option, for the repaired accuracy beside the official ones."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pal.evaluate.text import normalise

REPAIR = (
    "repaired: an option's text alone; else a letter alone, bracketed, before '.', ')' or ':', or after 'answer is' "
    "and the like; else the only option whose text is in the answer; else none, which is wrong"
)
"""Description of `chosen_option`, for score files."""

_LEADING = re.compile(r"^\W*([A-J])\s*(?:[.):\]]|$)")
_NAMED = re.compile(r"\b(?:answer|option|choice)(?:\s+is)?\s*:?\s*[(\[]?([A-J])\b(?!\s+[a-z])", re.IGNORECASE)
_BRACKETED = re.compile(r"\(([A-J])\)")


def chosen_option(answer: str, choices: Sequence[str]) -> int | None:
    """Index of the option that an answer chooses; see `REPAIR`. None if it chooses none or several."""
    text = normalise(answer)
    plain = [normalise(choice) for choice in choices]
    alone = [index for index, choice in enumerate(plain) if choice == text]
    if len(alone) == 1:
        return alone[0]
    for pattern in (_LEADING, _NAMED, _BRACKETED):
        letters = {found.upper() for found in pattern.findall(answer)}
        if len(letters) == 1:
            index = ord(letters.pop()) - ord("A")
            return index if index < len(choices) else None
    inside = [index for index, choice in enumerate(plain) if choice and f" {choice} " in f" {text} "]
    # "lead guitar" contains "guitar": an option inside a longer matching option does not count
    longest = [i for i in inside if not any(i != j and f" {plain[i]} " in f" {plain[j]} " for j in inside)]
    return longest[0] if len(longest) == 1 else None
