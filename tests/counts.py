"""What `make test` leaves to `make torture`: repetitions of what may go wrong by chance, and cases of large products."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Hashable, Sequence
from itertools import combinations
from typing import TypeVar

import pytest

T = TypeVar("T")

FULL = os.environ.get("PAL_TORTURE") == "1"
"""True behind `make torture`."""


def repeats(full: int, reduced: int) -> int:
    """Number of repetitions: `full` behind `make torture`, else `reduced`."""
    return full if FULL else reduced


full_only = pytest.mark.skipif(not FULL, reason="takes long; `make torture` runs it")
"""Mark of a test that only `make torture` runs, beside the mark `torture`."""


def covering(cases: Sequence[tuple[T, frozenset[Hashable]]]) -> list[T]:
    """Few of the cases, in their order, that together have all values: again and again the one with most new ones."""
    left: set[Hashable] = set().union(*(values for _, values in cases))
    chosen: set[int] = set()
    while left:
        best = max(range(len(cases)), key=lambda i: (len(cases[i][1] & left), -i))
        chosen.add(best)
        left -= cases[best][1]
    return [case for i, (case, _) in enumerate(cases) if i in chosen]


def reduced(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Tests without the cases that marks leave out.

    `@pytest.mark.covering(n)` keeps of a test's parameters as few cases as have every combination of n values: each
    value with n = 1, each pair of values of two parameters with n = 2.
    """
    cases: dict[object, list[tuple[pytest.Item, frozenset[Hashable]]]] = defaultdict(list)
    for item in items:
        mark, spec = item.get_closest_marker("covering"), getattr(item, "callspec", None)
        if mark is not None and spec is not None:
            given = sorted((name, repr(value)) for name, value in spec.params.items())
            values = frozenset(combinations(given, mark.args[0]))
            cases[item.nodeid.partition("[")[0]].append((item, values))
    kept = {id(item) for of_test in cases.values() for item in covering(of_test)}
    marked = {id(item) for of_test in cases.values() for item, _ in of_test}
    return [item for item in items if id(item) in kept or id(item) not in marked]
