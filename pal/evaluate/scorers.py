"""The rules that turn answers into numbers: exact match, ranking, bootstrap intervals."""

from __future__ import annotations

import unicodedata
from collections.abc import Hashable, Sequence

import numpy as np

from pal.evaluate.figures import Groups, Ratio, interval, redraw

NORMALISATION = (
    "Unicode NFKC, lower case, punctuation (but not #) to spaces, white space joined, "
    "one leading a/an/the dropped unless it is the whole answer"
)
"""What `normalise` does, for score files."""

_ARTICLES = frozenset({"a", "an", "the"})


def normalise(text: str) -> str:
    """The form in which answers are compared; see `NORMALISATION`.

    '#' stays, or the notes C and C# would be one answer, and so does a lone "a", which is a note too.
    """
    folded = unicodedata.normalize("NFKC", text).lower()
    kept = "".join(" " if unicodedata.category(c)[0] == "P" and c != "#" else c for c in folded)
    words = kept.split()
    if len(words) > 1 and words[0] in _ARTICLES:
        words = words[1:]
    return " ".join(words)


def exact_match(prediction: str, reference: str) -> bool:
    """Equal after `normalise`; a reference that is punctuation alone is compared as it stands."""
    wanted = normalise(reference)
    return normalise(prediction) == wanted if wanted else prediction.strip() == reference.strip()


def best_choice(scores: Sequence[float], choices: Sequence[str]) -> str:
    """The choice with the highest log-likelihood; the first of equals. NaN never wins."""
    assert len(scores) == len(choices) and len(choices) > 0
    values = np.asarray(scores, dtype=float)
    return choices[int(np.argmax(np.where(np.isnan(values), -np.inf, values)))]


def bootstrap_ci(
    values: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron & Tibshirani 1993, section 13.3).

    Args:
        values: one number an item, such as 1 for a right answer, or a difference of two models.
        groups: what each item belongs to. Questions about one clip are not independent, so whole
            groups are drawn; without groups, or with one item in each, this is the plain bootstrap.
        resamples: how many data sets are drawn.
        level: probability inside the interval.
        seed: of the drawing; the same seed gives the same interval.

    Returns:
        Lower and upper end, the mean between them; NaN for no items.
    """
    if len(values) == 0:
        return float("nan"), float("nan")
    mean = Ratio.mean(values)
    drawn_R = redraw([mean], Groups(groups if groups is not None else range(len(values))), seed, resamples)[:, 0]
    low, high = interval(drawn_R, mean.value(), level)
    # who shows the mean may have added up in another order
    other = sum(values) / len(values)
    return min(low, other), max(high, other)
