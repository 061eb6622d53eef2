"""A sample of `product.py` in which every two choices meet: each pair of encoder, connector, integration, family."""

from itertools import combinations
from pathlib import Path

import pytest

from tests.counts import covering, full_only
from tests.product import CHOICES, ENCODERS, FAMILIES, INTEGRATIONS, Choice, check, name


def pairs(choice: Choice) -> set[frozenset[str]]:
    """What meets in a choice."""
    met = [*choice.encoders, *choice[1:]]
    return {frozenset(two) for two in combinations(met, 2)}


SAMPLE = covering([(choice, frozenset(pairs(choice))) for choice in CHOICES])
FEW = covering([(choice, frozenset([*choice.encoders, *choice[1:]])) for choice in SAMPLE])
"""Of those, as few as have everything once, for `make test`."""


def test_the_sample_meets_everything() -> None:
    met = set().union(*map(pairs, SAMPLE))
    for groups in combinations((ENCODERS, ("mlp", "qformer", "lfst"), INTEGRATIONS, FAMILIES), 2):
        assert all(frozenset((a, b)) in met for a in groups[0] for b in groups[1])
    assert len(SAMPLE) < len(CHOICES) / 10


@pytest.mark.torture
@pytest.mark.parametrize(
    "choice",
    [pytest.param(choice, marks=[] if choice in FEW else [full_only], id=name(choice)) for choice in SAMPLE],
)
def test_choices(choice: Choice, tmp_path: Path) -> None:
    check(choice, tmp_path)
