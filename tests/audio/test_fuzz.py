"""Mutated files give a result or an AudioError of one line, in bounded time; no decoder ends the process.

`PAL_FUZZ=20000` makes so many mutants; `python -m tests.audio.fuzz` does the same.
"""

import os
import random

from tests.audio.fuzz import FILES, mutate, run, seeds

COUNT = int(os.environ.get("PAL_FUZZ", "400"))


def test_mutants_give_a_result_or_one_line() -> None:
    assert run(COUNT) == []


def test_mutants_are_the_same_each_time_and_not_the_file() -> None:
    name, data = seeds(FILES)[0]
    mutants = [mutate(data, random.Random(number)) for number in range(50)]
    assert mutants == [mutate(data, random.Random(number)) for number in range(50)]
    assert sum(mutant != data for mutant in mutants) > 40, name


def test_what_breaks_a_promise_is_found(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("PAL_FUZZ_BREAK", "1")
    assert run(3) != []
