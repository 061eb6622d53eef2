"""Mutated files give a result or an AudioError of one line, in bounded time; no decoder ends the process.

`PAL_FUZZ=20000` makes so many mutants; `python -m tests.audio.fuzz` does the same. `make torture` makes as many, and
fuzzes for 20 minutes more where atheris is installed.
"""

import os
import random
from pathlib import Path

import pytest

from tests.audio import fuzz_guided
from tests.audio.fuzz import FILES, mutate, run, seeds
from tests.counts import full_only, repeats

COUNT = int(os.environ.get("PAL_FUZZ", repeats(full=20_000, reduced=400)))


@pytest.mark.torture
@full_only
def test_inputs_that_reach_new_lines_give_a_result_or_one_line(tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="pip install atheris")
    counts, findings = fuzz_guided.run(tmp_path, seconds=1_200)
    assert findings == [] and counts["inputs"] > 10_000 and counts["samples"] and counts["refused"], counts


@pytest.mark.torture
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
