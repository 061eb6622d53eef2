"""Text normalisation, and exact match after it."""

from __future__ import annotations

import unicodedata

NORMALISATION = (
    "Unicode NFKC, lower case, punctuation (but not #) to spaces, white space joined, "
    "one leading a/an/the dropped unless it is the whole answer"
)
"""Description of `normalise`, for score files."""

_ARTICLES = frozenset({"a", "an", "the"})


def normalise(text: str) -> str:
    """Normalised text; see `NORMALISATION`.

    '#' stays, since the notes C and C# differ, and so does a lone "a", which is a note, too.
    """
    folded = unicodedata.normalize("NFKC", text).lower()
    kept = "".join(" " if unicodedata.category(c)[0] == "P" and c != "#" else c for c in folded)
    words = kept.split()
    if len(words) > 1 and words[0] in _ARTICLES:
        words = words[1:]
    return " ".join(words)


def exact_match(prediction: str, reference: str) -> bool:
    """Equality after `normalise`; a reference of only punctuation is compared unchanged."""
    wanted = normalise(reference)
    return normalise(prediction) == wanted if wanted else prediction.strip() == reference.strip()
