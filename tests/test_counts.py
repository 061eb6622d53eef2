"""Which cases of a product stay in `make test`."""

from dataclasses import dataclass
from itertools import combinations, product
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.counts import covering, reduced


@given(st.lists(st.integers(1, 5), min_size=2, max_size=4), st.integers(1, 2))
def test_all_combinations_of_values_are_left(sizes, strength):
    cases = [
        (case, frozenset(combinations(enumerate(case), strength))) for case in product(*(range(size) for size in sizes))
    ]
    kept = covering(cases)
    assert kept == sorted(set(kept))
    values = dict(cases)
    assert set().union(*(values[case] for case in kept)) == set().union(*values.values())
    most = sorted(sizes)[-strength:]
    fewest = most[0] * most[-1] if strength == 2 else most[0]
    assert fewest <= len(kept) <= len(cases)
    if strength == 1:  # each case that is taken has a new value of every parameter, as long as there are
        assert len(kept) == max(sizes)


@dataclass(eq=False)
class Item:
    """What `reduced` asks of a test."""

    nodeid: str
    mark: pytest.Mark | None
    callspec: SimpleNamespace

    def get_closest_marker(self, name):
        return self.mark if self.mark is not None and self.mark.name == name else None


@pytest.mark.parametrize(
    ("mark", "left"), [(pytest.mark.covering(1), 3), (pytest.mark.covering(2), 6), (pytest.mark.torture, 12)]
)
def test_marks_leave_cases_out(mark, left):
    """Of 3 x 2 x 2 cases six have each pair, and three each value; each test by itself, in the old order."""
    cases = list(product(range(3), range(2), range(2)))
    items = [
        Item(
            f"tests/test_x.py::{test}[{'-'.join(map(str, case))}]",
            mark.mark,
            SimpleNamespace(params=dict(zip("abc", case, strict=True))),
        )
        for test in ("test_a", "test_b")
        for case in cases
    ]
    kept = reduced(items)
    assert len(kept) == 2 * left
    assert kept == [item for item in items if item in kept]
