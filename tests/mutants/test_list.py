"""The lists stay true: `make mutants` runs them, which takes too long here."""

from __future__ import annotations

import subprocess

import pytest

from tests.counts import repeats
from tests.mutants.mutants import ROOT, Mutant, load
from tests.mutants.running import run


@pytest.mark.parametrize("mutant", load(), ids=lambda mutant: mutant.change)
def test_the_change_can_be_made_and_its_test_exists(mutant: Mutant):
    assert (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1
    assert mutant.old != mutant.new
    file, *names = mutant.noticed_by.split("::")
    text = (ROOT / file).read_text(encoding="utf-8")
    assert all(f"def {name.split('[')[0]}(" in text for name in names)


def test_a_change_is_made_once_and_undone(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\ny = 2\n")
    mutant = Mutant("", "a.py", "x = 1", "x = 2", "")
    assert mutant.apply(tmp_path) == "x = 1\ny = 2\n"
    assert (tmp_path / "a.py").read_text() == "x = 2\ny = 2\n"
    with pytest.raises(ValueError, match="0 times, not once"):
        mutant.apply(tmp_path)


@pytest.mark.torture
def test_what_tests_make_of_mistakes(tmp_path):
    (tmp_path / "sums.py").write_text("def double(x):\n    return 2 * x\n\n\nUNUSED = 1\n")
    (tmp_path / "test_sums.py").write_text("from sums import double\n\n\ndef test():\n    assert double(2) == 4\n")
    (tmp_path / "test_wrong.py").write_text("def test():\n    assert False\n")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    mutants = {
        "noticed": Mutant("", "sums.py", "2 * x", "3 * x", "test_sums.py"),
        "UNNOTICED": Mutant("", "sums.py", "UNUSED = 1", "UNUSED = 2", "test_sums.py"),
        "no test ran": Mutant("", "sums.py", "def double", "def triple", "test_sums.py"),
        "test fails without it": Mutant("", "sums.py", "2 * x", "3 * x", "test_wrong.py"),
    }
    chosen = list(mutants)[: repeats(full=4, reduced=2)]  # each takes pytest's start
    assert run([mutants[outcome] for outcome in chosen], root=tmp_path) == chosen
    assert "2 * x" in (tmp_path / "sums.py").read_text()
