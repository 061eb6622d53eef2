"""Text normalisation, and exact match after it."""

from __future__ import annotations

import unicodedata

NORMALISATION = (
    "Unicode NFKC, lower case, punctuation (except #) replaced by spaces, white space collapsed, "
    "one leading a/an/the dropped unless it is the whole answer"
)
"""Description of `normalise`, for score files."""

_ARTICLES = frozenset({"a", "an", "the"})


def normalise(text: str) -> str:
    """Normalised text; see `NORMALISATION`.

    '#' is kept, since the notes C and C# differ, and so is a lone "a", which can be a note.
    """
    folded = unicodedata.normalize("NFKC", text).lower()
    kept = "".join(" " if unicodedata.category(c)[0] == "P" and c != "#" else c for c in folded)
    words = kept.split()
    if len(words) > 1 and words[0] in _ARTICLES:
        words = words[1:]
    return " ".join(words)


def exact_match(prediction: str, reference: str) -> bool:
    """True if the texts are equal after `normalise`; a reference of punctuation only is compared unchanged."""
    wanted = normalise(reference)
    return normalise(prediction) == wanted if wanted else prediction.strip() == reference.strip()
