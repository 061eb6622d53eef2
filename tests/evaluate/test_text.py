"""Answers compared as text, against hand-made examples."""

import pytest

from pal.evaluate.text import exact_match, normalise


@pytest.mark.parametrize(
    ("prediction", "reference", "same"),
    [
        ("Dog.", "dog", True),
        ("  A dog ", "the dog", True),
        ("high-pitched", "high pitched", True),
        ("dog, then cat", "dog then cat", True),
        ("ｄｏｇ", "dog", True),
        ("dog cat", "cat dog", False),
        ("a dog barks", "a dog", False),
        ("C#", "C", False),
        ("a", "A", True),
        ("a", "the", False),
        ("2.5", "25", False),
        ("", "dog", False),
        ("?", "!", False),
        ("…", " … ", True),
        ("", "?", False),
    ],
)
def test_exact_match(prediction, reference, same):
    assert exact_match(prediction, reference) is same
    assert exact_match(reference, prediction) is same


def test_normalise_is_idempotent():
    for text in ("The  Dog!", "a", "An alarm; a bell", "C# minor"):
        assert normalise(normalise(text)) == normalise(text)
