"""The tree: no file is too long to read, and a class name is found in one place."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LONGEST = 450
"""Lines of a file."""


def classes(folder: Path) -> dict[str, list[str]]:
    """Name of each class at the top of a file -> the files that have it. Classes inside others are named by those."""
    found = defaultdict(list)
    for path in sorted(folder.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                found[node.name].append(str(path.relative_to(folder)))
    return dict(found)


def long_files(folder: Path) -> dict[str, int]:
    """Files with more than `LONGEST` lines, and how many."""
    lengths = {
        str(path.relative_to(folder)): len(path.read_text(encoding="utf-8").splitlines())
        for path in folder.rglob("*.py")
    }
    return {name: length for name, length in lengths.items() if length > LONGEST}


def test_no_class_name_is_used_twice():
    found = classes(ROOT / "pal")
    assert len(found) > 200
    assert {name: files for name, files in found.items() if len(files) > 1} == {}


@pytest.mark.parametrize("folder", ["pal", "tests"])
def test_no_file_is_too_long(folder):
    assert long_files(ROOT / folder) == {}


def test_the_checks_can_fail(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "a.py").write_text("class Step:\n    class Config: ...\n" + "\n" * LONGEST)
    (tmp_path / "inside" / "b.py").write_text("class Step:\n    class Config: ...\n")
    assert classes(tmp_path) == {"Step": ["a.py", str(Path("inside", "b.py"))]}
    assert long_files(tmp_path) == {"a.py": LONGEST + 2}
