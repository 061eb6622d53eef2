"""Reading which option an answer means, by common sense: the repaired score beside the official ones."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pal.evaluate.text import normalise

REPAIR = (
    "repaired: an option's text alone; else a letter alone, bracketed, before '.', ')' or ':', or after 'answer is' "
    "and the like; else the only option whose text is in the answer; else none, which is wrong"
)
"""What `meant` does, for score files."""

_LEADING = re.compile(r"^\W*([A-J])\s*(?:[.):\]]|$)")
_NAMED = re.compile(r"\b(?:answer|option|choice)(?:\s+is)?\s*:?\s*[(\[]?([A-J])\b(?!\s+[a-z])", re.IGNORECASE)
_BRACKETED = re.compile(r"\(([A-J])\)")


def meant(answer: str, choices: Sequence[str]) -> int | None:
    """Index of the option that an answer means; see `REPAIR`. None where it means none or several."""
    said = normalise(answer)
    plain = [normalise(choice) for choice in choices]
    alone = [index for index, choice in enumerate(plain) if choice == said]
    if len(alone) == 1:
        return alone[0]
    for pattern in (_LEADING, _NAMED, _BRACKETED):
        letters = {found.upper() for found in pattern.findall(answer)}
        if len(letters) == 1:
            index = ord(letters.pop()) - ord("A")
            return index if index < len(choices) else None
    inside = [index for index, choice in enumerate(plain) if choice and f" {choice} " in f" {said} "]
    # "lead guitar" holds "guitar": the longer one is meant where the other is a part of it
    longest = [i for i in inside if not any(i != j and f" {plain[i]} " in f" {plain[j]} " for j in inside)]
    return longest[0] if len(longest) == 1 else None
